"""The plain vision transformer: pre-norm blocks over the patches of an image (Dosovitskiy et al. 2020, arXiv 2010.11929).

    x = [cls | patches] + positions, then the blocks; no norm at the end

EVA-CLIP's g (Sun et al. 2023, arXiv 2303.15389) is this with a feed-forward layer 4.3637 times as wide and no bias on the keys; a bias on
the keys adds the same number to every logit of a query, so the bias on all three used here computes the same.

Shapes: B images, N = gh gw patches, D width.
"""

import torch
from torch import Tensor, nn

from vistok.layers.transformer import TransformerBlock


class VisionTransformer(nn.Module):
    """Images to tokens, class token first; the grid of its position table is fixed.

    image_size: height and width in pixels, multiples of patch_size. hidden: width of the feed-forward layers. qkv_bias: queries, keys and
    values have biases.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
    ):
        super().__init__()
        num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.positions = nn.Parameter(torch.empty(1 + num_patches, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, hidden=hidden, norm_eps=norm_eps) for _ in range(depth))
        if not qkv_bias:
            for block in self.blocks:
                block.attention.qkv.bias = None

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], normalised as the weights want it. Returns [B, 1+N, D], not normalised."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x
