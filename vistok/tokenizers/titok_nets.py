"""TiTok's shape, its encoder with registers and its masked decoder.

Yu et al. 2024, arXiv 2406.07550; Kim et al. 2025, arXiv 2501.07730; the tokenizer around them, its equations and the letters: titok.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.layers.transformer import TransformerBlock
from vistok.tokenizers.maskgit_vqgan import PixelDecoderConfig


@dataclass(frozen=True, kw_only=True)
class TiTokConfig:
    """Shape of a TiTok."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width, in pixels; the position tables fit this size only."""
    patch_size: int = 16
    """Pixels a patch of the encoder, along each side."""
    decoder_patch_size: int = 16
    """Pixels a patch of the decoder, along each side."""
    num_registers: int = 128
    """N: tokens an image."""
    encoder_width: int = 512
    encoder_depth: int = 8
    encoder_heads: int = 8
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 8
    code_dim: int = 12
    """d: width of a token."""
    quantizer: Literal["vq", "clustered", "vae"] = "vq"
    """"vq": a codebook; "clustered": one that revives unused codes; "vae": continuous tokens."""
    codebook_size: int = 4096
    """K; not used by "vae"."""
    cosine: bool = False
    """Compare and return unit vectors."""
    commitment_weight: float = 0.25
    """Weight of the pull of the registers to their codes."""
    entropy_weight: float = 0.0
    """Weight of the entropy term of a codebook (arXiv 2310.05737): without it small models give every image the same tokens."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """Who moves the codes of "vq" in training: the optimizer (as published), or a moving average of the registers that chose them."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first training batch that place the codes; 0 (as published): they start random."""
    revive_after: int = 0
    """A code of "vq" that no register chose in this many training steps takes a register of the batch; 0: never."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of "vae", summed over an image's tokens."""
    target: Literal["pixels", "proxy"] = "pixels"
    """What the transformer decoder predicts: pixels, or the codes of a 2D tokenizer."""
    proxy_codebook_size: int = 1024
    """K': codes of that tokenizer."""
    pixel_decoder: PixelDecoderConfig | None = None
    """Paints proxy codes; None before stage 2, and for "pixels"."""
    interleaved_head: bool = False
    """Read the registers' [N, D] numbers as [D, N] in front of the encoder's head, as the published two-stage models do by mistake."""
    text_width: int = 0
    """Width of the text features the decoder reads; 0 for none."""
    text_tokens: int = 77
    """T: text tokens an image."""

    def __post_init__(self):
        for name in ("patch_size", "decoder_patch_size"):
            if any(side % getattr(self, name) or side < 1 for side in self.image_size):
                raise ValueError(f"image_size={self.image_size} must be a multiple of {name}={getattr(self, name)}")
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(f"{part}_width={width} is not a multiple of {part}_heads={heads}")
        if min(self.num_registers, self.code_dim, self.codebook_size, self.proxy_codebook_size) < 1:
            raise ValueError("num_registers, code_dim, codebook_size and proxy_codebook_size must be at least 1")
        if self.pixel_decoder is not None and self.target != "proxy":
            raise ValueError('a pixel_decoder paints proxy codes; it needs target="proxy"')
        if self.pixel_decoder is not None and self.pixel_decoder.reduction != self.decoder_patch_size:
            raise ValueError(
                f"the pixel decoder paints {self.pixel_decoder.reduction} pixels a cell but decoder_patch_size={self.decoder_patch_size}"
            )

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Patches along each side."""
        return self.image_size[0] // patch_size, self.image_size[1] // patch_size


class Trunk(nn.Module):
    """A class token, positions, and the blocks between two norms; what stands behind the patches is the caller's."""

    def __init__(self, width: int, depth: int, num_heads: int, num_patches: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + num_patches, width))  # class token first
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, hidden=4 * width) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, patches: Tensor, rest: Tensor, wanted: slice) -> Tensor:
        """patches: [B, g, D]; rest: [B, M, D], with its positions. Returns the `wanted` tokens of [cls, patches, rest], normalised."""
        x = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1) + self.positions
        x = self.norm_in(torch.cat([x, rest], dim=1))
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x[:, wanted])


class TiTokEncoder(nn.Module):
    """Images in [0, 1] -> z [B, N, d], twice as wide for a VAE."""

    def __init__(self, config: TiTokConfig):
        super().__init__()
        width, (h, w) = config.encoder_width, config.grid(config.patch_size)
        self.interleaved_head = config.interleaved_head
        self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.register_positions = nn.Parameter(torch.empty(config.num_registers, width))
        self.trunk = Trunk(width, config.encoder_depth, config.encoder_heads, h * w)
        self.head = nn.Linear(width, config.code_dim * (2 if config.quantizer == "vae" else 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, d], or [B, N, 2 d]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        registers = (self.registers + self.register_positions).expand(len(images), -1, -1)
        x = self.trunk(patches, registers, slice(1 + patches.shape[1], None))
        if self.interleaved_head:  # the published code reshapes where it should transpose, and its weights were trained so
            B, N, D = x.shape
            x = x.reshape(B, D, N).transpose(1, 2)
        return self.head(x)


class TiTokDecoder(nn.Module):
    """Codes -> pixels in [0, 1] units, or logits over proxy codes."""

    def __init__(self, config: TiTokConfig):
        super().__init__()
        width, patch = config.decoder_width, config.decoder_patch_size
        self.grid, self.is_proxy = config.grid(patch), config.target == "proxy"
        self.from_codes = nn.Linear(config.code_dim, width)
        self.register_positions = nn.Parameter(torch.empty(config.num_registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.trunk = Trunk(width, config.decoder_depth, config.decoder_heads, self.grid[0] * self.grid[1])
        if config.text_width:
            self.from_text = nn.Linear(config.text_width, width)
            self.text_positions = nn.Parameter(torch.empty(config.text_tokens, width))
        if self.is_proxy:
            self.head = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, config.proxy_codebook_size, 1))
        else:
            self.head = nn.Conv2d(width, 3 * patch * patch, 1)
            self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, codes: Tensor, text: Tensor | None) -> Tensor:
        """codes: [B, N, d]; text: [B, T, F] or None. Returns [B, 3, H, W], or logits [B, K', gh, gw]."""
        rest = self.from_codes(codes) + self.register_positions
        if text is not None:
            rest = torch.cat([rest, self.from_text(text) + self.text_positions], dim=1)
        (h, w), B = self.grid, len(codes)
        x = self.trunk(self.mask_token.expand(B, h * w, -1), rest, slice(1, 1 + h * w))
        x = self.head(x.transpose(1, 2).unflatten(2, (h, w)))
        if self.is_proxy:
            return x
        p = round((x.shape[1] // 3) ** 0.5)
        x = x.unflatten(1, (p, p, 3)).permute(0, 3, 4, 1, 5, 2)  # channels are (row, column, colour): [B, 3, h, p, w, p]
        return self.smooth(x.reshape(B, 3, h * p, w * p))
