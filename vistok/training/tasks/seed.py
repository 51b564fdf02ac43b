"""Train a SEED: stage I on images and captions, then stage II on images.

Ge et al. 2023, arXiv 2310.01218, sections 3.1.1 and 3.1.2.

    stage I   the last register of an image and its caption, contrasted                       ViT and Q-Former learn
    stage II  5 VQ + 2 (1 - cos(semantic reconstruction, registers)) + 0.5 |g - teacher|^2 [+ pixels]        the rest learns

The published recipe starts from BLIP-2 and keeps the encoder fixed in stage II. Trained from nothing, a tokenizer draws better images when
the encoder goes on learning there (frozen_encoder=False) with some contrast kept (joint_contrast_weight). Without a teacher the generation
embedding is whatever serves the pixel decoder.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vistok.generators.condition import Condition, ConditionPrefix, TextEncoder, fnv1a, hash_captions
from vistok.image import make_strip
from vistok.tokenizers.seed import SEED, SEEDLossWeights, SEEDTextConfig
from vistok.training.task import TrainingTask
from vistok.training.tasks.contrast import contrastive_loss
from vistok.training.tasks.previews import histogram, preview_images
from vistok.training.tasks.teacher import VisionTeacher

MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class SEEDTaskConfig:
    """How SEED learns."""

    contrast_steps: int = 0
    """Steps of stage I; stage II follows."""
    joint_contrast_weight: float = 0.0
    """Of the contrastive loss in stage II (not with frozen_encoder); it is 1 in stage I."""
    frozen_encoder: bool = True
    """Keep ViT and Q-Former fixed in stage II."""
    frozen_vision: bool = False
    """Keep the ViT fixed in both stages; for one that is trained already."""
    text: str = "hash"
    """What reads captions: "hash" (words hashed into a table that is trained here) or a transformers text model, frozen."""
    caption_tokens: int = 8
    """Words (hash) or text tokens that the Q-Former's text branch reads."""
    caption_buckets: int = 1024
    """Rows of the hash table."""
    text_dim: int = 128
    """Width in which images and captions are compared."""
    teacher: str | None = None
    """Frozen image model whose embedding the generation embedding should equal (teacher.py); None: no such loss."""
    teacher_mean: tuple[float, float, float] | None = None
    """Mean of the teacher's input, on a scale of 0 to 1; None: what its files say."""
    teacher_std: tuple[float, float, float] | None = None
    """As `teacher_mean`, the deviation."""
    weights: SEEDLossWeights = field(default_factory=SEEDLossWeights)

    def __post_init__(self):
        if self.frozen_encoder and self.joint_contrast_weight:
            raise ValueError("joint_contrast_weight trains the encoder in stage II, so it needs frozen_encoder=False")


def with_text(model: SEED, text: SEEDTextConfig | None) -> SEED:
    """A copy of the model with another text branch (None: without), every other weight the same."""
    copy = SEED(replace(model.settings, text=text)).to(model.device)
    weights = copy.state_dict()
    ours = model.state_dict()
    copy.load_state_dict({key: ours.get(key, value) for key, value in weights.items()})
    return copy


