"""The convolutional encoder and decoder of VQGAN: residual blocks at falling, then at rising resolutions.

Esser et al. 2021 (arXiv 2012.09841), as LlamaGen (arXiv 2406.06525) and VAR (arXiv 2404.02905) use it; built of diffusers' blocks.

    encoder   conv, [blocks at level 0, halve] ... [blocks at the last level], middle, norm, silu, conv
    decoder   conv, middle, [blocks + 1 at the last level, double] ... [blocks + 1 at level 0], norm, silu, conv
    middle    residual, attention, residual
    level i   has width * multipliers[i] channels; residual blocks, each followed by one-headed attention where the level has attention
    patch     p > 1: blocks of p x p pixels are folded into channels before all this and unfolded after it (ours, for speed: at p = 4 a
              step on a CPU takes a tenth of the time)

B images, C channels, H W pixels, h w = H/f W/f with f = p 2^(levels - 1).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import Tensor, nn

EPS = 1e-6


def _middle(channels: int, groups: int, attention: bool) -> UNetMidBlock2D:
    return UNetMidBlock2D(channels, None, resnet_eps=EPS, resnet_groups=groups, attention_head_dim=channels, add_attention=attention)


class PyramidEncoder(nn.Module):
    """[B, C, H, W] -> [B, out_channels, h, w].

    attention: which levels have it, by number; the middle has it where `middle_attention` says so. norm_groups: of all group norms.
    patch: p.
    """

    def __init__(
        self,
        out_channels: int,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int] = (),
        middle_attention: bool = True,
        norm_groups: int = 32,
        in_channels: int = 3,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        channels = [width * factor for factor in multipliers]
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, (before, after) in enumerate(zip([width, *channels], channels)):
            kind, heads = (AttnDownEncoderBlock2D, {"attention_head_dim": after}) if i in attention else (DownEncoderBlock2D, {})
            options = dict(num_layers=blocks, resnet_eps=EPS, resnet_groups=norm_groups, downsample_padding=0, **heads)
            self.levels.append(kind(before, after, add_downsample=i < len(channels) - 1, **options))
        self.middle = _middle(channels[-1], norm_groups, middle_attention)
        self.norm = nn.GroupNorm(norm_groups, channels[-1], eps=EPS)
        self.head = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(images, self.patch))
        for level in self.levels:
            x = level(x)
        return self.head(F.silu(self.norm(self.middle(x))))


class PyramidDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, C, H, W]; `levels` runs from the lowest resolution to the highest. Arguments as for the encoder."""

    def __init__(
        self,
        in_channels: int,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int] = (),
        middle_attention: bool = True,
        norm_groups: int = 32,
        out_channels: int = 3,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        channels = [width * factor for factor in multipliers]
        self.stem = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.middle = _middle(channels[-1], norm_groups, middle_attention)
        self.levels = nn.ModuleList()
        for i in reversed(range(len(channels))):
            before, after = channels[min(i + 1, len(channels) - 1)], channels[i]
            kind, heads = (AttnUpDecoderBlock2D, {"attention_head_dim": after}) if i in attention else (UpDecoderBlock2D, {})
            options = dict(num_layers=blocks + 1, resnet_eps=EPS, resnet_groups=norm_groups, **heads)
            self.levels.append(kind(before, after, add_upsample=i > 0, **options))
        self.norm = nn.GroupNorm(norm_groups, channels[0], eps=EPS)
        self.head = nn.Conv2d(channels[0], out_channels * patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.head(F.silu(self.norm(x))), self.patch)
