"""Training of a GPT or an xAR on a mixture of random, next and next-all prediction (see `vistok.generators.objectives`).

    loss = w_r L_r + w_n L_n + w_a L_a         L_n is the plain generator's loss, to the bit; each mean is logged by its name

What is left over is a plain GPT or xAR: it generates token by token, entity by entity. Held-out loss and previews are those of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import rng
from vistok.generators import GPT, XAR
from vistok.generators.objectives import (
    ObjectiveWeights,
    Prediction,
    flow_errors,
    mean_error,
    mixed_loss,
    next_all_prediction,
    random_prediction,
)
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch, token_loss
from vistok.training.tasks.xar import XARTask, XARTaskConfig


@dataclass(frozen=True, kw_only=True)
class MixedTaskConfig(GeneratorTaskConfig):
    """As for every generator; token_dropout and label_smoothing are the next-token task's alone."""

    weights: ObjectiveWeights = ObjectiveWeights()
    """Of the three tasks."""
    hidden_share: float = 0.4
    """Share of tokens hidden in random prediction."""

    def __post_init__(self):
        super().__post_init__()
        _check_share(self.hidden_share)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"hidden_share must be in (0, 1], got {share}")


class MixedTask(GeneratorTask):
    """Mixed training; parts: tokenizer, tokenizer_reference and held_out as in GeneratorTask.

    Raises ValueError: a task beside the next token has a weight, but the model has no query.
    """

    def __init__(self, model: GPT, config: MixedTaskConfig | None = None, **parts):
        super().__init__(model, config or MixedTaskConfig(), **parts)
        others = sorted(set(self.config.weights.active()) - {"next"})
        if others and not model.settings.has_query:
            raise ValueError(f"{' and '.join(others)} prediction needs a generator with has_query=True")

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss; logs each task's cross-entropy, and the share of next tokens whose best guess is right."""
        config, N = self.config, self.model.max_tokens
        inputs, condition, keep = self.corrupt(batch, generators, step)
        ids = batch.ids[:, :N]
        means, logs = {}, {}
        active = config.weights.active()
        if "next" in active:
            logits = self.model(inputs, condition, keep=keep)
            means["next"], plain, logs["accuracy"] = token_loss(logits, ids, label_smoothing=config.label_smoothing)
            logs["cross_entropy"] = plain.detach()
        for name, prediction in self.predictions(ids, generators).items():
            shown = ids.masked_fill(~prediction.shown, -1)
            logits = self.model.predict(shown, condition, sees=prediction.sees, keep=keep)
            errors = F.cross_entropy(logits.float().transpose(1, 2), ids.clamp(min=0), reduction="none")
            means[name] = mean_error(errors, prediction.asked)
            logs[f"cross_entropy_{name}"] = means[name].detach()
        return mixed_loss(means, config.weights), logs

    def predictions(self, ids: Tensor, generators: Sequence[torch.Generator]) -> dict[str, Prediction]:
        """What the active tasks other than the next token show and ask, of ids [B, N], -1 in the padding."""
        entities = torch.arange(ids.shape[1], device=ids.device)
        return draw_predictions(self.config, (ids >= 0).sum(1), entities, generators)


@dataclass(frozen=True, kw_only=True)
class MixedXARTaskConfig(XARTaskConfig):
    """As for every xAR."""

    weights: ObjectiveWeights = ObjectiveWeights()
    """Of the three tasks."""
    hidden_share: float = 0.4
    """Share of entities hidden in random prediction."""

    def __post_init__(self):
        super().__post_init__()
        _check_share(self.hidden_share)


class MixedXARTask(XARTask):
    """Mixed training of continuous tokens in any order; parts: tokenizer, tokenizer_reference and held_out as in GeneratorTask."""

    def __init__(self, model: XAR, config: MixedXARTaskConfig | None = None, **parts):
        super().__init__(model, config or MixedXARTaskConfig(), **parts)

    def forward(self, batch: TokenBatch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss; logs each task's squared error of the velocity."""
        model = self.model
        slots, condition, drawn = self.prepare(batch, generators)
        means = {}
        if "next" in self.config.weights.active():
            means["next"] = model.denoising_loss(slots, condition, context=self.config.context, **drawn).mean()
        entities = model.entities[model.prefix_length :]
        counts = torch.full((len(slots),), len(entities), device=slots.device)

        def velocity(noisy: Tensor, times: Tensor, sees: Tensor) -> Tensor:
            return model.predict(noisy, condition, times=times, sees=sees, keep=drawn["keep"])

        for name, prediction in draw_predictions(self.config, counts, entities, generators).items():
            errors = flow_errors(velocity, slots, prediction, noise=drawn["noise"], times=drawn["times"], entities=entities)
            means[name] = mean_error(errors, prediction.asked)
        return mixed_loss(means, self.config.weights), {f"error_{name}": mean.detach() for name, mean in means.items()}


@torch.compiler.disable
def draw_predictions(
    config: MixedTaskConfig | MixedXARTaskConfig, counts: Tensor, entities: Tensor, generators: Sequence[torch.Generator]
) -> dict[str, Prediction]:
    """What the active tasks other than the next token show and ask. counts: [B]. entities: [N], see `random_prediction`."""
    active, out = config.weights.active(), {}
    if "random" in active:
        uniforms = rng.rand((int(entities[-1]) + 1,), generators, device=entities.device)
        out["random"] = random_prediction(uniforms, counts, share=config.hidden_share, entities=entities)
    if "next_all" in active:
        out["next_all"] = next_all_prediction(rng.rand((), generators, device=entities.device), counts, entities=entities)
    return out
