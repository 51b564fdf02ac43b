"""The pixel decoder of the MaskGIT VQGAN: laws over its codes, one a grid cell, to an image. TiTok's two-stage models decode through it.

Chang et al. 2022 (arXiv 2202.04200) for the network; Yu et al. 2024 (arXiv 2406.07550) for the soft codes.

    soft code = sum_k softmax(logits)_k codebook_k             the expected code: differentiable, unlike the most probable one
    image     = conv_out(silu(norm(up_1(... up_S(mid(conv_in(soft code)))))))       up_s: blocks, then nearest x 2 and a convolution

B images, K' proxy codes, d width of one, h w grid, S resolutions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, NORM_EPS = 32, 1e-6


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig:
    """Shape of the pixel decoder; the defaults are the published one."""

    code_dim: int = 256
    """d: width of a proxy code."""
    channels: int = 128
    """Channels at full resolution, a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution over `channels`, finest first; each but the finest doubles the grid."""
    blocks: int = 2
    """Residual blocks a resolution, and in the middle."""

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if self.channels % GROUPS or self.channels < 1:
            raise ValueError(f"channels={self.channels} must be a positive multiple of {GROUPS}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers={self.multipliers} must be positive numbers, at least one")
        if self.code_dim < 1 or not 1 <= self.blocks <= 100:
            raise ValueError(f"code_dim={self.code_dim} must be at least 1 and blocks={self.blocks} between 1 and 100")

    @property
    def reduction(self) -> int:
        """f: pixels a grid cell, along each side."""
        return 2 ** (len(self.multipliers) - 1)


class PixelBlock(nn.Module):
    """Two normalised 3x3 convolutions without biases, and a residual.

    Where the channels change there is no way around the block: its 1x1 shortcut reads the block's own output, h + shortcut(h). That is how
    the published weights were trained.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels, NORM_EPS), nn.GroupNorm(GROUPS, out_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None if channels == out_channels else nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(h))


class Upward(nn.Module):
    """The blocks of one resolution, then a doubling of the grid unless it is the finest."""

    def __init__(self, channels: int, out_channels: int, blocks: int, *, is_finest: bool):
        super().__init__()
        self.blocks = nn.ModuleList(PixelBlock(out_channels if i else channels, out_channels) for i in range(blocks))
        self.conv = None if is_finest else nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.conv is None else self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelDecoder(nn.Module):
    """Logits over the proxy codes -> images. codebook_size: K'."""

    def __init__(self, config: PixelDecoderConfig, codebook_size: int):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.codebook = nn.Embedding(codebook_size, config.code_dim)
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.middle = nn.ModuleList(PixelBlock(widths[-1], widths[-1]) for _ in range(config.blocks))
        self.up = nn.ModuleList(  # finest first, as in the official files; run from the last to the first
            Upward(widths[min(i + 1, len(widths) - 1)], width, config.blocks, is_finest=i == 0) for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def soft_codes(self, logits: Tensor) -> Tensor:
        """Expected codes [B, d, h, w] under the laws of logits [B, K', h, w]."""
        return torch.einsum("bkhw,kd->bdhw", logits.softmax(1), self.codebook.weight)

    def forward(self, logits: Tensor) -> Tensor:
        """Images [B, 3, f h, f w], unclamped, of logits [B, K', h, w]."""
        x = self.conv_in(self.soft_codes(logits))
        for block in self.middle:
            x = block(x)
        for up in reversed(self.up):
            x = up(x)
        return self.conv_out(F.silu(self.norm_out(x)))
