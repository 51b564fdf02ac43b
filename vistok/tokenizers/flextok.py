"""FlexTok: an image as an ordered list of tokens, any prefix of which decodes to an image.

Bachmann et al. 2025, arXiv 2502.13967. In the paper's order:

    latents    z = scaling * VAE(image)                               [B, C, h, w]
    encoder    [patches of z | registers] -> transformer, registers causal -> linear -> FSQ -> ids [B, k]   (section 3.1)
    dropout    keep the first k registers, k random in training: information is ordered coarse to fine   (section 3.1)
    decoder    [patches of z_t | kept registers, rest a mask token] -> adaLN-zero transformer -> velocity v   (section 3.2)
    training   z_t = (1 - t) z + t noise;  minimise |v - (noise - z)|^2
    sampling   from noise at t = 1 to t = 0 by Euler or Heun steps, with guidance against an all-null context

Two savings over the published description change nothing in the result. A register sees only earlier ones, so k tokens need k registers.
And the R - k masked (or R null) registers of the decoder are identical inputs that stay identical in every layer, so one of them stands
for all, its attention key counted R - k times by adding log(R - k) to its logits.

B images, N = gh gw patches, R registers, k kept, D width, d = len(fsq levels), L layers, S steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.flow import SOLVERS, AdaptiveProjectedGuidance, classifier_free, interpolate, time_grid, velocity_target
from vistok.layers.attention import Attention
from vistok.layers.mlp import SwiGLU
from vistok.layers.norms import modulate, plain_layer_norm
from vistok.layers.positions import fit_positions, sincos_2d, time_features
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import FSQ, FSQConfig, QuantizerOutput
from vistok.registry import register
from vistok.rng import randn
from vistok.tokenizers.base import check_ids, check_images, check_num_tokens
from vistok.tokenizers.quality import Quality, shortest_prefix
from vistok.tokenizers.vae import KLVAE, VAEConfig
from vistok.tokens import TokenLayout, VisualTokens

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


@register
class FlexTok(VisualModel):
    """Encoder, FSQ, rectified-flow decoder, and the frozen VAE around them."""

    Config = FlexTokConfig

    def __init__(self, config: FlexTokConfig):
        super().__init__(config)
        self.vae = None if config.vae is None else KLVAE(config.vae).requires_grad_(False)
        self.encoder = FlexTokEncoder(config)
        self.quantizer = FSQ(FSQConfig(levels=config.levels))
        self.decoder = FlexTokDecoder(config)
        self.codebook_size, self.code_dim = self.quantizer.codebook_size, self.quantizer.code_dim
        self.min_tokens, self.max_tokens = 1, config.num_registers
        self.layout = TokenLayout("sequence", (config.num_registers,))
        self._initialise()

    def _initialise(self) -> None:
        """Xavier linears; modulations and the velocity head zero, so that training starts from the zero velocity (adaLN-zero)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        decoder = self.decoder
        for linear in (*(block.modulation for block in decoder.blocks), decoder.head_modulation, decoder.head):
            nn.init.zeros_(linear.weight)
        for parameter in (self.encoder.registers, decoder.register_positions, decoder.mask_token, decoder.null_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def open_gates(self) -> None:
        """Start with every residual gate at 1 and registers of unit size: on small budgets zero gates take thousands of steps to open,
        and the encoder meanwhile collapses to one code."""
        for block in self.decoder.blocks:
            nn.init.ones_(block.modulation.bias.data.view(2, 6, -1)[:, :2])
        for parameter in (self.encoder.registers, self.decoder.register_positions, self.decoder.mask_token, self.decoder.null_token):
            nn.init.trunc_normal_(parameter, std=0.5)

    # -- images to tokens -------------------------------------------------------------------------------------------------------------

    def encode_latents(self, images: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] -> [B, C, h, w]: the VAE's scaled posterior mode, or a sample when generators are given; pixels stay."""
        check_images(images, multiple=self.settings.reduction)
        return images if self.vae is None else self.vae.encode_latents(images, generators=generators)

    def quantize(self, latents: Tensor, *, num_tokens: int | None = None) -> QuantizerOutput:
        """Codes [B, k, d] with straight-through gradients and ids [B, k] of latents; only k registers are run."""
        return self.quantizer(self.encoder(latents, self.max_tokens if num_tokens is None else num_tokens))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        num_tokens: int | None = None,
        quality: Quality | float | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> VisualTokens:
        """Tokens of images [B, 3, H, W] in [-1, 1].

        num_tokens: k for every image, 1 to R; all R by default. The first k ids do not depend on k.
        quality: instead of num_tokens, a target that chooses the shortest prefix per image: a PSNR in dB, or a `Quality`.
        generators: one per image, to sample the VAE's posterior; its mode by default, so that encoding is deterministic.
        Raises ValueError: sizes that do not divide into patches, num_tokens out of range, both num_tokens and quality.
        """
        if num_tokens is not None and quality is not None:
            raise ValueError("give num_tokens or quality, not both")
        k = check_num_tokens(num_tokens, low=1, high=self.max_tokens, name=type(self).__name__)
        ids = self.quantize(self.encode_latents(images, generators=generators), num_tokens=k).ids
        tokens = VisualTokens.from_ids(ids, self.layout)
        return tokens if quality is None else shortest_prefix(self, images, tokens, quality)

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] in [-1, 1] of ids [...]."""
        return self.quantizer.decode(ids)

    # -- tokens to images -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_to_latents(
        self,
        tokens: VisualTokens,
        *,
        generators: Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance: Literal["apg", "cfg"] = "apg",
        solver: Literal["euler", "heun"] = "euler",
        image_size: tuple[int, int] | None = None,
        folded: bool = True,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Scaled latents [B, C, h, w] of tokens; the arguments are those of `decode`."""
        ids = check_ids(tokens, self.codebook_size, type(self).__name__)
        B, k = ids.shape
        if k > self.max_tokens or not B or bool((tokens.counts < 1).any()):
            raise ValueError(f"FlexTok decodes 1 to {self.max_tokens} tokens an image, got counts {tokens.counts.tolist()}")
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r}; allowed: {', '.join(SOLVERS)}")
        if guidance not in ("apg", "cfg"):
            raise ValueError(f"guidance={guidance!r}; allowed: apg, cfg")
        scale = self.settings.decode_guidance_scale if guidance_scale is None else guidance_scale
        times = time_grid(self.settings.decode_steps if num_steps is None else num_steps).to(self.device)
        x = self._noise(B, noise, generators, image_size)
        decoder = self.decoder
        modulations = decoder.modulations(times[:-1])
        context = decoder.context(self.embed(ids.to(self.device)), tokens.counts.to(self.device), folded=folded)
        is_guided = callable(scale) or scale != 1.0
        null = decoder.null_context(B, folded=folded) if is_guided else None
        combine = AdaptiveProjectedGuidance() if guidance == "apg" else classifier_free
        moments = times.tolist()

        def velocity(x: Tensor, step: int) -> Tensor:
            m = modulations.at(step)
            conditional = decoder(x.to(self.dtype), m, context)[0].float()
            if not is_guided:
                return conditional
            unconditional = decoder(x.to(self.dtype), m, null)[0].float()
            return combine(conditional, unconditional, scale(moments[step]) if callable(scale) else scale)

        return SOLVERS[solver](velocity, x, times, on_step)

    @torch.no_grad()
    def decode(
        self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None, noise: Tensor | None = None, **options
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens; counts may differ between images.

        generators: one per image for the starting noise; seeded 0, 1, ... by default. noise: or the noise itself, [B, C, h, w].
        options, as for `decode_to_latents`: num_steps and guidance_scale (a number or a function of t; defaults in the config),
        guidance "apg" (adaptive projected) or "cfg", solver "euler" or "heun", image_size (H, W), folded=False for the written-out
        computation with all R registers, on_step(step, x_t) before each step.
        Raises ValueError: ids outside the codebook, counts outside 1..R, sizes that do not fit, unknown solver or guidance.
        """
        latents = self.decode_to_latents(tokens, generators=generators, noise=noise, **options)
        return (latents if self.vae is None else self.vae.decode_latents(latents)).float().clamp(-1, 1)

    def decode_prefixes(self, tokens: VisualTokens, counts: Sequence[int], **options) -> Tensor:
        """Images [P, B, 3, H, W] of the first counts[p] tokens of each image, every prefix from the same noise.

        tokens: at least max(counts) each. options: as for `decode`.
        """
        B = len(tokens)
        shared = self._noise(B, options.pop("noise", None), options.pop("generators", None), options.get("image_size"))
        rows = VisualTokens.stack([tokens.truncate(int(count)) for count in counts])
        return self.decode(rows, noise=shared.repeat(len(counts), 1, 1, 1), **options).unflatten(0, (len(counts), B))

    def _noise(self, B: int, noise: Tensor | None, generators, image_size: tuple[int, int] | None) -> Tensor:
        """Starting noise [B, C, h, w] float32, checked."""
        H, W = self.settings.image_size if image_size is None else image_size
        rows, columns = self.settings.reduction
        if H % rows or W % columns or H < rows or W < columns:
            raise ValueError(f"image_size={(H, W)} must be multiples of {(rows, columns)}")
        pixels = 1 if self.vae is None else self.settings.vae.reduction
        shape = (self.settings.latent_channels, H // pixels, W // pixels)
        if noise is None:
            generators = [torch.Generator().manual_seed(i) for i in range(B)] if generators is None else generators
            if len(generators) != B:
                raise ValueError(f"{B} images need {B} generators, one each, got {len(generators)}")
            noise = randn(shape, generators)
        elif noise.shape[0] != B or noise.shape[1] != shape[0] or (image_size is not None and tuple(noise.shape[1:]) != shape):
            raise ValueError(f"noise must be {(B, *shape)}, got {tuple(noise.shape)}")
        return noise.to(self.device, torch.float32)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        *,
        noise: Tensor,
        times: Tensor,
        counts: Tensor,
        num_tokens: int,
        is_dropped: Tensor | None = None,
        tap: int | None = None,
    ) -> tuple[TokenizerOutput, Tensor | None]:
        """One training pass on latents [B, C, h, w].

        noise: like latents; times: [B] in [0, 1]; counts: [B] tokens kept, at most num_tokens, which is how many registers are run;
        is_dropped: [B] bool, images decoded without any token; tap: see FlexTokDecoder.forward.
        Returns the output with the loss {"flow": mean squared error of the velocity}, and the tapped patch tokens.
        """
        quantized = self.quantize(latents, num_tokens=num_tokens)
        context = self.decoder.context(quantized.codes, counts, is_dropped=is_dropped)
        velocity, tapped = self.decoder(interpolate(latents, noise, times), self.decoder.modulations(times), context, tap=tap)
        loss = F.mse_loss(velocity.float(), velocity_target(latents, noise).float())
        return TokenizerOutput(None, VisualTokens.from_ids(quantized.ids, self.layout, counts), {"flow": loss}), tapped


@register
def flextok_d12_d12(**overrides) -> FlexTok:
    """The published d12-d12 shape (341.7 M parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(), **overrides))


@register
def flextok_d18_d18(**overrides) -> FlexTok:
    """The published d18-d18 shape (949.7 M parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(encoder_width=1152, encoder_depth=18, decoder_width=1152, decoder_depth=18), **overrides))


@register
def flextok_d18_d28(**overrides) -> FlexTok:
    """The published d18-d28 shape (2.54 B parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(encoder_width=1152, encoder_depth=18, decoder_width=1792, decoder_depth=28), **overrides))


@register
def flextok_tiny(**overrides) -> FlexTok:
    """The smallest that still works, on the pixels of 32 px images; for tests and tours."""
    base = FlexTokConfig(
        image_size=(32, 32), vae=None, patch_size=(8, 8), max_grid=(8, 8), num_registers=16, levels=(8, 5, 5), encoder_width=64,
        encoder_depth=2, decoder_width=64, decoder_depth=2, head_width=32, decoder_head_width=32, max_time=1.0, decode_steps=8,
        decode_guidance_scale=1.0,
    )  # fmt: skip
    return FlexTok(replace(base, **overrides))
