"""Training of the generators that see tokens in another way than left to right: MaskGIT (masked) and RAR (random orders).

    MaskGIT   weighted mean of -log p(id | known tokens, condition)                      (`MaskGIT.masked_loss`)
    RAR       mean over steps of -log p(id_oj | id_o0 ... id_oj-1, condition)            o: random with probability r(step), else raster
              r = 1 until random_steps, falls linearly to 0 at raster_steps              Yu et al. 2024, arXiv 2411.00776, section 3.2

Everything else (tokens, conditions, previews, the result) is the plain generator's task.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok import rng
from vistok.generators import RAR, Condition, MaskGIT
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch, token_loss


@dataclass(frozen=True, kw_only=True)
class MaskGITTaskConfig(GeneratorTaskConfig):
    """As for every generator; dropout and token_dropout are not used."""

    label_smoothing: float = 0.1
    """Mass spread over all ids in the training target."""
    unmasked_weight: float = 0.1
    """Weight of tokens that are not masked."""


@dataclass(frozen=True, kw_only=True)
class RARTaskConfig(GeneratorTaskConfig):
    """As for every generator; dropout and token_dropout are not used."""

    random_steps: int = 125_000
    """Steps with random orders only; half of the run in the paper."""
    raster_steps: int = 187_500
    """Step from which all orders are raster; three quarters of the run in the paper."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.random_steps <= self.raster_steps:
            raise ValueError(f"random_steps={self.random_steps} must be between 0 and raster_steps={self.raster_steps}")


class MaskGITTask(GeneratorTask):
    """Masked training; parts: tokenizer, tokenizer_reference and held_out as in GeneratorTask."""

    def __init__(self, model: MaskGIT, config: MaskGITTaskConfig | None = None, **parts):
        super().__init__(model, config or MaskGITTaskConfig(), **parts)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The masked loss; logs the cross-entropy on masked tokens without smoothing, and the share of right guesses."""
        config, N = self.config, self.model.max_tokens
        uniforms = rng.rand((N + 2,), generators, device=self.model.device)
        condition = dropped(self.condition(batch), uniforms[:, 0] < config.condition_dropout)
        weights = dict(label_smoothing=config.label_smoothing, unmasked_weight=config.unmasked_weight)
        loss, plain, accuracy = self.model.masked_loss(batch.ids, condition, uniforms[:, 1:], **weights)
        return loss, {"cross_entropy": plain.detach(), "accuracy": accuracy}

    @torch.no_grad()
    def held_out_loss(self, batch_size: int = 64) -> float:
        """Cross-entropy per masked token on held-out images, masks drawn by image number. Raises ValueError: there are none."""
        total = num_images = 0
        for rows, batch in self.held_out_batches(batch_size):
            uniforms = rng.rand((self.model.max_tokens + 1,), rng.image_generators(0, rows), device=self.model.device)
            total += self.model.masked_loss(batch.ids, self.condition(batch), uniforms)[1].item() * len(batch)
            num_images += len(batch)
        return total / num_images


class RARTask(GeneratorTask):
    """Training in random orders; the held-out loss is that of the raster order. parts: as in GeneratorTask."""

    def __init__(self, model: RAR, config: RARTaskConfig | None = None, **parts):
        super().__init__(model, config or RARTaskConfig(), **parts)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Next-token cross-entropy in each image's own order; logs it without smoothing, and the share of raster orders."""
        config, N = self.config, self.model.max_tokens
        uniforms = rng.rand((N + 2,), generators, device=self.model.device)
        condition = dropped(self.condition(batch), uniforms[:, 0] < config.condition_dropout)
        is_random = uniforms[:, 1] < random_share(step, config.random_steps, config.raster_steps)
        raster = torch.arange(N, device=uniforms.device)
        orders = torch.where(is_random[:, None], uniforms[:, 2:].argsort(1), raster)
        visited = batch.ids.gather(1, orders)
        logits = self.model(visited[:, :-1], condition, orders=orders)
        loss, plain, accuracy = token_loss(logits, visited, label_smoothing=config.label_smoothing)
        return loss, {"cross_entropy": plain.detach(), "accuracy": accuracy, "raster": (~is_random).float().mean()}


def dropped(condition: Condition, is_dropped: Tensor) -> Condition:
    """The condition with nothing left in the rows where is_dropped [B]."""
    return condition.drop(is_dropped, is_dropped)


def random_share(step: int | Tensor, random_steps: int, raster_steps: int) -> float:
    """r: probability of a random order at a step."""
    if int(step) < random_steps:
        return 1.0
    return max(0.0, (raster_steps - int(step)) / max(raster_steps - random_steps, 1)) if int(step) < raster_steps else 0.0
