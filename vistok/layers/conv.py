"""Convolution blocks of the 2D tokenizers."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3; x: [B, C, H, W]."""

    def __init__(self, channels: int, *, groups: int = 8):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))
