"""VisionTower: a small vision transformer that knows classes and captions; what semantic tokenizers learn from where no CLIP is at hand.

    patches  F = norm(ViT(normalise(image))), class token left out      [B, N, D]
    pooled   p = mean of F                                              [B, D]     so every patch takes part in what p knows
    classes  logits = Linear(p)                                         [B, C]
    words    t = Linear(p) / |Linear(p)|                                [B, E]     compared with fixed caption vectors: CLIP's loss
                                                                                   (arXiv 2103.00020), one side given (arXiv 2111.07991)

It is no tokenizer: it makes no ids. B images, N patches, D width, C classes, E width of a caption vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.vit import VisionTransformer
from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.tokenizers.base import check_images

MAX_DEPTH = 1000


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Shape of the tower, its input, and what it was taught."""

    image_size: tuple[int, int] = (64, 64)
    """Height and width the ViT reads; other images are resized to it (bicubic), aspect ratio aside."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """What the ViT's input is normalised with, on a scale of 0 to 1; the default leaves images in [-1, 1] as they are."""
    patch_size: int = 8
    width: int = 128
    """D."""
    depth: int = 4
    num_heads: int = 4
    hidden: int = 384
    """Width of the feed-forward layers."""
    classes: tuple[str, ...] = ()
    """Names of the classes it tells apart; none: no class head."""
    captions: str = ""
    """Who made the caption vectors it was compared with (vistok.metrics.captions: hash, minilm, a folder); empty: nobody."""
    caption_width: int = 0
    """E; 0 where there are no captions."""

    def __post_init__(self):
        if any(side % self.patch_size or side < 1 for side in self.image_size):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads or not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}, depth={self.depth} in 1 to {MAX_DEPTH}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} must be positive")
        if bool(self.captions) != bool(self.caption_width):
            raise ValueError(f"captions={self.captions!r} with caption_width={self.caption_width}: both or neither")


@register
class VisionTower(VisualModel):
    """Images to patch features, one vector, class logits and a caption-like vector."""

    Config = VisionTowerConfig

    def __init__(self, config: VisionTowerConfig):
        super().__init__(config)
        self.vision = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            hidden=config.hidden,
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.class_head = nn.Linear(config.width, len(config.classes)) if config.classes else None
        self.caption_head = nn.Linear(config.width, config.caption_width) if config.caption_width else None
        self.width = config.width
        self._encoder = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(side // self.settings.patch_size for side in self.settings.image_size)

    def normalize(self, images: Tensor) -> Tensor:
        """What the ViT reads of images [B, 3, H, W] in [-1, 1]: resized, normalised with the config's mean and deviation."""
        images = check_images(images, multiple=1)
        if tuple(images.shape[-2:]) != tuple(self.settings.image_size):
            images = F.interpolate(images.float(), size=self.settings.image_size, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.settings.image_mean, self.settings.image_std))
        return ((images / 2 + 0.5 - mean) / std).to(self.dtype)

    def features(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of images [B, 3, H, W] in [-1, 1], row by row."""
        return self.norm(self.vision(self.normalize(images)))[:, 1:]

    def pooled(self, images: Tensor) -> Tensor:
        """One vector [B, D] an image: the mean of its patch features."""
        return self.features(images).mean(1)

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Class logits [B, C] and unit vectors [B, E] in the captions' space; None for what the config does not have."""
        pooled = self.pooled(images)
        logits = None if self.class_head is None else self.class_head(pooled)
        return logits, None if self.caption_head is None else F.normalize(self.caption_head(pooled), dim=-1)

    @torch.no_grad()
    def image_directions(self, images: Tensor) -> Tensor:
        """Unit vectors [B, E] to compare with captions. Raises ValueError: it was not taught with captions."""
        if self.caption_head is None:
            raise ValueError("this tower was taught without captions, so it has no space in common with them")
        return self(images)[1]

    def caption_directions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [B, E] of captions, by the encoder the tower was taught with.

        Raises ValueError: it was taught without captions. ImportError, OSError: that encoder is not there.
        """
        if not self.settings.captions:
            raise ValueError("this tower was taught without captions, so it cannot read any")
        if self._encoder is None:
            from vistok.metrics.captions import caption_encoder

            self._encoder = caption_encoder(self.settings.captions)
        return self._encoder(captions)


@register
def vision_tower_64(**overrides) -> VisionTower:
    """A tower for 64 px images: 64 patch features of width 128; 0.7 M parameters."""
    return VisionTower(replace(VisionTowerConfig(), **overrides))


@register
def vision_tower_tiny(**overrides) -> VisionTower:
    """The smallest that still works, for 32 px images; for tests and tours."""
    return VisionTower(replace(VisionTowerConfig(image_size=(32, 32), width=32, depth=2, num_heads=2, hidden=64), **overrides))
