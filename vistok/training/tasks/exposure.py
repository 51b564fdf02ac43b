"""Training of a GPT on contexts that it wrote itself, against exposure bias: in use, it reads its own tokens and never the data's.

Cen et al. 2024, "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens" (arXiv 2410.14655).

    y        the image that the model makes under the sample's condition, token by token; no gradient flows through it
    batch-scheduled sampling        input n = y_n with probability b(step), else x_n;    target x
    reference-answer correction     input n = y_n throughout;                            target x: back to the data from its own mistakes
    b        rises linearly from 0 at start_step to scheduled_share at full_step

The paper writes y once, before training; here the model of the step writes it, so that its mistakes are the present ones. A step that
uses some costs as many cached passes as tokens besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding import generate
from vistok.generators import GPT, Condition
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ExposureTaskConfig(GeneratorTaskConfig):
    """As for every generator, and how much of its own it reads; token_dropout comes on top."""

    scheduled_share: float = 0.3
    """b behind the rise: share of input tokens that are the model's own. 0: never."""
    correction_share: float = 0.0
    """Share of images whose whole input is the model's own, from start_step on. 0: never."""
    start_step: int = 0
    """Step before which the model reads data alone."""
    full_step: int = 0
    """Step from which b is the whole share."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("scheduled_share", "correction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.start_step <= self.full_step:
            raise ValueError(f"start_step={self.start_step} must be between 0 and full_step={self.full_step}")

    def share(self, step: int) -> float:
        """b at a step."""
        if step >= self.full_step:
            return self.scheduled_share
        return self.scheduled_share * max(step - self.start_step, 0) / (self.full_step - self.start_step)


class ExposureTask(GeneratorTask):
    """Training on own contexts; parts: tokenizer, tokenizer_reference and held_out as in GeneratorTask."""

    def __init__(self, model: GPT, config: ExposureTaskConfig | None = None, **parts):
        super().__init__(model, config or ExposureTaskConfig(), **parts)

    @torch.compiler.disable
    def corrupt(
        self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor
    ) -> tuple[Tensor, Condition, Tensor | None]:
        """As for every generator, then with the model's own tokens among the inputs."""
        inputs, condition, keep = super().corrupt(batch, generators, step)
        share, corrected = self.config.share(int(step)), self.config.correction_share * (int(step) >= self.config.start_step)
        if not (share or corrected):
            return inputs, condition, keep
        N = self.model.max_tokens
        uniforms = rng.rand((N + inputs.shape[1] + 1,), generators, device=self.model.device, dtype=torch.float64)
        is_own = (uniforms[:, N:-1] < share) | (uniforms[:, -1:] < corrected)
        rows = is_own.any(1).nonzero()[:, 0]  # the others need no image of their own
        if not len(rows):
            return inputs, condition, keep
        own = inputs.clone()
        own[rows] = self.own_tokens(condition[rows], uniforms[rows, :N])[:, : inputs.shape[1]]
        return torch.where(is_own, own, inputs), condition, keep

    def own_tokens(self, condition: Condition, uniforms: Tensor) -> Tensor:
        """ids [B, N] that the model makes at temperature 1 without guidance, from uniforms [B, N]; no gradient."""
        was_training = self.model.training
        self.model.eval()
        try:
            return generate(self.model, condition, uniforms=uniforms)[0].ids
        finally:
            self.model.train(was_training)
