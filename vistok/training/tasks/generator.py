"""Training of a generator on token folders: cross-entropy of the next token; no pixels, no tokenizer needed.

    loss = mean over images of mean over tokens of -log p(token n | tokens < n, condition)

Every random choice (what is dropped, what is replaced) is drawn from the sample's own generator, so a resumed run repeats it bit for bit.

B images, N tokens, K codebook size, L layers, D width.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vistok import rng
from vistok.data.order import SampleOrder, augmentation
from vistok.data.shards import TokenFolder
from vistok.decoding import SamplingConfig, generate
from vistok.generators import GPT, Condition, TextEncoder
from vistok.image import make_grid
from vistok.pipelines import TokenImagePipeline
from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask

logger = logging.getLogger("vistok")


@dataclass(frozen=True, kw_only=True)
class GeneratorTaskConfig:
    """How a generator is regularised and shown."""

    condition_dropout: float = 0.1
    """Share of samples trained without any condition; guidance needs it."""
    class_dropout: float = 0.3
    """Share of samples that lose their class alone, where there are captions too: teaches captions without a class."""
    caption_dropout: float = 0.3
    """Share of samples that lose their caption alone, where there are classes too."""
    dropout: float = 0.0
    """Share of channels dropped in each residual branch, the same for all tokens of an image (Gal & Ghahramani 2016, arXiv 1512.05287)."""
    token_dropout: float = 0.0
    """Share of input tokens replaced by random ids; targets stay."""
    label_smoothing: float = 0.0
    """Mass spread over all ids in the training target."""
    preview_images: int = 16
    """Samples in the preview grid."""
    preview_guidance: float = 1.5
    """Guidance scale of the preview."""
    preview_top_k: int = 0
    """Most probable ids kept in the preview; 0 keeps all."""
    held_out_images: int = 512
    """At most so many held-out images measure the held-out loss."""

    def __post_init__(self):
        for name in ("condition_dropout", "class_dropout", "caption_dropout", "dropout", "token_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of B training images and what belongs to them.

    ids: [B, N] int64, -1 in the padding; None of continuous tokens, which are values [B, N, C]. labels: [B] int64, -1 for none.
    captions: B texts. indices: [B] which image of the folder.
    positions: [B] int64, counted over all processes since the start.
    """

    ids: Tensor | None
    labels: Tensor
    captions: list[str]
    indices: Tensor
    positions: Tensor
    values: Tensor | None = None
    deviations: Tensor | None = None
    """Of values that are means of posteriors, [B, N, C]; None where the folder does not say."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """A copy with its tensors on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class TokenLoader:
    """Endless token batches: a pure function of (seed, position), as `vistok.data.BatchLoader` is for images.

    batch_size: rows of the global batch, of which this process yields every world_size-th. start: samples seen before, over all processes.
    flip: take the tokens of the mirrored image for half of the samples. shuffle: False visits the images in order.
    """

    def __init__(
        self,
        tokens: TokenFolder,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        flip: bool = False,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {world_size} processes")
        if flip and not tokens.plan.has_flips:
            raise ValueError("flip=True but the token folder holds no mirrored images; tokenize with flips, or train without")
        self.tokens, self.batch_size, self.seed, self.start, self.flip = tokens, batch_size, seed, start, flip
        self.rank, self.world_size = rank, world_size
        self.order = SampleOrder(len(tokens), seed, shuffle=shuffle)

    def __iter__(self) -> Iterator[TokenBatch]:
        start = self.start
        while True:
            positions = np.arange(start + self.rank, start + self.batch_size, self.world_size)
            rows = self.order.indices(start, self.batch_size)[self.rank :: self.world_size]
            flips = torch.from_numpy(augmentation(self.seed, positions, shift=0)[0]) if self.flip else None
            yield read_batch(self.tokens, rows, flips=flips, positions=torch.from_numpy(positions.astype(np.int64)))
            start += self.batch_size


def spread_rows(total: int, count: int) -> list[int]:
    """`count` numbers spread evenly over [0, total), some of them twice where count is larger."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


def read_batch(tokens: TokenFolder, rows: Sequence[int], *, flips: Tensor | None = None, positions: Tensor | None = None) -> TokenBatch:
    """The images `rows` of a token folder as a batch; positions default to the rows."""
    indices = torch.tensor(rows, dtype=torch.int64)
    found = tokens.read(indices, flips=flips)
    return TokenBatch(
        ids=found.ids,
        values=found.values,
        deviations=tokens.read_deviations(indices, flips=flips),
        labels=tokens.labels[indices],
        captions=[tokens.captions[i] for i in rows],
        indices=indices,
        positions=indices if positions is None else positions,
    )


class GeneratorTask(TrainingTask):
    """Train `model` on the token folder that the loop is given.

    tokenizer: decodes the previews, frozen; with it the run's result is a pipeline, without it the generator alone.
    tokenizer_reference: a name written into that pipeline instead of a copy of the tokenizer ("vistok/emoji-flextok").
    held_out: tokens of images kept out of training; their loss is logged with each preview.
    """

    def __init__(
        self,
        model: GPT,
        config: GeneratorTaskConfig | None = None,
        *,
        tokenizer: nn.Module | None = None,
        tokenizer_reference: str | None = None,
        held_out: TokenFolder | None = None,
    ):
        super().__init__()
        self.model, self.config = model, config or GeneratorTaskConfig()
        self.tokenizer = None if tokenizer is None else tokenizer.requires_grad_(False).eval()
        self.tokenizer_reference, self.held_out = tokenizer_reference, held_out
        self._captions: dict[str, int] = {}
        self._features: tuple[Tensor, Tensor] | None = None

    def on_start(self, dataset: TokenFolder) -> None:
        """Check that the tokens fit the model; encode every caption once where a text model reads them."""
        self.dataset = dataset
        config = self.model.settings
        for tokens in filter(None, (dataset, self.held_out)):
            self.check_tokens(tokens)
            highest = int(tokens.labels.max())
            if config.num_classes and highest >= config.num_classes:
                raise ValueError(f"a label is {highest} but the generator has num_classes={config.num_classes}")
        if config.text not in ("none", "hash"):
            texts = [*dataset.captions, *(self.held_out.captions if self.held_out else ())]
            self._encode_captions(sorted(set(texts)))

    def check_tokens(self, tokens: TokenFolder) -> None:
        """Raises ValueError: the tokens are not those the model was built for."""
        model = self.model
        if tokens.codebook_size != model.vocab_size or tokens.layout != model.layout:
            raise ValueError(
                f"the tokens have {tokens.codebook_size} codes and the layout {tokens.layout}, "
                f"the generator was built for {model.vocab_size} and {model.layout}"
            )

    def _encode_captions(self, captions: list[str], batch_size: int = 64) -> None:
        config = self.model.settings
        encoder = TextEncoder(config.text, config.caption_tokens, device=self.model.device)
        if encoder.width != config.caption_width:
            raise ValueError(f"{config.text} makes features of width {encoder.width}, the generator was built for {config.caption_width}")
        parts = [encoder(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)]
        self._captions = {caption: i for i, caption in enumerate(captions)}
        self._features = torch.cat([f.cpu().half() for f, _ in parts]), torch.cat([m.cpu() for _, m in parts])

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int) -> TokenLoader:
        """Endless batches of tokens; `config.flip` takes mirrored images for half of the samples, where the folder holds any."""
        flip, size = config.flip and self.dataset.plan.has_flips, config.micro_batch_size
        if config.flip and not flip:
            logger.warning("the token folder holds no mirrored images (tokenize with flips to have them): training without flips")
        return TokenLoader(self.dataset, batch_size=size, seed=config.seed, start=start, flip=flip, rank=rank, world_size=world_size)

    def condition(self, batch: TokenBatch) -> Condition:
        """The batch's whole condition, as far as the model reads it."""
        config, features = self.model.settings, None
        if self._features is not None:
            rows = torch.tensor([self._captions[caption] for caption in batch.captions])
            features = tuple(part[rows] for part in self._features)
        return self.model.make_condition(
            len(batch),
            labels=batch.labels if config.num_classes else None,
            captions=batch.captions if config.text != "none" else None,
            features=features,
        )

    @torch.compiler.disable
    def corrupt(
        self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor
    ) -> tuple[Tensor, Condition, Tensor | None]:
        """What the model gets in training: input ids [B, N-1], a thinned condition, and dropout factors [L, 2, B, 1, D]."""
        config, model = self.config, self.model
        device = model.device
        condition, inputs = self.condition(batch), batch.ids[:, : model.max_tokens - 1].clamp(min=0)
        u = rng.rand((3,), generators, device=device)
        neither = u[:, 0] < config.condition_dropout
        alone = float(bool(model.settings.num_classes) and model.settings.text != "none")
        condition = condition.drop(neither | (u[:, 1] < alone * config.class_dropout), neither | (u[:, 2] < alone * config.caption_dropout))
        if config.token_dropout:
            replaced = rng.rand(inputs.shape[1:], generators, device=device) < config.token_dropout
            inputs = torch.where(replaced, rng.randint(model.vocab_size, inputs.shape[1:], generators, device=device), inputs)
        if not config.dropout:
            return inputs, condition, None
        L, D = model.settings.depth, model.settings.width
        keep = rng.rand((L, 2, 1, D), generators, device=device) >= config.dropout  # [B, L, 2, 1, D]
        return inputs, condition, keep.movedim(0, 2) / (1 - config.dropout)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Next-token cross-entropy; logs it without smoothing, and the share of tokens whose best guess is right."""
        inputs, condition, keep = self.corrupt(batch, generators, step)
        logits = self.model(inputs, condition, keep=keep)
        loss, plain, accuracy = token_loss(logits, batch.ids[:, : self.model.max_tokens], label_smoothing=self.config.label_smoothing)
        return loss, {"cross_entropy": plain.detach(), "accuracy": accuracy}

    @torch.no_grad()
    def held_out_loss(self, batch_size: int = 64) -> float:
        """Cross-entropy per token on held-out images with their full condition. Raises ValueError: there are none."""
        total = num_images = 0
        for _, batch in self.held_out_batches(batch_size, is_spread=True):
            logits = self.model(batch.ids[:, : self.model.max_tokens - 1].clamp(min=0), self.condition(batch))
            total += token_loss(logits, batch.ids[:, : self.model.max_tokens])[1].item() * len(batch)
            num_images += len(batch)
        return total / num_images

    def held_out_batches(self, batch_size: int, *, is_spread: bool = False) -> Iterator[tuple[list[int], TokenBatch]]:
        """Numbers and tokens of config.held_out_images held-out images, the first ones or spread over all, in batches.

        Raises ValueError: there are no held-out tokens.
        """
        if self.held_out is None:
            raise ValueError("this task has no held-out tokens")
        count = min(len(self.held_out), self.config.held_out_images)
        rows = spread_rows(len(self.held_out), count) if is_spread else list(range(count))
        for start in range(0, count, batch_size):
            part = rows[start : start + batch_size]
            yield part, read_batch(self.held_out, part).to(self.model.device)

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """The loss on held-out images, and samples under conditions spread over the training set, from the same noise each time."""
        numbers = {} if self.held_out is None else {"held_out_cross_entropy": self.held_out_loss()}
        if self.tokenizer is None:
            return numbers
        rows = spread_rows(len(self.dataset), self.config.preview_images)
        generators = rng.image_generators(0, len(rows))
        tokens, _ = generate(
            self.model,
            self.condition(read_batch(self.dataset, rows)),
            generators=generators,
            sampling=SamplingConfig(top_k=self.config.preview_top_k),
            guidance_scale=self.config.preview_guidance,
        )
        return {**numbers, "samples": make_grid(self.tokenizer.decode(tokens, generators=generators).float().cpu())}

    def save_pretrained(self, folder: Path) -> None:
        """Write a pipeline where there is a tokenizer, the generator alone where there is none."""
        if self.tokenizer is None:
            self.model.save_pretrained(folder)
        else:
            TokenImagePipeline(self.model, self.tokenizer).save_pretrained(folder, tokenizer_reference=self.tokenizer_reference)


def token_loss(logits: Tensor, ids: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with smoothing, cross-entropy without, and accuracy: scalars, means over images of means over their own tokens.

    logits: [B, N, K], row n predicts ids[:, n]. ids: [B, N] int64, -1 in the padding, which counts nowhere.
    """
    valid = ids >= 0
    weights = valid / (valid.sum(1, keepdim=True).clamp(min=1) * len(ids))
    log_p = F.log_softmax(logits.float(), dim=-1)
    plain = -(log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0] * weights).sum()
    loss = plain
    if label_smoothing:
        loss = (1 - label_smoothing) * plain - label_smoothing * (log_p.mean(-1) * weights).sum()
    accuracy = ((logits.argmax(-1) == ids) * weights).sum()
    return loss, plain, accuracy