class SEEDTask(TrainingTask):
    """model: a SEED; it gets a text branch while it trains, and is saved without."""

    find_unused_parameters = True

    def __init__(self, model: SEED, config: SEEDTaskConfig = SEEDTaskConfig()):
        super().__init__()
        self.config = config
        self.has_contrast = bool(config.contrast_steps or config.joint_contrast_weight)
        self.text_encoder = None
        if self.has_contrast:
            model = with_text(model, SEEDTextConfig(vocab_size=0, max_words=0, embedding_dim=config.text_dim))
            if config.text != "hash":
                self.text_encoder = TextEncoder(config.text, config.caption_tokens)
            self.captions = ConditionPrefix(
                width=model.settings.qformer.width,
                num_classes=0,
                text=config.text,
                caption_tokens=config.caption_tokens,
                caption_width=0 if self.text_encoder is None else self.text_encoder.width,
                caption_buckets=config.caption_buckets,
            )
        self.model = model
        self.codebook_size = model.codebook_size
        if config.frozen_vision:
            model.vision.requires_grad_(False)
        self.teacher = None
        if config.teacher is not None:
            self.teacher = VisionTeacher(config.teacher, reads="image", mean=config.teacher_mean, std=config.teacher_std)
        if self.teacher is not None and self.teacher.width != model.settings.embedding_dim:
            raise ValueError(
                f"the teacher {config.teacher!r} makes embeddings of width {self.teacher.width}, the model of "
                f"{model.settings.embedding_dim}; set the model's embedding_dim to the teacher's"
            )

    def on_start(self, dataset) -> None:
        """Raises ValueError: stage I has neither captions nor classes to learn from."""
        if self.has_contrast and not any(dataset.captions) and not dataset.classes:
            raise ValueError(
                "stage I of SEED compares images with captions, and this data set has neither captions (captions.jsonl, metadata.jsonl or "
                ".txt files beside the images) nor classes (one folder each); build SEEDTask with contrast_steps=0 to train without"
            )
        if self.text_encoder is not None:
            self.text_encoder.model.to(self.model.device)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the stage that `step` is in; logs each of them. No random draws but the Q-Former's dropout, where it has any."""
        config, model = self.config, self.model
        is_first = int(step) < config.contrast_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and (is_first or not config.frozen_encoder)):
            embeddings = model.causal_embeddings(batch.images)
        losses, logs = {}, {}
        contrast_weight = 1.0 if is_first else config.joint_contrast_weight
        if contrast_weight:
            losses["contrast"] = contrast_weight * self.contrast(embeddings, self.texts(batch))
        if not is_first:
            target = None if self.teacher is None else self.teacher(batch.images)
            output = model.reconstruct(embeddings, images=batch.images, target=target, weights=config.weights)
            losses |= output.losses
            logs["codes"] = histogram(output.tokens.ids, self.codebook_size)
        return sum(losses.values()), {**{name: loss.detach() for name, loss in losses.items()}, **logs}

    def texts(self, batch) -> list[str]:
        """A text an image: its caption, else the name of its class, else none."""
        classes = self.dataset.classes
        names = [classes[label] if classes and label >= 0 else "" for label in batch.labels.tolist()]
        return [caption.strip() or name for caption, name in zip(batch.captions or [""] * len(names), names)]

    def contrast(self, embeddings: Tensor, texts: list[str]) -> Tensor:
        """The contrastive loss of causal embeddings [B, R, D] and their texts; images without a text take no part."""
        model = self.model
        # equal texts are one answer; the hash is the same in every process
        groups = torch.tensor([fnv1a(text) >> 1 if text else -1 for text in texts], device=embeddings.device)
        states = model.text_states(self.captions(self._condition(texts), len(texts)))
        temperature = model.text.temperature.clamp(min=MIN_TEMPERATURE)
        return contrastive_loss(model.image_direction(embeddings), model.text_direction(states), temperature, groups=groups)

    def _condition(self, texts: list[str]):
        device = self.model.device
        if self.text_encoder is None:
            words = hash_captions(texts, buckets=self.config.caption_buckets, min_words=self.config.caption_tokens)
            return Condition(words=words.to(device))
        features, mask = self.text_encoder(texts)
        return Condition(features=features.to(device), mask=mask.to(device))

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions; nothing where there is no pixel decoder."""
        if self.model.pixels is None:
            return {}
        images = preview_images(self.dataset, self.model.device)
        return {"reconstruction": make_strip([images, self.model.decode(self.model.encode(images))], row_titles=["original", "decoded"])}

    def save_pretrained(self, folder: Path) -> None:
        """Save the tokenizer without its text branch."""
        (with_text(self.model, None) if self.has_contrast else self.model).save_pretrained(folder)
