"""Training of drafting heads, online from the frozen target: every batch is read by the target first, and no hidden state is stored.

    f_n = what the target's output layer W reads to decide token n, of the tokens and condition of a training image
    p_n = softmax(W f_n)

    EAGLE      sum_i decay^i [SmoothL1(f^_n, f_n) + w CE(p_n, softmax(W f^_n))]     step i > 0 reads what step i - 1 predicted
    Medusa     sum_i decay^i CE(p_n+1+i, q_i(. | f_n))
    Chimera    the same, with its trigrams

Li et al. 2024, arXiv 2401.15077, section 4.2; Cai et al. 2024, 2401.10774, section 2.2.1; Zeng et al. 2024, 2402.15758, section 3.3.
Heads learn the target's law instead of the data's token: that is what they are compared with. Part of the images lose their condition,
so that the unconditional rows of guidance are drafted too.

B images, N tokens, D width, K codebook size, g drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok import rng
from vistok.data.shards import TokenFolder
from vistok.decoding.drafter_loss import drafter_loss
from vistok.decoding.heads import ChimeraHeads, EagleHead, MedusaHeads
from vistok.decoding.heads.chimera import in_threes
from vistok.decoding.heads.parts import output_weight
from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch, TokenLoader, read_batch, spread_rows

LOGGED = 4  # images of a batch whose acceptance is logged: laws over K codes cost as much as the loss


@dataclass(frozen=True, kw_only=True)
class DrafterTaskConfig:
    """What a head learns from its target."""

    steps: int = 2
    """EAGLE: how many features in a row are predicted, each from the one before; its paper has 1."""
    decay: float = 0.8
    """Weight of each further step or head, against the one before."""
    ce_weight: float = 1.0
    """EAGLE: weight of the cross-entropy beside the distance of features; 0.1 in its paper, too little where laws are flat."""
    feature_noise: float = 0.1
    """EAGLE: width of the uniform noise on the features it reads, so that it forgives its own errors."""
    condition_dropout: float = 0.15
    """Share of images that are read without their condition."""
    part_dropout: float = 0.25
    """Share of images that lose their class alone, and that lose their caption alone, where there are both."""
    held_out_images: int = 256
    """At most so many held-out images measure how often drafts would be accepted."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("condition_dropout", "part_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.decay <= 1 or min(self.ce_weight, self.feature_noise) < 0:
            raise ValueError(
                f"decay={self.decay} must be in (0, 1], ce_weight={self.ce_weight} and feature_noise={self.feature_noise} not negative"
            )


