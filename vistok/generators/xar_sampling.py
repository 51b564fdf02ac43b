"""Sampling of xAR: entity after entity out of noise, those before it clean at t = 0 (Ren et al. 2025, arXiv 2502.20388, section 3.3).

    x_e ~ noise;   for t from 1 to 0:  v = u + s_e (c - u),  c, u = network(y_0 .. y_e-1, x_e at t; class or null);   step x_e
    y_e = x_e at t = 0;   ours, where context_time r > 0:  y_e = (1 - r) x_e + r noise at t = r, as noisy context learning has seen it

What the steps share is done once: modulations for each (class, time); keys and values of finished entities, which enter the cache with
the first step of the entity behind them; and the unconditional half runs only where its velocity, or later its context, is needed.

B images, n slots of an entity, S all slots, C channels, D width.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import rng
from vistok.flow.guidance import classifier_free
from vistok.flow.solvers import euler, euler_maruyama
from vistok.generators.condition import NULL, Condition
from vistok.tokens import VisualTokens

if TYPE_CHECKING:
    from vistok.generators.xar import XAR

TIMES = 1000  # distinct times that are embedded


@dataclass(frozen=True, kw_only=True)
class FlowSampling:
    """How each entity is drawn out of noise."""

    num_steps: int = 40
    """Steps of the first entity."""
    final_steps: int | None = None
    """Steps of the last entity, linear in between: later entities need fewer (DiSA, arXiv 2505.20297: 50 to 15). None: as the first."""
    solver: Literal["euler", "euler_maruyama"] = "euler_maruyama"
    """The ordinary differential equation, or the stochastic process of the same marginals, which xAR's figures are of."""
    context_time: float | None = None
    """Time at which finished entities are shown to those behind them, with that much noise; None: the model's, 0 is clean."""
    last_time: float = 0.04
    """Time at which the stochastic process ends; one step without noise leads from there to 0."""

    def __post_init__(self):
        if self.solver not in ("euler", "euler_maruyama"):
            raise ValueError(f"solver={self.solver!r}; allowed: euler, euler_maruyama")
        if self.num_steps < 1 or (self.final_steps is not None and self.final_steps < 1):
            raise ValueError(f"num_steps={self.num_steps} and final_steps={self.final_steps} must be at least 1")
        if self.context_time is not None and not 0 <= self.context_time < 1:
            raise ValueError(f"context_time={self.context_time} must be at least 0 and below 1")
        if not 0 < self.last_time < 1:
            raise ValueError(f"last_time={self.last_time} must be between 0 and 1")

    def steps(self, entity: int, num_entities: int) -> int:
        """Steps of an entity."""
        if self.final_steps is None or num_entities == 1:
            return self.num_steps
        last = num_entities - 1
        return int((last - entity) / last * (self.num_steps - self.final_steps) + self.final_steps)

    def times(self, num_steps: int) -> Tensor:
        """[num_steps + 1] float64 from 1 to 0, on the CPU: not every device has float64."""
        if self.solver == "euler":
            return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
        return F.pad(torch.linspace(1, self.last_time, num_steps, dtype=torch.float64, device="cpu"), (0, 1))


def time_index(times: Tensor) -> Tensor:
    """The whole number in [0, 1000] that is embedded for a time."""
    # truncated in float32, not rounded: the weights were trained so, and rounding changes 18 of 40 steps
    return (times.float() * TIMES).long()


