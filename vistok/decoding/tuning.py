"""How many tokens to draft, found out while drafting; and when to stop drafting because the plain loop would be quicker.

    t0      seconds of a pass over the root alone: what the plain loop pays for a token; measured once a model, device and number of rows
    t(m)    seconds of a step with m draft tokens, drafter included: t0 + (t(M) - t0) m / M between the two that are measured
    E(m)    tokens a step gives: 1 + sum_{d <= m} P(d draft tokens or more are accepted)
    choose  m with the largest E(m) / t(m); none where that is below 1 / t0: t(m) / t0 is the break-even

The account of what drafting has cost so far, steps t(m) - t0 tokens of the slowest image, may not rise above 4 % of the call's plain time:
drafting ends for the rest of the call where a step that gains nothing would take it there. t is the lower quartile of the steps so far,
since other work on the machine only ever makes a step longer; on a CPU the clock counts this thread's own time for the same reason.
Where drafting lost, the calls that follow do not try: 4 of them, then 16, then 64 after each further loss in a row (`Memory`).
"""

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vistok.decoding.growth import Growth

_PROBE, _AGAIN = 6, 16  # steps before the first choice, and between choices
_MOST_LOST = 0.04
_CLEARLY = 1.1  # how much better a shorter draft must look: a window that is shorter also has less time to settle
_PATIENCE, _MOST_PATIENCE = 4, 64  # calls without a try after the first loss, each further one, at most
_plain_seconds: WeakKeyDictionary[torch.nn.Module, dict[tuple, float]] = WeakKeyDictionary()
_memories: WeakKeyDictionary[torch.nn.Module, dict[tuple, "Memory"]] = WeakKeyDictionary()


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds, as `t` wants them counted on that device."""
    is_fine = time.get_clock_info("thread_time").resolution <= 1e-4
    return time.thread_time if device.type == "cpu" and is_fine else time.perf_counter


def plain_seconds(model: torch.nn.Module, num_rows: int, clock: Callable[[], float], one_pass: Callable[[], None]) -> float:
    """t0 of a model with that many rows; `one_pass` runs and waits for a pass over the roots. Measured in the first call only."""
    known = _plain_seconds.setdefault(model, {})
    key = (num_rows, str(next(model.parameters()).device), torch.get_num_threads())
    if key not in known:
        times = []
        for _ in range(3):
            began = clock()
            one_pass()
            times.append(clock() - began)
        known[key] = min(times)
    return known[key]


class Memory:
    """What calls with one model, drafter and device have found of drafting: whether the next one should try it."""

    def __init__(self):
        self._losses = self._waits = 0
        self.break_even: float | None = None
        self.decision = ""

    def should_try(self) -> bool:
        """Whether this call drafts; asked once a call."""
        self._waits -= 1
        return self._waits < 0

    def learn(self, pace: "Pace") -> None:
        """How a call that tried has ended."""
        self.break_even = pace.break_even
        self._losses = 0 if pace.budget else self._losses + 1
        self._waits = min(_PATIENCE**self._losses, _MOST_PATIENCE) if self._losses else 0
        self.decision = f"plain decoding from the start, as an earlier call found: {pace.decision}"


def memory_of(model: torch.nn.Module, drafter, settings: tuple) -> Memory:
    """The memory of calls on this model and device with these settings and such a drafter: of this class, options and weights."""
    options = []
    for name, value in vars(drafter).items():
        if isinstance(value, torch.nn.Module):
            options.append((name, float(list(value.parameters())[-1].detach().double().sum())))
        elif isinstance(value, int | str | Growth):
            options.append((name, value))
    key = (type(drafter).__name__, *options, settings, str(next(model.parameters()).device), torch.get_num_threads())
    return _memories.setdefault(model, {}).setdefault(key, Memory())


class Pace:
    """The number of draft tokens of each step of a call."""

    def __init__(self, most: int, num_tokens: int, t0: float, *, can_shorten: bool):
        """most: M. num_tokens: N. can_shorten: whether a draft may have fewer than M tokens; a tree has all or none."""
        self.budget, self._most, self._num_tokens, self._t0, self._can_shorten = most, most, num_tokens, t0, can_shorten
        self._steps = 0
        self._spent = 0.0
        self._times: list[float] = []
        self._next_choice = _PROBE
        self.decision = "too few steps to choose"

    @property
    def break_even(self) -> float | None:
        """Tokens a step must give where M are drafted; None before a step was timed."""
        return self._cost(self._most) / self._t0 if self._times else None

    def note(self, seconds: float, progress: int, accepted: Callable[[], Tensor]) -> None:
        """A step took so long. progress: tokens of the slowest image since drafting began. accepted: counts of 0, 1, 2, ... accepted."""
        self._steps += 1
        if self.budget == self._most:
            self._times.append(seconds)
        cost = self._cost(self.budget)
        self._spent += cost
        lost = self._spent - self._t0 * progress
        if lost + cost - self._t0 > _MOST_LOST * self._t0 * self._num_tokens:
            self._stop(accepted)
        elif self._steps == self._next_choice:
            self._next_choice += _AGAIN
            self._choose(accepted)

    def _cost(self, m: int) -> float:
        full = sorted(self._times)[len(self._times) // 4]
        return self._t0 + max(full - self._t0, 0.0) * m / self._most

    def _yields(self, counts: Tensor) -> list[float]:
        """E(0), E(1), ..., as far as it was seen."""
        reached = counts.double().flip(0).cumsum(0).flip(0)
        chance = reached / reached[0].clamp(min=1)
        return [1.0, *(1.0 + chance[1:].cumsum(0)).tolist()]

    def _choose(self, accepted: Callable[[], Tensor]) -> None:
        E = self._yields(accepted())
        # what is drafted no longer is not measured any more, so a choice only ever shortens
        lengths = range(1, self.budget + 1) if self._can_shorten else (self.budget,)
        gains = {m: E[min(m, len(E) - 1)] * self._t0 / self._cost(m) for m in lengths}
        best = max(gains, key=gains.get)
        if gains[best] < _CLEARLY * gains[self.budget]:
            best = self.budget
        gain = gains[best]
        if gain < 1:
            self._stop(accepted)
            return
        self.budget = best
        self.decision = f"drafts {best} a step: {E[min(best, len(E) - 1)]:.2f} tokens for the time of {self._cost(best) / self._t0:.2f}"

    def _stop(self, accepted: Callable[[], Tensor]) -> None:
        E = self._yields(accepted())[min(self.budget, len(accepted()) - 1)]
        self.decision = f"plain decoding after {self._steps} steps: {E:.2f} tokens a step, {self.break_even:.2f} would break even"
        self.budget = 0
