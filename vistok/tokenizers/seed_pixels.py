"""From SEED's generation embedding to pixels: a small convolutional decoder of ours, or a diffusers unCLIP pipeline.

    ours     embedding -> linear -> coarse grid -> [ResBlocks, x2] ... -> PixelShuffle(stem) -> image       deterministic
    unCLIP   embedding = the CLIP image embedding a Stable unCLIP model starts from (Rombach et al. 2022; SEED arXiv 2310.01218, 3.1)

B images, E width of the generation embedding, C channels, h w coarse grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.conv import ResBlock

UNCLIP_STEPS, UNCLIP_GUIDANCE = 20, 10.0


@dataclass(frozen=True, kw_only=True)
class EmbeddingDecoderConfig:
    """Shape of the convolutional decoder."""

    channels: tuple[int, ...] = (256, 128, 64)
    """Channels a resolution, coarse to fine; each but the last is followed by a doubling of the grid."""
    blocks: int = 2
    """Residual blocks a resolution."""
    stem: int = 4
    """Pixels unfolded from channels at the end, along each side."""

    def __post_init__(self):
        if not self.channels or any(channels % 8 for channels in self.channels):
            raise ValueError(f"channels={self.channels} must all be multiples of 8")
        if not 0 <= self.blocks <= 100 or self.stem < 1:
            raise ValueError(f"blocks={self.blocks} must be in 0 to 100 and stem={self.stem} at least 1")

    @property
    def reduction(self) -> int:
        """Pixels a cell of the coarse grid, along each side."""
        return self.stem * 2 ** (len(self.channels) - 1)


class EmbeddingDecoder(nn.Module):
    """Embedding [B, E] -> image [B, 3, H, W], unclamped."""

    def __init__(self, config: EmbeddingDecoderConfig, *, embedding_dim: int, image_size: tuple[int, int]):
        super().__init__()
        if any(side % config.reduction for side in image_size):
            raise ValueError(f"image_size={image_size} must be a multiple of the pixel decoder's {config.reduction}")
        self.shape = (config.channels[0], image_size[0] // config.reduction, image_size[1] // config.reduction)
        self.spread = nn.Linear(embedding_dim, self.shape[0] * self.shape[1] * self.shape[2])
        layers: list[nn.Module] = []
        for i, channels in enumerate(config.channels):
            if i:
                layers.append(nn.ConvTranspose2d(config.channels[i - 1], channels, 4, stride=2, padding=1))
            layers += [ResBlock(channels) for _ in range(config.blocks)]
        last = config.channels[-1]
        layers += [nn.GroupNorm(8, last), nn.SiLU(), nn.Conv2d(last, 3 * config.stem**2, 3, padding=1), nn.PixelShuffle(config.stem)]
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding: [B, E]."""
        return self.layers(self.spread(embedding).unflatten(1, self.shape))


@torch.no_grad()
def unclip_images(
    pipeline: Any,
    embedding: Tensor,
    *,
    image_size: tuple[int, int] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    num_steps: int = UNCLIP_STEPS,
    guidance_scale: float = UNCLIP_GUIDANCE,
) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of generation embeddings [B, E] by diffusers' StableUnCLIPImg2ImgPipeline.

    pipeline: with the weights the embedding belongs to (stabilityai/stable-diffusion-2-1-unclip for SEED-2).
    image_size: what the pipeline's images are resized to; None leaves them at its own size.
    generators: one per image, for the starting noise; seeded 0, 1, ... by default.
    Raises ValueError: the pipeline's embeddings have another width.
    """
    normalizer = getattr(pipeline, "image_normalizer", None)
    if normalizer is None:
        raise ValueError(f"unclip must be a diffusers StableUnCLIPImg2ImgPipeline, got {type(pipeline).__name__}")
    width = normalizer.mean.shape[-1]
    if width != embedding.shape[-1]:
        raise ValueError(f"the pipeline starts from embeddings of width {width}, this tokenizer makes {embedding.shape[-1]}")
    generators = [torch.Generator().manual_seed(i) for i in range(len(embedding))] if generators is None else list(generators)
    images = [
        pipeline(
            image_embeds=row[None].to(pipeline.device, pipeline.unet.dtype),
            prompt="",
            noise_level=0,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        ).images
        for row, generator in zip(embedding, generators, strict=True)
    ]
    out = torch.cat(images).float() * 2 - 1
    return out if image_size is None else F.interpolate(out, size=image_size, mode="bicubic", antialias=True).clamp(-1, 1)