class DrafterTask(TrainingTask):
    """Train `model`, a head, on the token folder that the loop is given.

    target: the generator it drafts for, frozen; target_name goes into the run's record. held_out: tokens of images kept out of training.
    """

    def __init__(
        self,
        model: EagleHead | MedusaHeads | ChimeraHeads,
        target,
        config: DrafterTaskConfig | None = None,
        *,
        held_out: TokenFolder | None = None,
        target_name: str = "",
    ):
        super().__init__()
        self.model, self.config, self.held_out, self.target_name = model, config or DrafterTaskConfig(), held_out, target_name
        config = self.config
        reading = GeneratorTaskConfig(
            condition_dropout=config.condition_dropout, class_dropout=config.part_dropout, caption_dropout=config.part_dropout
        )
        self.reader = GeneratorTask(target.requires_grad_(False).eval(), reading, held_out=held_out)  # conditions and batches of the target

    @property
    def target(self):
        """The generator that is drafted for."""
        return self.reader.model

    def on_start(self, dataset: TokenFolder) -> None:
        """Check that the tokens fit the target."""
        self.dataset = dataset
        self.reader.on_start(dataset)

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int) -> TokenLoader:
        """Endless batches of tokens, as for training the target."""
        return self.reader.make_loader(config, start, rank, world_size)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance between the head's laws and the target's; logs how often an exact rule would accept the i-th draft."""
        ids, condition, _ = self.reader.corrupt(batch, generators, step)
        with torch.no_grad():
            features = self.target.features(ids, condition)  # [B, N, D]
        valid = (batch.ids[:, : ids.shape[1]] >= 0).float()
        if isinstance(self.model, EagleHead):
            noise = rng.rand(features.shape[1:], generators, device=features.device) - 0.5
            predicted = self.predictions(ids, features + self.config.feature_noise * noise.to(features.dtype))
            losses = [
                drafter_loss(made, features[:, 1 + i :], output_weight(self.target), valid[:, i:], ce_weight=self.config.ce_weight).loss
                for i, made in enumerate(predicted)
            ]
            drafted = [self.target.head(made[:LOGGED].detach()) for made in predicted]
        else:
            drafted = self.drafts(ids, features)
            wanted = self.target.head(features).softmax(-1)
            losses = [cross_entropy(logits, wanted[:, 1 + i :], valid[:, i:]) for i, logits in enumerate(drafted)]
        loss = sum(self.config.decay**i * part for i, part in enumerate(losses)) / sum(self.config.decay**i for i in range(len(losses)))
        return loss, self.acceptance([logits[:LOGGED].detach() for logits in drafted], features[:LOGGED], valid[:LOGGED])

    def predictions(self, ids: Tensor, features: Tensor) -> list[Tensor]:
        """EAGLE: f^ of tokens 1 + i ... N - 1, [B, N - 1 - i, D] for step i, each from the features that the step before predicted."""
        embeddings, known, made = self.target.embedding(ids), features[:, :-1], []
        for i in range(min(self.config.steps, ids.shape[1])):
            made.append(self.model(known, embeddings[:, i:]))
            known = made[-1][:, :-1]
        return made

    def drafts(self, ids: Tensor, features: Tensor) -> list[Tensor]:
        """Logits [B, N - 1 - i, K] of tokens 1 + i ... N - 1, for draft i of every position n that can have one."""
        model, known = self.model, features[:, :-1]
        if isinstance(model, EagleHead):
            return [self.target.head(made) for made in self.predictions(ids, features)]
        if isinstance(model, MedusaHeads):
            logits = model(known)
            return [logits[:, : known.shape[1] - i, i] for i in range(min(logits.shape[2], known.shape[1]))]
        trigrams = model.trigrams(self.target.embedding(in_threes(ids)))
        context = model.context(known, trigrams)
        most = min(model.settings.num_drafts, known.shape[1])
        return [model.logits(context[:, : known.shape[1] - i], trigrams[:, i:], i) for i in range(most)]

    def acceptance(self, drafted: list[Tensor], features: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """1 - TV(p, q) of every draft: the chance that the standard rule accepts it, given that it accepted those before."""
        logs = {}
        for i, logits in enumerate(drafted):
            p = self.target.head(features[:, 1 + i :]).softmax(-1)
            overlap = torch.minimum(p, logits.softmax(-1)).sum(-1)
            logs[f"acceptance_{i + 1}"] = (overlap * valid[:, i:]).sum() / valid[:, i:].sum().clamp(min=1)
        return logs

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, float]:
        """Acceptance on held-out images with their full condition."""
        if self.held_out is None:
            return {}
        count = min(len(self.held_out), self.config.held_out_images)
        batch = read_batch(self.held_out, spread_rows(len(self.held_out), count)).to(self.model.device)
        ids = batch.ids[:, : self.target.max_tokens - 1].clamp(min=0)
        features = self.target.features(ids, self.reader.condition(batch))
        valid = (batch.ids[:, : ids.shape[1]] >= 0).float()
        return {f"held_out_{name}": float(value) for name, value in self.acceptance(self.drafts(ids, features), features, valid).items()}

    def describe(self) -> dict[str, Any]:
        """Plain data of the run, the target's name included."""
        return super().describe() | {"target": self.target_name}


def cross_entropy(drafted: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid [B, T] of CE(wanted, softmax(drafted)) of logits and laws [B, T, K]."""
    entropy = -(wanted * drafted.float().log_softmax(-1)).sum(-1)
    return (entropy * valid).sum() / valid.sum().clamp(min=1)
