"""The semantic halves of TokenFlow: a vision transformer over patches, or over codes, and foreign towers.

    clip     x = ln_pre([cls | patches] + positions); blocks; ln_post              sigmoid GELU: x sigmoid(1.702 x)
    siglip   x = patches + positions; blocks (the last one of the original is left out, and no norm)        tanh GELU
    timm     the patch tokens of any timm model's forward_features
    decoder  x = [cls | 1x1 patches of the code map] + positions; blocks; norm     exact GELU

All return patch tokens only. Shapes: B images, h w grid of patches, N = h w, D width, C channels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.transformer import TransformerBlock

Kind = Literal["clip", "siglip", "timm"]


@dataclass(frozen=True, kw_only=True)
class SemanticEncoderConfig:
    """Shape of the semantic encoder; the default is CLIP's ViT-B/16."""

    kind: Kind = "clip"
    """Which of the architectures above."""
    timm_name: str | None = None
    """The timm model of kind "timm"; width must be its number of features, the other fields are not used."""
    width: int = 768
    """D."""
    depth: int = 12
    """Blocks that run; SigLIP's original has one more."""
    num_heads: int = 12
    """Attention heads; D must be a multiple."""
    hidden: int = 3072
    """Width of the feed-forward layers."""
    patch_size: int = 16
    """Pixels a patch, along each side; what is left over at the right and the bottom is not seen."""
    table_grid: int = 14
    """Side of the position table; CLIP's is resized to the grid in use."""

    def __post_init__(self):
        if (self.kind == "timm") != (self.timm_name is not None):
            raise ValueError(f"kind={self.kind!r} with timm_name={self.timm_name!r}: a timm model is named exactly for kind 'timm'")
        if min(self.width, self.num_heads, self.hidden, self.patch_size, self.table_grid) < 1 or not 0 <= self.depth <= 1000:
            raise ValueError("width, num_heads, hidden, patch_size and table_grid of a semantic encoder must be positive, depth up to 1000")


def interpolate_positions(table: Tensor, table_grid: int, grid: int) -> Tensor:
    """Learned positions [extra + n^2, D] for a grid of another size, bicubic; the first `extra` rows (the class token) stay.

    The scale factor is (grid + 0.1) / n as in DINO, which moves the sampled points a little: results match only with it.
    """
    if grid == table_grid:
        return table
    extra = len(table) - table_grid**2
    cells = table[extra:].t().unflatten(1, (table_grid, table_grid))[None].float()
    resized = F.interpolate(cells, scale_factor=(grid + 0.1) / table_grid, mode="bicubic")[0].flatten(1).t()
    return torch.cat([table[:extra], resized.to(table.dtype)])


class PatchTransformer(nn.Module):
    """Patches of a map [B, C, H, W] through pre-norm blocks.

    table_grid: side of the square position table. has_cls: a class token takes part. has_pre_norm, has_post_norm: LayerNorms before the
    first and after the last block.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        patch_size: int,
        table_grid: int,
        norm_eps: float,
        approximate: str,
        has_cls: bool = True,
        has_patch_bias: bool = True,
        has_pre_norm: bool = False,
        has_post_norm: bool = True,
    ):
        super().__init__()
        self.table_grid = table_grid
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=has_patch_bias)
        self.cls = nn.Parameter(torch.empty(width).normal_(std=0.02)) if has_cls else None
        self.positions = nn.Parameter(torch.empty(table_grid**2 + has_cls, width).normal_(std=0.02))
        self.pre_norm = nn.LayerNorm(width, eps=norm_eps) if has_pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, hidden=hidden, norm_eps=norm_eps, approximate=approximate) for _ in range(depth)
        )
        self.post_norm = nn.LayerNorm(width, eps=norm_eps) if has_post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] with as many rows as columns of patches. Returns patch tokens [B, N, D]."""
        patches = self.patches(x)
        tokens = patches.flatten(2).transpose(1, 2)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = self.pre_norm(tokens + interpolate_positions(self.positions, self.table_grid, patches.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens)
        return self.post_norm(tokens if self.cls is None else tokens[:, 1:])


class TimmTower(nn.Module):
    """A timm model's patch tokens; heads and pooling norms are left out. pretrained: download timm's weights."""

    def __init__(self, name: str, *, image_size: int, pretrained: bool = False):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("a timm tower needs the timm package: pip install vistok[train]") from error
        if not timm.is_model(name):  # also refuses names with a source in front ("hf-hub:"), which would download code-chosen shapes
            raise ValueError(f"timm knows no model {name!r}")
        native = timm.get_pretrained_cfg(name)
        options = {} if native is not None and native.input_size[-1] == image_size else {"img_size": image_size}
        try:
            self.tower = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError:  # convolutional models take images of any size and no img_size
            self.tower = timm.create_model(name, pretrained=pretrained, num_classes=0)
        for unused in ("head", "fc_norm", "attn_pool"):
            if isinstance(getattr(self.tower, unused, None), nn.Module):
                setattr(self.tower, unused, nn.Identity())

    @property
    def width(self) -> int:
        return self.tower.num_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3, H, W], normalised as the weights want it. Returns patch tokens [B, N, D]."""
        tokens = self.tower.forward_features(x)
        if tokens.ndim == 4:  # convolutional models give [B, D, h, w]
            return tokens.flatten(2).transpose(1, 2)
        return tokens[:, getattr(self.tower, "num_prefix_tokens", 0) :]


def build_semantic_encoder(config: SemanticEncoderConfig, *, image_size: int) -> nn.Module:
    """The encoder of a config, with fresh weights."""
    if config.kind == "timm":
        encoder = TimmTower(config.timm_name, image_size=image_size)
        if encoder.width != config.width:
            raise ValueError(f"{config.timm_name} has {encoder.width} features, the config says width={config.width}")
        return encoder
    shape = dict(
        width=config.width, depth=config.depth, num_heads=config.num_heads, hidden=config.hidden, patch_size=config.patch_size,
        table_grid=config.table_grid,
    )  # fmt: skip
    if config.kind == "clip":
        return PatchTransformer(3, **shape, norm_eps=1e-5, approximate="sigmoid", has_patch_bias=False, has_pre_norm=True)
    return PatchTransformer(3, **shape, norm_eps=1e-6, approximate="tanh", has_cls=False, has_post_norm=False)
