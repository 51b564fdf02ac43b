"""Who tells TokenFlow what an image means: a frozen vision tower's patch tokens, or the words and classes of a data set.

tower   1 - cos(decoded semantic token, teacher's token at that place), mean over places
words   cross entropy between softmax(Linear(mean semantic token)) and the uniform distribution over the image's words or class
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.condition import fnv1a, split_words


class TokenTeacher(nn.Module):
    """Patch tokens of a frozen vision tower.

    source: a name timm knows, or a folder or hub id of a transformers model with a vision tower (safetensors only; no code of it is run).
    layer: which of transformers' hidden states (-2 for SigLIP as in TokenFlow-XL); None: the last, normalised, and projected where the
    model projects (CLIP as in TokenFlow-B). width: of the tokens.
    """

    def __init__(self, source: str, *, layer: int | None = None):
        super().__init__()
        import timm

        self.layer, self.is_timm = layer, timm.is_model(source)
        if self.is_timm:
            from vistok.tokenizers.tokenflow_nets import TimmTower

            if layer is not None:
                raise ValueError(f"teacher_layer={layer} is for transformers models; {source} is one of timm's")
            data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(source).to_dict())
            self.image_size, mean, std = data["input_size"][-1], data["mean"], data["std"]
            self.tower, self.projection = TimmTower(source, image_size=self.image_size, pretrained=True), nn.Identity()
            self.width = self.tower.width
        else:
            self.tower, self.projection, mean, std = _transformers_tower(source)
            self.image_size = self.tower.config.image_size
            is_projected = layer is None and isinstance(self.projection, nn.Linear)
            self.width = self.projection.out_features if is_projected else self.tower.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, N, width] of images [B, 3, H, W] in [-1, 1], resized bicubically to the tower's size."""
        size = (self.image_size, self.image_size)
        resized = images if tuple(images.shape[-2:]) == size else F.interpolate(images, size=size, mode="bicubic", antialias=True)
        pixels = ((resized / 2 + 0.5).clamp(0, 1) - self.mean) / self.std
        if self.is_timm:
            return self.tower(pixels)
        if self.layer is not None:
            tokens = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        else:
            tokens = self.tower(pixel_values=pixels).last_hidden_state
            if isinstance(self.projection, nn.Linear):
                tokens = self.projection(self.tower.post_layernorm(tokens))
        patches = (self.image_size // self.tower.config.patch_size) ** 2
        return tokens[:, tokens.shape[1] - patches :]


def _transformers_tower(source: str) -> tuple[nn.Module, nn.Module, Sequence[float], Sequence[float]]:
    """Vision tower, its projection (or the identity), mean and standard deviation of its input."""
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ImportError(f"the teacher {source!r} needs transformers: pip install vistok[train]") from error
    model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    tower = getattr(model, "vision_model", model)
    if not hasattr(tower.config, "patch_size") or not hasattr(tower.config, "image_size"):
        raise ValueError(f"{source} has no vision tower with patches: it is a {type(model).__name__}")
    return tower, getattr(model, "visual_projection", nn.Identity()), processor.image_mean, processor.image_std


def match_teacher(semantic: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine between decoded tokens [B, N, E] and a teacher's [B, M, E]; another grid is resized to ours, bilinear.

    Raises ValueError: the widths differ.
    """
    if semantic.shape[-1] != target.shape[-1]:
        raise ValueError(f"the teacher's tokens have width {target.shape[-1]}, the model says teacher_width={semantic.shape[-1]}")
    ours, theirs = round(semantic.shape[1] ** 0.5), round(target.shape[1] ** 0.5)
    if ours != theirs:
        target = F.interpolate(target.mT.unflatten(2, (theirs, theirs)).float(), size=(ours, ours), mode="bilinear").flatten(2).mT
    return 1 - F.cosine_similarity(semantic.float(), target.float(), dim=-1).mean()


class WordHead(nn.Module):
    """Guesses an image's words (hashed into `buckets`) or class from its semantic tokens."""

    def __init__(self, width: int, *, buckets: int):
        super().__init__()
        self.buckets = buckets
        self.head = nn.Linear(width, buckets)

    def caption_targets(self, captions: Sequence[str]) -> Tensor:
        """[B, buckets]: uniform over each caption's words, 0 where there are none."""
        targets = torch.zeros(len(captions), self.buckets)
        for row, caption in zip(targets, captions):
            for word in split_words(caption):
                row[fnv1a(word) % self.buckets] = 1
        return targets / targets.sum(1, keepdim=True).clamp(min=1)

    def class_targets(self, labels: Tensor) -> Tensor:
        """[B, buckets] of labels [B]; 0 where the label is -1. Raises ValueError: more classes than buckets."""
        if len(labels) and int(labels.max()) >= self.buckets:
            raise ValueError(f"label {int(labels.max())} needs buckets={int(labels.max()) + 1} or more, got {self.buckets}")
        return F.one_hot(labels.clamp(min=0), self.buckets).float() * (labels >= 0)[:, None]

    def forward(self, semantic: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, a scalar, of tokens [B, N, E]; images without a target count as 0."""
        logits = self.head(semantic.mean(1)).float()
        return -(targets.to(logits.device) * logits.log_softmax(-1)).sum(1).mean()
