"""Train a TokenFlow: pixels from one half of each code, meaning from the other.

Qu et al. 2024, arXiv 2412.03069, section 3.2 and appendix A.

    loss = pixel_weight |x' - x|^2 + codebook + commitment [+ entropy] + semantic_weight semantic
         [+ lpips_weight LPIPS] [+ gan_weight GAN from step gan_start]

semantic: the distance to a frozen teacher's tokens, or, without one, how badly the decoded meaning tells the words of the captions and
class names. Now and then one scale but the first is left out, so that later ones do not lean on every earlier one.

The published models start from a trained teacher. A semantic encoder that starts from nothing has to learn some meaning first
(semantic_steps: the semantic half alone, as if there were a code for every vector): placed before that, codes know pixels only, their
semantic halves are all alike, and nothing is ever learned through them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.convert.tokenflow import load_tower
from vistok.image import make_strip
from vistok.rng import image_generators, rand
from vistok.tokenizers.tokenflow import TokenFlow
from vistok.training.task import TrainingTask
from vistok.training.tasks.image_losses import ImageLossConfig, ImageLosses
from vistok.training.tasks.previews import histogram, preview_images
from vistok.training.tasks.semantic_losses import CaptionHead, WordHead, match_teacher
from vistok.training.tasks.teacher import VisionTeacher


@dataclass(frozen=True, kw_only=True)
class TokenFlowTaskConfig(ImageLossConfig):
    """Who the teacher is, and the weights of the losses."""

    semantic: Literal["teacher", "captions", "classes", "none"] = "captions"
    """What the semantic half learns from."""
    teacher: str | None = None
    """semantic="teacher": a timm model, a VisionTower of ours, or a folder or hub id of a transformers model with a vision tower."""
    teacher_layer: int | None = None
    """Which hidden state of a transformers teacher; None: the last, normalised and projected. TokenFlow-XL takes -2 of SigLIP."""
    teacher_mean: tuple[float, float, float] | None = None
    """Mean of the teacher's input, on a scale of 0 to 1; None: what its files say."""
    teacher_std: tuple[float, float, float] | None = None
    """As `teacher_mean`, the deviation."""
    start_from_teacher: bool = False
    """Start the semantic encoder from the teacher's weights; it must be of the same kind and shape."""
    captions: str = "words"
    """semantic="captions": "words" guesses their words; hash, minilm or a text model (vistok.metrics.captions) finds the caption."""
    buckets: int = 512
    """Rows that the words of captions are hashed into; semantic="classes": at least the number of classes."""
    semantic_steps: int = 0
    """Steps in which the semantic half learns alone, unquantized; for one that starts from nothing."""
    semantic_weight: float = 1.0
    pixel_weight: float = 1.0
    scale_dropout: float = 0.1
    """Share of steps that leave out one scale, never the first."""
    freeze_all_but_decoder: bool = False
    """Train the pixel decoder alone: the published models' last stage, with a larger decoder."""

    def __post_init__(self):
        if (self.semantic == "teacher") != (self.teacher is not None):
            raise ValueError(f"semantic={self.semantic!r} with teacher={self.teacher!r}: a teacher is named exactly for semantic='teacher'")
        if self.start_from_teacher and self.teacher is None:
            raise ValueError("start_from_teacher=True needs a teacher")
        if self.semantic_steps and (self.semantic == "none" or self.freeze_all_but_decoder):
            raise ValueError(f"semantic_steps={self.semantic_steps}, but semantic={self.semantic!r} or a frozen encoder learns no meaning")
        if not 0 <= self.scale_dropout <= 1:
            raise ValueError(f"scale_dropout={self.scale_dropout} must be in [0, 1]")


