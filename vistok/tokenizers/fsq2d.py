"""FSQ2D: a plain 2D convolutional tokenizer; one FSQ id a grid cell. The quick baseline.

Mentzer et al. 2023 (arXiv 2309.15505) for the quantizer; the network is a small residual autoencoder:

    images --PixelUnshuffle(stem)--> conv -> [ResBlocks, stride-2 conv] ... -> 1x1 to d -> FSQ -> mirrored, PixelShuffle(stem) -> images

B images, C channels, h w = H/f W/f grid with f = stem * 2^(levels - 1), d = len(fsq levels), K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vistok.layers.conv import ResBlock
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import FSQ, FSQConfig
from vistok.registry import register
from vistok.tokenizers.base import check_images, grid_ids, grid_tokens
from vistok.tokens import TokenLayout, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FSQ2DConfig:
    """Shape of the convolutional tokenizer."""

    image_size: tuple[int, int] = (64, 64)
    """Height and width it was trained at, in pixels; others work too."""
    stem: int = 4
    """Pixels folded into channels at the start, along each side."""
    channels: tuple[int, ...] = (48, 96)
    """Channels a resolution; each but the last halves the grid."""
    blocks: int = 2
    """Residual blocks a resolution, on each side."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """FSQ levels; their product is the codebook size."""

    def __post_init__(self):
        if any(channels % 8 for channels in self.channels) or not self.channels:
            raise ValueError(f"channels={self.channels} must all be multiples of 8")
        if not 1 <= self.blocks <= 100:
            raise ValueError(f"blocks={self.blocks} but 1 to 100 are allowed")
        bad = [side for side in self.image_size if side % self.reduction]
        if bad:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {self.reduction}")

    @property
    def reduction(self) -> int:
        """f: pixels a token, along each side."""
        return self.stem * 2 ** (len(self.channels) - 1)


@register
class FSQ2D(VisualModel):
    """Convolutional encoder, FSQ, convolutional decoder."""

    Config = FSQ2DConfig

    def __init__(self, config: FSQ2DConfig):
        super().__init__(config)
        self.quantizer = FSQ(FSQConfig(levels=config.levels))
        self.codebook_size, self.code_dim = self.quantizer.codebook_size, self.quantizer.code_dim
        h, w = (side // config.reduction for side in config.image_size)
        self.layout = TokenLayout("grid", (h, w))
        self.min_tokens = self.max_tokens = h * w
        pixels = 3 * config.stem**2
        down: list[nn.Module] = [nn.PixelUnshuffle(config.stem), nn.Conv2d(pixels, config.channels[0], 3, padding=1)]
        up: list[nn.Module] = [nn.PixelShuffle(config.stem), nn.Conv2d(config.channels[0], pixels, 3, padding=1)]
        for i, channels in enumerate(config.channels):
            if i:
                down.append(nn.Conv2d(config.channels[i - 1], channels, 4, stride=2, padding=1))
                up.append(nn.ConvTranspose2d(channels, config.channels[i - 1], 4, stride=2, padding=1))
            blocks = [ResBlock(channels) for _ in range(2 * config.blocks)]
            down += blocks[: config.blocks]
            up += blocks[config.blocks :]
        last = config.channels[-1]
        self.encoder = nn.Sequential(*down, nn.GroupNorm(8, last), nn.SiLU(), nn.Conv2d(last, self.code_dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(self.code_dim, last, 3, padding=1), *reversed(up))

    def quantize(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, h, w, d] with straight-through gradients, and ids [B, h, w]."""
        images = check_images(images, multiple=self.settings.reduction)
        out = self.quantizer(self.encoder(images.to(self.dtype)).permute(0, 2, 3, 1))
        return out.codes, out.ids

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, h*w] in raster order; deterministic, so generators are not used.

        Raises ValueError: num_tokens is not the grid's size (a grid has no shorter form).
        """
        return grid_tokens(self.quantize(images)[1], num_tokens)

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; deterministic, so generators are not used.

        Raises ValueError: an id outside the codebook, or rows shorter than the grid.
        """
        return self.decode_codes(self.embed(grid_ids(tokens, self.codebook_size, "fsq2d"))).clamp(-1, 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W], unclamped, of codes [B, h, w, d]."""
        return self.decoder(codes.to(self.dtype).permute(0, 3, 1, 2))

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] in [-1, 1] of ids [...]."""
        return self.quantizer.decode(ids)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Training pass on images [B, 3, H, W] in [-1, 1]: losses "l1" and "mse" of the reconstruction."""
        codes, ids = self.quantize(images)
        reconstruction = self.decode_codes(codes)
        difference = reconstruction - images
        losses = {"l1": difference.abs().mean(), "mse": difference.square().mean()}
        return TokenizerOutput(reconstruction, grid_tokens(ids, None), losses)


@register
def fsq2d_64(**overrides) -> FSQ2D:
    """64 tokens of 1,000 codes for a 64 px image; 0.9 M parameters."""
    return FSQ2D(replace(FSQ2DConfig(), **overrides))


@register
def fsq2d_tiny(**overrides) -> FSQ2D:
    """The smallest that still works; for tests and tours."""
    return FSQ2D(replace(FSQ2DConfig(channels=(16, 24), blocks=1, levels=(8, 5, 5)), **overrides))
