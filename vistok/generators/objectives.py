"""Random, next and next-all token prediction as one weighted loss: what each of them shows, who sees whom, and what counts.

Chen et al. 2024, "TokenUnify: Scalable Autoregressive Visual Pre-training with Mixture Token Prediction" (arXiv 2405.16847), section 3.

    random     L_r = mean over m in M of     error(x_m | x_n, n not in M)              M: a share of the entities, drawn
    next       L_n = mean over n of          error(x_n | x_0 ... x_n-1)
    next-all   L_a = mean over m >= n of     error(x_m | x_0 ... x_n-1)                n: drawn from 1 to E - 1
    loss       w_r L_r + w_n L_n + w_a L_a                                             each mean is over an image's own tokens first
    error      -log p(x) of ids; |velocity - (noise - x)|^2 of values                  (`flow_errors`)

What is not shown leaves a query in its place, which knows the place alone. In "random" every slot sees every slot. In "next-all" shown
slots see what "next" lets them see, so that keys and values of a prefix serve both, and a query sees the prefix and its own entity.
The functions here know no network: they make tables that a network reads (`GPT.predict`, `XAR.predict`), and average what it answers.
The released code does this to blocks of pixels with an unspecified order of tasks; here it is any order of any tokens, mixed every step.

B images, N slots (tokens in the sequence of an order), E entities, as in `order.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TASKS = ("random", "next", "next_all")


@dataclass(frozen=True)
class Prediction:
    """What one task shows of B images, and what it asks.

    shown: [B, N] bool, slots whose token goes in; a query stands in the others. sees: [B, N, N] bool, row n may look at column m; every
    slot sees itself. asked: [B, N] bool, slots whose error counts; padding is neither shown nor asked.
    """

    shown: Tensor
    sees: Tensor
    asked: Tensor


@dataclass(frozen=True, kw_only=True)
class ObjectiveWeights:
    """Weights of the three tasks in the loss; a task of weight 0 is not computed."""

    random: float = 1.0
    """w_r."""
    next: float = 1.0
    """w_n."""
    next_all: float = 1.0
    """w_a."""

    def __post_init__(self):
        values = [getattr(self, field.name) for field in fields(self)]
        if min(values) < 0 or sum(values) == 0:
            raise ValueError(f"weights of {', '.join(TASKS)} must be 0 or more and not all 0, got {values}")

    def active(self) -> dict[str, float]:
        """Tasks with a weight, in the order of TASKS."""
        return {name: getattr(self, name) for name in TASKS if getattr(self, name)}


def random_prediction(uniforms: Tensor, counts: Tensor, *, share: float, entities: Tensor | None = None) -> Prediction:
    """A share of each image's entities, at least one, is hidden and asked for.

    uniforms: [B, E] on [0, 1); the entities with the smallest are hidden. counts: [B] slots an image has, ending with an entity.
    share: of the entities, in (0, 1]. entities: [N] int64, rising, the entity of each slot; None: one slot an entity.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of hidden tokens must be in (0, 1], got {share}")
    B, E = uniforms.shape
    entities = torch.arange(E, device=uniforms.device) if entities is None else entities
    present, number = _present(counts, entities)
    rank = uniforms.masked_fill(torch.arange(E, device=uniforms.device) >= number[:, None], 2.0).argsort(1).argsort(1)
    hidden = rank < (share * number).ceil().clamp(min=1)[:, None]  # [B, E]
    asked = hidden[:, entities] & present
    return Prediction(present & ~asked, _with_itself(present[:, None].expand(-1, len(entities), -1)), asked)


def next_prediction(counts: Tensor, entities: Tensor) -> Prediction:
    """Everything is shown and asked; a slot sees its own entity and those before: the mask of a network that works in place.

    For a GPT this is its plain causal pass, whose row n - 1 predicts token n. counts: [B]. entities: [N], see `random_prediction`.
    """
    present, _ = _present(counts, entities)
    sees = (entities[:, None] >= entities) & present[:, None]
    return Prediction(present, _with_itself(sees), present)


def next_all_prediction(uniforms: Tensor, counts: Tensor, *, entities: Tensor | None = None, num_entities: int | None = None) -> Prediction:
    """From the first n entities all later ones at once; n is uniform on 1 ... E - 1 of those an image has (0 where it has one).

    uniforms: [B] on [0, 1). counts, entities: as in `random_prediction`; without entities, num_entities slots of one each.
    """
    if (entities is None) == (num_entities is None):
        raise ValueError("give entities or num_entities, one of both")
    entities = torch.arange(num_entities, device=uniforms.device) if entities is None else entities
    present, number = _present(counts, entities)
    n = torch.where(number > 1, 1 + (uniforms.double() * (number - 1)).long().clamp(max=number - 2), 0)[:, None]
    asked = present & (entities >= n)
    shown = present & ~asked
    # a slot sees the shown ones up to its own entity, and a query its own entity besides
    up_to_own = entities[:, None] >= entities
    own = entities[:, None] == entities
    sees = (up_to_own & shown[:, None]) | (own & present[:, None])
    return Prediction(shown, _with_itself(sees), asked)


def flow_errors(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    slots: Tensor,
    prediction: Prediction,
    *,
    noise: Tensor,
    times: Tensor,
    entities: Tensor,
) -> Tensor:
    """Errors [B, N] of continuous tokens: what is shown is clean, what is asked stands at its own time, a query that knows a little.

    velocity: of noisy slots [B, N, C], times [B, E] and `prediction.sees`, [B, N, C]. slots, noise: [B, N, C]. times: [B, E] in [0, 1] of
    the entities that are asked. entities: [N], see `random_prediction`. With `next_prediction` this is noisy context learning.
    """
    first = torch.searchsorted(entities.contiguous(), torch.arange(times.shape[1], device=entities.device))
    times = times * prediction.asked[:, first]
    t = times[:, entities, None].to(slots.dtype)
    made = velocity((1 - t) * slots + t * noise, times, prediction.sees)
    return (made - (noise - slots)).square().mean(-1)


def mean_error(errors: Tensor, asked: Tensor) -> Tensor:
    """Mean over images of the mean over what each was asked: errors [B, N] -> scalar. An image that was asked nothing counts as 0."""
    weights = asked / (asked.sum(1, keepdim=True).clamp(min=1) * len(asked))
    return (errors * weights).sum()


def mixed_loss(means: dict[str, Tensor], weights: ObjectiveWeights) -> Tensor:
    """The weighted sum of the active tasks' means. Raises KeyError: the mean of an active task is not there."""
    parts = [means[name] if weight == 1 else weight * means[name] for name, weight in weights.active().items()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _present(counts: Tensor, entities: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] bool, slots that the images have, and [B] their numbers of entities."""
    slots = torch.arange(len(entities), device=entities.device)
    counts = counts.to(entities.device)
    return slots < counts[:, None], entities[(counts - 1).clamp(min=0)] + 1


def _with_itself(sees: Tensor) -> Tensor:
    """The same with a diagonal: also a slot of the padding sees something, or its row would be empty."""
    return sees | torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device)