class TokenFlowTask(TrainingTask):
    """model: a TokenFlow. config: its teacher and the weights."""

    def __init__(self, model: TokenFlow, config: TokenFlowTaskConfig = TokenFlowTaskConfig()):
        super().__init__()
        self.model, self.config = model, config
        self.codebook_size = model.codebook_size
        self.find_unused_parameters = bool(config.semantic_steps) or config.semantic == "none" or model.settings.encoder.kind == "timm"
        if config.freeze_all_but_decoder:
            model.requires_grad_(False)
            model.pixel_decoder.requires_grad_(True)
        elif config.semantic == "classes" or (config.semantic == "captions" and config.captions == "words"):
            self.words = WordHead(model.settings.teacher_width, buckets=config.buckets)
        elif config.semantic == "captions":
            self.caption_head = CaptionHead(model.settings.teacher_width, reader=config.captions)
        if config.teacher is not None:
            self.teacher = VisionTeacher(
                config.teacher, reads="patches", layer=config.teacher_layer, mean=config.teacher_mean, std=config.teacher_std
            )
            if self.teacher.width != model.settings.teacher_width:
                raise ValueError(f"{config.teacher} has tokens of width {self.teacher.width}: set teacher_width={self.teacher.width}")
            if config.start_from_teacher:
                load_tower(model, self.teacher.tower)
        self.image_losses = ImageLosses(config)

    def on_start(self, dataset) -> None:
        """Raises ValueError: the data set has nothing that the semantic half could learn from."""
        needs = {"captions": any(dataset.captions) or bool(dataset.classes), "classes": bool(dataset.classes)}
        if not self.config.freeze_all_but_decoder and not needs.get(self.config.semantic, True):
            raise ValueError(
                f"the meaning of TokenFlow's tokens comes from {self.config.semantic}, and this data set has neither captions "
                "(captions.jsonl, metadata.jsonl or .txt files beside the images) nor classes (one folder each); "
                'semantic="none" trains the pixels alone'
            )

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; logs each term unweighted and the ids' histogram. Which scale is left out depends on the step alone."""
        config, images = self.config, batch.images
        if int(step) < config.semantic_steps:
            terms = self._semantic(self.model.unquantized_meaning(images), batch)
            return config.semantic_weight * terms["semantic"], {"semantic": terms["semantic"].detach()}
        output = self.model(images, dropped=self._dropped(step))
        decoded, terms = output.reconstruction.float(), dict(output.losses)
        if config.freeze_all_but_decoder:
            terms = {"mse": terms["mse"]}
        else:
            terms |= self._semantic(output.semantic, batch)
        if decoded.shape != images.shape:
            images = F.interpolate(images, size=decoded.shape[-2:], mode="bicubic")
        weights = {"mse": config.pixel_weight, "semantic": config.semantic_weight}
        loss, logs = self.image_losses(terms, images=images, decoded=decoded, step=step, weights=weights)
        return loss, {**logs, "codes": histogram(output.tokens.ids, self.codebook_size)}

    def _semantic(self, semantic: Tensor, batch) -> dict[str, Tensor]:
        """The semantic loss by name, nothing where there is none."""
        if self.config.semantic == "teacher":
            return {"semantic": match_teacher(semantic, self.teacher(batch.images))}
        if self.config.semantic == "captions" and self.config.captions != "words":
            return {"semantic": self.caption_head(semantic, self._texts(batch))}
        if self.config.semantic == "captions":
            return {"semantic": self.words(semantic, self.words.caption_targets(self._texts(batch)))}
        if self.config.semantic == "classes":
            return {"semantic": self.words(semantic, self.words.class_targets(batch.labels))}
        return {}

    def _texts(self, batch) -> list[str]:
        """Each image's caption and the name of its class, as far as there are any."""
        classes = getattr(self.dataset, "classes", None)
        names = [classes[label] if classes and label >= 0 else "" for label in batch.labels.tolist()]
        return [f"{caption} {name}" for caption, name in zip(batch.captions or [""] * len(names), names)]

    def _dropped(self, step) -> int | None:
        """The scale this step leaves out; drawn on the CPU from the step alone, so all processes and micro batches agree."""
        num_scales = len(self.model.settings.scales)
        chance, which = rand((2,), image_generators(0, [int(step)]))[0].tolist()
        return 1 + int(which * (num_scales - 1)) if num_scales > 1 and chance < self.config.scale_dropout else None

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions from the first scale, the first two, ..., all."""
        images = preview_images(self.dataset, self.model.device)
        tokens = self.model.encode(images)
        rows, titles, count = [images], ["original"], 0
        for side, size in zip(self.model.settings.scales, self.model.quantizer.sizes):
            count += size
            rows.append(self.model.decode(tokens.truncate(count)))
            titles.append(f"to {side} x {side}")
        return {"scales": make_strip(rows, row_titles=titles)}
