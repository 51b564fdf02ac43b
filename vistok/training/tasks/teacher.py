"""A frozen image model whose embeddings a tokenizer learns to match."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageTeacher(nn.Module):
    """One embedding an image, from a timm model or a CLIP image tower of transformers.

    source: a name timm knows, or a folder or hub id of a CLIPVisionModelWithProjection (safetensors only; no code from it is run).
    width: of the embeddings.
    """

    def __init__(self, source: str):
        super().__init__()
        import timm

        if timm.is_model(source):
            self.model = timm.create_model(source, pretrained=True, num_classes=0)
            data = timm.data.resolve_model_data_config(self.model)
            self.width, size, mean, std = self.model.num_features, data["input_size"][-2:], data["mean"], data["std"]
        else:
            self.model, size, mean, std = _clip_tower(source)
            self.width = self.model.config.projection_dim
        self.is_clip = not timm.is_model(source)
        self.image_size = tuple(size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, width] of images [B, 3, H, W] in [-1, 1]; resized bicubically, aspect ratio aside."""
        resized = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True)
        pixels = (resized / 2 + 0.5 - self.mean) / self.std
        return self.model(pixel_values=pixels).image_embeds if self.is_clip else self.model(pixels)


def _clip_tower(source: str) -> tuple[nn.Module, tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """The tower, its image size, and CLIP's mean and deviation."""
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError as error:
        raise ImportError(f"the teacher {source!r} needs transformers: pip install vistok[train]") from error
    from vistok.tokenizers.seed import CLIP_MEAN, CLIP_STD

    model = CLIPVisionModelWithProjection.from_pretrained(source, use_safetensors=True)
    side = model.config.image_size
    return model, (side, side), CLIP_MEAN, CLIP_STD
