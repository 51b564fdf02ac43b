"""A frozen vision model that says what an image means: its patch tokens, or one vector an image. Shared by TokenFlow and SEED.

    source      what is loaded                                           patches                          image
    timm name   timm's weights                                           tokens of forward_features       pooled features
    vistok      a bundled name, run or folder of a VisionTower           features                         pooled
    otherwise   transformers, a folder or hub id (safetensors only)      hidden states, or the last one   pooled, projected where
                                                                         normalised and projected         the model projects

Images come in [-1, 1]; each teacher gets them at its own size, with its own mean and deviation.
B images, N patches, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.modeling import read_config
from vistok.registry import is_bundled, load, resolve


class VisionTeacher(nn.Module):
    """source: see above. reads: "patches" for tokens [B, N, D], "image" for vectors [B, D].

    layer: with "patches", which of transformers' hidden states (-2 of SigLIP in TokenFlow-XL); None: the last, normalised and projected.
    mean, std: of its input on a scale of 0 to 1; None: what its own files say. width: D.
    Raises ValueError: no such vision model, or its files do not say how its input is normalised.
    """

    def __init__(
        self,
        source: str,
        *,
        reads: Literal["patches", "image"],
        layer: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        import timm

        if (mean is None) != (std is None):
            raise ValueError(f"mean={mean} and std={std} are given together")
        self.reads, self.layer = reads, layer
        is_ours, is_timm = _is_ours(source), timm.is_model(source)
        if layer is not None and (is_ours or is_timm or reads == "image"):
            raise ValueError(f"layer={layer} chooses among the hidden states of a transformers model; {source} gives one kind of {reads}")
        own = (self._load_ours if is_ours else self._load_timm if is_timm else self._load_transformers)(source)
        if mean is None and own is None:
            raise ValueError(f"{source} does not say how its input is normalised (no preprocessor_config.json): give mean and std")
        for name, values in zip(("mean", "std"), own if mean is None else (mean, std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, N, D] or [B, D] of images [B, 3, H, W] in [-1, 1], resized bicubically to the teacher's size, aspect ratio aside."""
        size = self.image_size
        resized = images if tuple(images.shape[-2:]) == size else F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return self.answer(((resized / 2 + 0.5).clamp(0, 1) - self.mean) / self.std)

    def _load_ours(self, source: str):
        self.tower = load(source)
        if not (hasattr(self.tower, "features") and hasattr(self.tower, "pooled")):
            raise ValueError(f"{source} is a {type(self.tower).__name__}; a teacher is a VisionTower (vistok train teacher)")
        self.answer = self.tower.features if self.reads == "patches" else self.tower.pooled
        self.image_size, self.width = tuple(self.tower.settings.image_size), self.tower.width
        return (0.5,) * 3, (0.5,) * 3  # images in [-1, 1]: it normalises them itself

    def _load_timm(self, source: str):
        import timm

        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(source).to_dict())
        self.image_size = tuple(data["input_size"][-2:])
        if self.reads == "patches":
            from vistok.tokenizers.tokenflow_nets import TimmTower

            self.tower = TimmTower(source, image_size=self.image_size[0], pretrained=True)
            self.width = self.tower.width
        else:
            self.tower = timm.create_model(source, pretrained=True, num_classes=0)
            self.width = self.tower.num_features
        self.answer = self.tower
        return data["mean"], data["std"]

    def _load_transformers(self, source: str):
        model, normalisation = _transformers_model(source)
        self.tower = getattr(model, "vision_model", model)
        self.projection = getattr(model, "visual_projection", None)
        settings = self.tower.config
        if not hasattr(settings, "patch_size") or not hasattr(settings, "image_size"):
            raise ValueError(f"{source} has no vision tower with patches: it is a {type(model).__name__}")
        self.image_size = (settings.image_size, settings.image_size)
        self.patches = (settings.image_size // settings.patch_size) ** 2
        is_projected = self.layer is None and self.projection is not None
        self.width = self.projection.out_features if is_projected else settings.hidden_size
        self.answer = self._tokens if self.reads == "patches" else self._vector
        return normalisation

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Patch tokens of a transformers tower; whatever stands before them (class token, registers) is left out."""
        if self.layer is not None:
            tokens = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        else:
            tokens = self.tower(pixel_values=pixels).last_hidden_state
            if self.projection is not None:
                tokens = self.projection(self.tower.post_layernorm(tokens))
        return tokens[:, tokens.shape[1] - self.patches :]

    def _vector(self, pixels: Tensor) -> Tensor:
        vector = self.tower(pixel_values=pixels).pooler_output
        return vector if self.projection is None else self.projection(vector)


def _is_ours(source: str) -> bool:
    """Whether a source is a model of vistok: transformers and timm write no class name of ours into their folders."""
    return is_bundled(source) or (Path(source).is_dir() and isinstance(read_config(resolve(source)).get("_class_name"), str))


def _transformers_model(source: str):
    """The model, and mean and deviation of its input, or None where its files do not say. Nothing of the source is run."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection
    except ImportError as error:
        raise ImportError(f"the teacher {source!r} needs transformers: pip install vistok[train]") from error
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # AutoModel would open an image tower saved with its projection as one without
    is_projected = "CLIPVisionModelWithProjection" in (config.architectures or ())
    kind = CLIPVisionModelWithProjection if is_projected else AutoModel
    model = kind.from_pretrained(source, use_safetensors=True, **({} if is_projected else {"trust_remote_code": False}))
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # towers are often saved without it
        from vistok.tokenizers.tokenflow import CLIP_MEAN, CLIP_STD

        return model, (CLIP_MEAN, CLIP_STD) if config.model_type.startswith("clip") else None
    return model, (processor.image_mean, processor.image_std)