@dataclass
class Sampler:
    """One sampling run: what `XAR.sample` was asked for, and the state between entities."""

    model: "XAR"
    condition: Condition
    generators: Sequence[torch.Generator] | None
    noise: Callable[[int, int], Tensor] | None
    sampling: FlowSampling
    guidance_scale: float | Callable[[int], float]
    prefix: Tensor | None = None
    num_slots: int | None = None
    snap: Callable[[Tensor], Tensor] | None = None
    num_rows: int = field(default=0, init=False)
    """Network rows computed so far: rows of a call times its calls."""

    def __post_init__(self):
        order, B = self.model.order, len(self.condition.labels)
        if (self.generators is None) == (self.noise is None):
            raise ValueError("give generators, one an image, or noise, not both and not neither")
        if self.generators is not None and len(self.generators) != B:
            raise ValueError(f"{len(self.generators)} generators for {B} images")
        ask = self.guidance_scale if callable(self.guidance_scale) else self.model.guidance_schedule(self.guidance_scale)
        self.scales = [float(ask(entity)) for entity in range(order.num_entities)]
        if not all(1 <= scale < float("inf") for scale in self.scales):
            raise ValueError(f"guidance_scale must be at least 1 everywhere, got {min(self.scales)} to {max(self.scales)}")
        self.slots = torch.zeros(B, order.num_slots, self.model.code_dim, device=self.model.device)
        asked = self.sampling.context_time
        self.context_time = self.model.settings.context_time if asked is None else asked
        self.context = self.slots.clone() if self.context_time else self.slots  # what later entities are shown
        self.first = 0
        if self.prefix is not None:
            if self.prefix.ndim != 3 or self.prefix.shape[::2] != self.slots.shape[::2]:
                raise ValueError(f"prefix must be [{B}, n, {self.model.code_dim}], got {tuple(self.prefix.shape)}")
            self.first = order.entities_within(self.prefix.shape[1])
            self.slots[:, : self.prefix.shape[1]] = self.model.normalise(self.prefix.to(self.slots))
        self.last = order.num_entities
        if self.num_slots not in (None, order.num_slots):
            if not order.is_sequential:
                raise ValueError(f"num_slots={self.num_slots}, but this order does not run in a sequence: it makes all {order.num_slots}")
            self.last = order.entities_within(self.num_slots)
        if self.first > self.last or not self.last:
            raise ValueError(f"num_slots={self.num_slots} but the prefix holds {order.ends[self.first - 1] if self.first else 0}")
        self.times = [self.sampling.times(self.sampling.steps(entity, order.num_entities)) for entity in range(order.num_entities)]
        self._modulate()

    def _modulate(self) -> None:
        """Modulations once for each class and time of the run."""
        labels, self.row = self.condition.labels.unique(return_inverse=True)
        is_guided = max(self.scales) > 1
        if is_guided:  # the null class, for the second half of the rows
            self.row = torch.cat([self.row, torch.full_like(self.row, len(labels))])
            labels = F.pad(labels, (0, 1), value=NULL)
        self.context_index = int(time_index(torch.tensor(self.context_time, device="cpu")))
        fixed = torch.tensor([0, self.context_index], device="cpu")  # of the caption, and of finished entities
        numbers = torch.cat([fixed, *(time_index(times[:-1]) for times in self.times)]).unique()
        indices = numbers.to(labels.device).expand(len(labels), -1)
        self.column = {number: place for place, number in enumerate(numbers.tolist())}
        self.tables = self.model.modulations(indices, labels)  # of each block, [classes, times, 6, D]
        self.cache = self.model.new_cache(len(self.row))
        self.caption = None
        if self.model.captions is not None:
            self.caption = self.model.captions(self.condition.and_null() if is_guided else self.condition, len(self.row))

    def run(self, on_step: Callable[[int, Tensor], None] | None) -> VisualTokens:
        order = self.model.order
        for entity, times in enumerate(self.times[: self.last]):
            draw = partial(self._draw, entity)
            if entity < self.first:
                if self.generators is not None:  # drawn all the same, so that what follows is as in an unbroken run
                    for number in range(self._num_draws(times)):
                        draw(number)
                self._show(entity, draw)
                continue
            velocity = partial(self._velocity, entity)
            if self.sampling.solver == "euler":
                x = euler(velocity, draw(0), times)
            else:
                x = euler_maruyama(velocity, draw(0), times, lambda step, draw=draw: draw(step + 1))
            if self.snap is not None and (not order.is_pyramid or entity + 1 == order.num_entities):  # averages of codes are no codes
                x = self.model.normalise(self.snap(self.model.denormalise(x)))
            self.slots[:, order.entity(entity)] = x
            self._show(entity, draw)
            if on_step is not None:
                on_step(entity, self.model.denormalise(self.slots[:, : order.ends[entity]]))
        values = self.model.denormalise(self.slots)
        if self.last < order.num_entities:
            values = values[:, : order.ends[self.last - 1]]
            return VisualTokens.from_values(values, order.layout)
        return VisualTokens.from_values(order.unpack(values), order.layout)

    def _show(self, entity: int, draw: Callable[[int], Tensor]) -> None:
        """Put a finished entity where later ones see it."""
        if self.context_time and entity + 1 < self.model.order.num_entities:
            where, t = self.model.order.entity(entity), self.context_time
            self.context[:, where] = (1 - t) * self.slots[:, where] + t * draw(self._num_draws(self.times[entity]))

    def _num_draws(self, times: Tensor) -> int:
        return 1 if self.sampling.solver == "euler" else len(times) - 1

    def _draw(self, entity: int, number: int) -> Tensor:
        if self.noise is not None:
            return self.noise(entity, number).to(self.slots)
        shape = (self.model.order.lengths[entity], self.model.code_dim)
        return rng.randn(shape, self.generators, device=self.slots.device).to(self.slots.dtype)

    def _velocity(self, entity: int, x: Tensor, step: int) -> Tensor:
        """Guided velocity of an entity [B, n, C] at a step; entities that are finished but not in the cache yet enter it on the way."""
        order, cache, B, P = self.model.order, self.cache, len(x), self.model.prefix_length
        is_guided = self.scales[entity] > 1
        known, begin = max(cache.length - P, 0), order.entity(entity).start
        fresh, is_first = entity - order.entities_within(known), P > cache.length
        # unconditional rows run where guidance needs their velocity now, or will need their context later
        both = is_guided or ((fresh or is_first) and any(scale > 1 for scale in self.scales[entity : self.last]))
        halves = 2 if both else 1
        slots = torch.cat([self.context[:, known:begin], x], dim=1).repeat(halves, 1, 1).to(self.model.out.weight.dtype)
        number = int(time_index(self.times[entity][step]))
        shown = [self.column[0]] * is_first + [self.column[self.context_index]] * fresh
        columns = torch.tensor([*shown, self.column[number]], device=x.device)
        rows = self.row[: halves * B, None]
        view = cache
        if len(rows) < cache.batch_size:
            view = copy.copy(cache)
            view.keep_rows(len(rows))
        prefix = self.caption[: len(rows)] if is_first else None
        v = self.model.run(slots, [table[rows, columns] for table in self.tables], prefix=prefix, cache=view)
        v = v[:, begin - known :].to(x.dtype)
        self.num_rows += len(rows)
        cache.advance(begin - known + (P if is_first else 0))
        return classifier_free(v[:B], v[B:], self.scales[entity]) if is_guided else v[:B]
