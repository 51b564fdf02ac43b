"""FlexTok's shape and its two transformers: patches and registers in, codes to quantize or a velocity out.

Bachmann et al. 2025, arXiv 2502.13967, sections 3.1 and 3.2; the tokenizer around them, its equations and the letters: flextok.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.attention import Attention
from vistok.layers.mlp import SwiGLU
from vistok.layers.norms import modulate, plain_layer_norm
from vistok.layers.positions import fit_positions, sincos_2d, time_features
from vistok.tokenizers.vae import VAEConfig

TIME_MAX_PERIOD = 256.0  # not the usual 10000
MAX_DEPTH = 1000  # far above any model; a config from elsewhere must not build forever


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """Shape of a FlexTok and its sampling defaults."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width it was trained at, in pixels; any size whose patches fit the position table works."""
    vae: VAEConfig | None = VAEConfig(latent_channels=16)
    """The VAE whose latents it works on; None for pixels."""
    patch_size: tuple[int, int] = (2, 2)
    """Latents (or pixels) a patch, rows and columns."""
    max_grid: tuple[int, int] = (16, 16)
    """Rows and columns of the position tables, in patches."""
    position_scaling: Literal["absolute", "interpolate"] = "absolute"
    """How the tables meet another grid: their top-left corner, or resized bilinearly."""
    num_registers: int = 256
    """R: the most tokens an image can have."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """FSQ levels; their product is the codebook size."""
    encoder_width: int = 768
    encoder_depth: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    head_width: int = 64
    """Width of an attention head in the encoder; attention logits are scaled by 8 / head_width (muP)."""
    decoder_head_width: int = 64
    """The same in the decoder."""
    mlp_ratio: float = 4.0
    """SwiGLU hidden width is 2/3 of this times the width."""
    frequency_width: int = 256
    """Sinusoidal features of the time."""
    max_time: float = 1000.0
    """Times are scaled by 1000 / max_time in the sinusoid; the published checkpoints name theirs."""
    decode_steps: int = 20
    """Default solver steps."""
    decode_guidance_scale: float = 7.5
    """Default guidance; 1 is off."""

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            width, head = getattr(self, f"{name}_width"), self.head_width if name == "encoder" else self.decoder_head_width
            if width % head or width % 4:
                raise ValueError(f"{name}_width={width} must be a multiple of 4 and of its head width {head}")
            if not 1 <= getattr(self, f"{name}_depth") <= MAX_DEPTH:
                raise ValueError(f"{name}_depth={getattr(self, f'{name}_depth')} but 1 to {MAX_DEPTH} are allowed")
        if self.num_registers < 1:
            raise ValueError(f"num_registers={self.num_registers} but at least 1 is needed")

    @property
    def latent_channels(self) -> int:
        """C: channels of what is encoded, latents or pixels."""
        return 3 if self.vae is None else self.vae.latent_channels

    @property
    def reduction(self) -> tuple[int, int]:
        """Pixels a patch, rows and columns: image sides must be multiples of these."""
        pixels = 1 if self.vae is None else self.vae.reduction
        return pixels * self.patch_size[0], pixels * self.patch_size[1]


class PatchEmbed(nn.Module):
    """Patches of a grid as tokens, plus a fixed position table; a patch is flattened with the channel fastest."""

    def __init__(self, config: FlexTokConfig, width: int):
        super().__init__()
        self.patch_size, self.interpolate = config.patch_size, config.position_scaling == "interpolate"
        self.proj = nn.Linear(config.latent_channels * config.patch_size[0] * config.patch_size[1], width)
        self.register_buffer("positions", sincos_2d(width, config.max_grid))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, gh, gw, D]."""
        rows, columns = self.patch_size
        x = latents.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # [B, C, gh, ph, gw, pw]
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # [B, gh, gw, ph*pw*C]
        table = fit_positions(self.positions, tuple(x.shape[1:3]), interpolate=self.interpolate)
        return self.proj(x.to(self.proj.weight.dtype)) + table.permute(1, 2, 0).to(self.proj.weight.dtype)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """[B, gh*gw, ph*pw*C] -> [B, C, gh*ph, gw*pw]; the inverse of PatchEmbed's order."""
    rows, columns = patch_size
    x = x.unflatten(1, grid).unflatten(3, (rows, columns, -1))  # [B, gh, gw, ph, pw, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; norms have no parameters; q and k are normalised; attention scale is 8 / head width (muP)."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, width // head_width, qk_norm=True, scale=8.0 / head_width)
        self.mlp = SwiGLU(width, int(2 * int(mlp_ratio * width) / 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(plain_layer_norm(x), mask=mask)
        return x + self.mlp(plain_layer_norm(x))


class AdaptiveBlock(Block):
    """A Block whose norms and gates follow the time, one set for patches and one for registers (adaLN-zero)."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float):
        super().__init__(width, head_width, mlp_ratio)
        self.modulation = nn.Linear(width, 12 * width)

    def forward(self, x: Tensor, m: Tensor, num_patches: int, mask: Tensor | None) -> Tensor:
        """x: [B, N+M, D], patches first; m: [B or 1, 12 D]; mask: additive, broadcastable to [B, h, N+M, N+M]."""
        m = m.unflatten(1, (2, 6, 1, -1)).to(x.dtype)  # [B, patches|registers, chunk, 1, D]
        sizes = (num_patches, x.shape[1] - num_patches)

        def per_token(chunk: int) -> Tensor:
            return torch.cat([m[:, i, chunk].expand(-1, size, -1) for i, size in enumerate(sizes)], dim=1)

        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = (per_token(chunk) for chunk in range(6))
        x = x + gate_attn * self.attn(modulate(plain_layer_norm(x), shift_attn, scale_attn), mask=mask)
        return x + gate_mlp * self.mlp(modulate(plain_layer_norm(x), shift_mlp, scale_mlp))


class FlexTokEncoder(nn.Module):
    """Latents and the first k registers -> k vectors to quantize."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        width = config.encoder_width
        self.patches = PatchEmbed(config, width)
        self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.blocks = nn.ModuleList(Block(width, config.head_width, config.mlp_ratio) for _ in range(config.encoder_depth))
        self.head = nn.Linear(width, len(config.levels))

    def trunk(self, latents: Tensor, num_tokens: int) -> Tensor:
        """Registers after the transformer, [B, k, D]."""
        x = self.patches(latents).flatten(1, 2)
        B, N, _ = x.shape
        x = torch.cat([x, self.registers[:num_tokens].to(x.dtype).expand(B, -1, -1)], dim=1)
        # everyone sees every patch; a register also sees itself and earlier ones; patches see no register
        mask = torch.ones(N + num_tokens, N + num_tokens, dtype=torch.bool, device=x.device).tril()
        mask[:, :N] = True
        for block in self.blocks:
            x = block(x, mask)
        return x[:, N:]

    def forward(self, latents: Tensor, num_tokens: int) -> Tensor:
        """[B, C, h, w] -> [B, k, d]."""
        return self.head(plain_layer_norm(self.trunk(latents, num_tokens)))


@dataclass(frozen=True)
class Context:
    """The decoder's registers: x [B, M, D], and what is added to their attention logits as keys, bias [B, M], or None for nothing."""

    x: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Modulations:
    """All that depends on the time alone: blocks [L] of [T, 12 D], head [T, 2 D]; T is B, 1, or the steps of a grid."""

    blocks: list[Tensor]
    head: Tensor

    def at(self, step: int) -> "Modulations":
        return Modulations([m[step : step + 1] for m in self.blocks], self.head[step : step + 1])


class FlexTokDecoder(nn.Module):
    """Noisy latents, time and kept codes -> velocity."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        self.config = config
        width, R = config.decoder_width, config.num_registers
        self.patches = PatchEmbed(config, width)
        self.from_codes = nn.Linear(len(config.levels), width)
        self.register_positions = nn.Parameter(torch.empty(R, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.null_token = nn.Parameter(torch.empty(width))
        self.time_mlp = nn.Sequential(nn.Linear(config.frequency_width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(AdaptiveBlock(width, config.decoder_head_width, config.mlp_ratio) for _ in range(config.decoder_depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.latent_channels * config.patch_size[0] * config.patch_size[1])

    def context(self, codes: Tensor, counts: Tensor, *, is_dropped: Tensor | None = None, folded: bool = True) -> Context:
        """Registers of codes [B, k, d] of which the first counts [B] are real; rows where is_dropped [B] hold only null tokens.

        folded: one masked register stands for all R - counts; otherwise all R are there.
        """
        B, k, _ = codes.shape
        R = self.config.num_registers
        x = self.from_codes(codes.to(self.from_codes.weight.dtype)) + self.register_positions[:k]
        rest = self.mask_token.expand(B, 1, -1)
        if is_dropped is not None:
            rest = torch.where(is_dropped[:, None, None], self.null_token, rest)
            counts = counts.masked_fill(is_dropped, 0)
        is_kept = torch.arange(k, device=x.device) < counts[:, None]
        if k == R or not folded:
            x = torch.where(is_kept[..., None], x, rest)
            return Context(torch.cat([x, rest.expand(-1, R - k, -1)], dim=1), None)
        bias = torch.zeros(B, k, device=x.device, dtype=x.dtype).masked_fill(~is_kept, -torch.inf)
        return Context(torch.cat([x, rest], dim=1), torch.cat([bias, (R - counts).log()[:, None].to(x.dtype)], dim=1))

    def null_context(self, batch_size: int, *, folded: bool = True) -> Context:
        """Registers of the unconditional pass: R null tokens, as one when folded."""
        x = self.null_token.expand(batch_size, 1 if folded else self.config.num_registers, -1)
        return Context(x, x.new_full((batch_size, 1), self.config.num_registers).log() if folded else None)

    def modulations(self, t: Tensor) -> Modulations:
        """Modulations of times t [T] in [0, 1], t <= max_time."""
        features = time_features(t, width=self.config.frequency_width, max_period=TIME_MAX_PERIOD, time_scale=1000.0 / self.config.max_time)
        activated = F.silu(self.time_mlp(features.to(self.mask_token.dtype)))
        return Modulations([block.modulation(activated) for block in self.blocks], self.head_modulation(activated))

    def forward(self, x_t: Tensor, modulations: Modulations, context: Context, *, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Velocity [B, C, h, w] of noisy latents [B, C, h, w]; with `tap`, also the patch tokens [B, N, D] after that block (REPA)."""
        x = self.patches(x_t)
        grid, N = tuple(x.shape[1:3]), x.shape[1] * x.shape[2]
        x = torch.cat([x.flatten(1, 2), context.x.to(x.dtype)], dim=1)
        mask = None if context.bias is None else F.pad(context.bias, (N, 0))[:, None, None].to(x.dtype)  # [B, 1, 1, N+M]
        tapped = None
        for i, (block, m) in enumerate(zip(self.blocks, modulations.blocks)):
            x = block(x, m, N, mask)
            tapped = x[:, :N] if i == tap else tapped
        shift, scale = modulations.head[:, None].to(x.dtype).chunk(2, dim=-1)
        x = self.head(modulate(plain_layer_norm(x[:, :N]), shift, scale))
        return unpatchify(x, grid, self.config.patch_size), tapped
