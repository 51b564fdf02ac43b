"""Training of a judge of drafts: which tokens would the image not miss?

Bachmann et al. 2025, arXiv 2501.19309, asks people which answer is wrong. Here the decoded image says it: in an image of the target's own
data one token a time is replaced by a draw of the target's law there, and both images are decoded:

    distance = sqrt(mean over the image of (decode(x) - decode(x with token n := y))^2)
    good     = distance < limit;   limit = median distance of the first batches, or given
    loss     = BCE(head(f_n+1), good),  f_n+1: the target's feature once it has read y at n

so the limit separates the tokens of a law into a better and a worse half, whatever the tokenizer. B images, N tokens, K codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok import rng
from vistok.data.shards import TokenFolder
from vistok.decoding.heads import JudgeHead
from vistok.decoding.sampling import sample
from vistok.tokens import VisualTokens
from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch, TokenLoader, read_batch, spread_rows


@dataclass(frozen=True, kw_only=True)
class JudgeTaskConfig:
    """What counts as good."""

    limit: float = 0.0
    """Distance of images, root mean square over [-1, 1], from which on a token is wrong; 0: the median at the start."""
    limit_images: int = 64
    """Images whose median distance becomes the limit."""
    held_out_images: int = 128
    """At most so many held-out images measure the judge."""

    def __post_init__(self):
        if self.limit < 0 or min(self.limit_images, self.held_out_images) < 1:
            raise ValueError(f"limit={self.limit} must not be negative, limit_images and held_out_images at least 1")


class JudgeTask(TrainingTask):
    """Train `model`, a judge, on the token folder that the loop is given.

    target, tokenizer: of the pipeline it will serve, frozen; target_name goes into the run's record.
    """

    def __init__(
        self,
        model: JudgeHead,
        target,
        tokenizer: nn.Module,
        config: JudgeTaskConfig | None = None,
        *,
        held_out: TokenFolder | None = None,
        target_name: str = "",
    ):
        super().__init__()
        self.model, self.config, self.held_out, self.target_name = model, config or JudgeTaskConfig(), held_out, target_name
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        reading = GeneratorTaskConfig(condition_dropout=0.0, class_dropout=0.0, caption_dropout=0.0)
        self.reader = GeneratorTask(target.requires_grad_(False).eval(), reading, held_out=held_out)
        self.limit = self.config.limit

    def on_start(self, dataset: TokenFolder) -> None:
        """Check that the tokens fit; find the limit, from the first images of the folder, so that a resumed run finds the same."""
        self.dataset = dataset
        self.reader.on_start(dataset)
        if not self.config.limit:
            rows = spread_rows(len(dataset), min(self.config.limit_images, len(dataset)))
            batch = read_batch(dataset, rows).to(self.model.device)
            self.limit = float(self.examples(batch, rng.image_generators(0, len(rows), self.model.device))[1].median())

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int) -> TokenLoader:
        """Endless batches of tokens, as for training the target."""
        return self.reader.make_loader(config, start, rank, world_size)

    @torch.no_grad()
    def examples(self, batch: TokenBatch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Features [B, D] of the target at one replaced token an image, and how far the image moved, [B]."""
        target = self.reader.model
        ids = batch.ids[:, : target.max_tokens].clamp(min=0)
        condition, rows = self.reader.condition(batch), torch.arange(len(ids), device=ids.device)
        u = rng.rand((2,), generators, device=ids.device, dtype=torch.float64)
        place = (u[:, 0] * batch.ids.ge(0).sum(1).clamp(max=ids.shape[1])).long()
        laws = target.head(target.features(ids[:, :-1], condition))[rows, place].softmax(-1)
        changed = ids.clone()
        changed[rows, place] = sample(laws, u[:, 1])
        features = target.features(changed, condition)[rows, place + 1]
        images, moved = (self.tokenizer.decode(VisualTokens.from_ids(tokens, target.layout)) for tokens in (ids, changed))
        return features, (images - moved).float().square().flatten(1).mean(1).sqrt()

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Binary cross-entropy of the judge; logs its accuracy and the share of good tokens."""
        features, distance = self.examples(batch, generators)
        good = (distance < self.limit).float()
        logits = self.model(features)
        logs = {"accuracy": ((logits > 0).float() == good).float().mean(), "good": good.mean()}
        return F.binary_cross_entropy_with_logits(logits, good), logs

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, float]:
        """Accuracy on held-out images, and the limit."""
        if self.held_out is None:
            return {"limit": self.limit}
        rows = spread_rows(len(self.held_out), min(len(self.held_out), self.config.held_out_images))
        batch = read_batch(self.held_out, rows).to(self.model.device)
        features, distance = self.examples(batch, rng.image_generators(1, len(rows), self.model.device))
        right = (self.model(features) > 0) == (distance < self.limit)
        return {"limit": self.limit, "held_out_accuracy": float(right.float().mean())}

    def describe(self) -> dict[str, Any]:
        """Plain data of the run, the target's name included."""
        return super().describe() | {"target": self.target_name}
