"""Teach a vision tower from a folder's classes and captions, so that it can teach tokenizers.

    loss = contrast_weight (CE_i(s) + CE_j(s^T)) / 2 + class_weight CE(logits, class)
    s_ij = <t_i, c_j> / temperature          t: the tower's vector of image i, c: the fixed vector of caption j

Captions come from an encoder that is not trained, so the tower learns where its meanings lie instead of inventing a space of its own.
Images without a class or a caption take part in neither term.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.condition import fnv1a
from vistok.metrics.captions import caption_encoder
from vistok.tokenizers.vision_tower import VisionTower
from vistok.training.task import TrainingTask
from vistok.training.tasks.contrast import contrastive_loss

MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class VisionTeacherConfig:
    """Weights of the two terms; a term that the data set cannot feed is left out."""

    contrast_weight: float = 1.0
    class_weight: float = 0.5
    label_smoothing: float = 0.1
    """Of both terms."""
    held_out_images: int = 512
    """At most so many held-out images are classified at each preview."""

    def __post_init__(self):
        if min(self.contrast_weight, self.class_weight) < 0 or not self.contrast_weight + self.class_weight:
            raise ValueError(f"contrast_weight={self.contrast_weight} and class_weight={self.class_weight}: none negative, not both 0")


class VisionTeacherTask(TrainingTask):
    """model: a VisionTower whose config names the classes of the data set and the encoder of its captions.

    held_out: images whose accuracy and retrieval are logged with each preview.
    """

    find_unused_parameters = True

    def __init__(self, model: VisionTower, config: VisionTeacherConfig = VisionTeacherConfig(), *, held_out=None):
        super().__init__()
        self.model, self.config, self.held_out = model, config, held_out
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self._captions: dict[str, int] = {}
        self._vectors = torch.zeros(0, 0)

    def on_start(self, dataset) -> None:
        """Read every caption once. Raises ValueError: the data set has other classes than the model, or nothing to teach."""
        classes, settings = tuple(dataset.classes), self.model.settings
        if settings.classes and settings.classes != classes:
            raise ValueError(f"the tower was built for the classes {list(settings.classes)}, the data set has {list(classes)}")
        if not settings.classes and not settings.captions:
            raise ValueError("this tower has neither classes nor captions, so there is nothing to teach it")
        if settings.captions:
            texts = sorted({text for text in dataset.captions if text.strip()})
            self._vectors = caption_encoder(settings.captions, device=self.model.device)(texts)
            self._captions = {text: i for i, text in enumerate(texts)}

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; logs both terms and the accuracy. No random draws."""
        config = self.config
        logits, directions = self.model(batch.images)
        loss, logs = self.temperature * 0, {}
        if directions is not None:
            groups, texts = self._texts(batch.captions, directions)
            temperature = self.temperature.clamp(min=MIN_TEMPERATURE)
            contrast = contrastive_loss(directions, texts, temperature, groups=groups, label_smoothing=config.label_smoothing)
            loss, logs["contrast"] = loss + config.contrast_weight * contrast, contrast.detach()
        known = batch.labels >= 0
        if logits is not None:
            labels = batch.labels.clamp(min=0)
            terms = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=config.label_smoothing)
            classified = (terms * known).mean()
            loss, logs["class"] = loss + config.class_weight * classified, classified.detach()
            logs["accuracy"] = ((logits.argmax(1) == labels) & known).float().mean()
        return loss, logs

    def _texts(self, captions: list[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """A number [B] equal for equal captions, -1 for none, and the captions' vectors [B, E]."""
        rows = torch.tensor([self._captions[text] if text.strip() else -1 for text in captions])
        numbers = torch.tensor([fnv1a(text) >> 1 if text.strip() else -1 for text in captions])  # the same in every process
        vectors = self._vectors[rows.clamp(min=0)] * (rows >= 0)[:, None]
        return numbers.to(like.device), vectors.to(like)

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, float]:
        """Accuracy and text-image retrieval (R@5, mean of both directions) on held-out images; nothing without them."""
        if self.held_out is None:
            return {}
        from vistok.metrics.probe import caption_groups, recalls, retrieval_ranks
        from vistok.metrics.sources import batches, choose

        rows, right, directions = [], 0, []
        for indices, images in batches(self.held_out, choose(self.held_out, self.config.held_out_images, 0), 64):
            logits, found = self.model(images.to(self.model.device))
            rows += indices
            if logits is not None:
                right += int((logits.argmax(1).cpu() == torch.tensor([self.held_out.labels[i] for i in indices])).sum())
            if found is not None:
                directions.append(found.float().cpu())
        numbers = {"held_out_accuracy": right / len(rows)} if self.model.class_head is not None else {}
        texts = [self.held_out.captions[i] for i in rows]
        if directions and any(text.strip() for text in texts):
            ranks = retrieval_ranks(torch.cat(directions), self.model.caption_directions(texts), caption_groups(texts))
            found = recalls(ranks)
            numbers["held_out_retrieval"] = (found["i2t_r5"] + found["t2i_r5"]) / 2
        return numbers


def tower_for(dataset, build: Callable[..., VisionTower], *, captions: str, **overrides) -> VisionTower:
    """A tower of a preset for what a data set can teach: its classes, if it has two, and its captions, if any differ."""
    has_captions = len(set(dataset.captions)) > 1
    fields = dict(classes=tuple(dataset.classes) if len(dataset.classes) > 1 else ())
    if has_captions:
        fields |= dict(captions=captions, caption_width=caption_encoder(captions).width)
    if not has_captions and not fields["classes"]:
        raise ValueError("a teacher learns from classes (one folder each) or captions, and this data set has neither")
    return build(**fields, **overrides)
