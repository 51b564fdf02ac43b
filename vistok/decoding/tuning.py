"""How many tokens to draft, as a chain or a tree, found out while drafting; and when plain decoding would be quicker.

    t0      seconds of a pass over the root alone: what the plain loop pays for a token     measured once a model and device (`CostTable`)
    v(n)    seconds of a pass over n tokens                                                  the same
    a(d,k)  chance that the draft of rank k among its siblings, at depth d, is accepted         counted
    E(m)    tokens a step gives: 1 + the sum over the nodes of draft m of the product of a(d, k) on the way to it; counted where m was run
    t(m)    seconds of a step, drafter included: timed where m was run; of a chain shorter than one that was, in proportion;
            of a tree that was not, v(m + 1) and what chains cost besides v
    choose  m with the largest E(m) / t(m); none where that is below 1 / t0: t(m) / t0 is the break-even

A tree that was never run is tried where it looks better than all that were, with a(0, 0) of what is left for a rank that was never seen;
then it is known. On a GPU, where v is flat, trees win; on a CPU, where v grows with n, chains, and no tree is ever tried.

The account of what drafting has cost so far, steps and measurements less t0 a token of the slowest image, may not rise above 4 % of the
call's plain time: v is only measured where the account covers it, else in a later call, and drafting ends for the rest of the call where a
step that gains nothing would take the account there. t is the lower quartile of the steps so far, since other work on the machine only
ever makes a step longer; on a CPU the clock counts this thread's own time for the same reason.
Where drafting lost, the calls that follow do not try: 4 of them, then 16, then 64 after each further loss in a row (`Memory`).
"""

import time
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vistok.decoding.growth import Growth
from vistok.decoding.trees import TreeTemplate

_PROBE, _AGAIN = 6, 16  # steps before the first choice and after each change, and between choices that change nothing
_ENOUGH = 24  # steps of an image before a choice may end drafting
_MOST_LOST = 0.04
_CLEARLY = 1.1  # how much better another draft must look: a window that is shorter also has less time to settle
_PATIENCE, _MOST_PATIENCE = 4, 64  # calls without a try after the first loss, each further one, at most
_MOST_TIMES = 64  # of the latest steps, that a quartile is taken of
_tables: WeakKeyDictionary[torch.nn.Module, dict[tuple, "CostTable"]] = WeakKeyDictionary()
_memories: WeakKeyDictionary[torch.nn.Module, dict[tuple, "Memory"]] = WeakKeyDictionary()


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds, as `t` wants them counted on that device."""
    is_fine = time.get_clock_info("thread_time").resolution <= 1e-4
    return time.thread_time if device.type == "cpu" and is_fine else time.perf_counter


class CostTable:
    """v: seconds of a pass over n tokens an image, of one model on one device. known: n -> seconds, 1 among them."""

    def __init__(self, known: Mapping[int, float] | None = None):
        self.known = dict(known or {})

    def __contains__(self, n: int) -> bool:
        return n in self.known

    def __getitem__(self, n: int) -> float:
        """v(n); where it was not measured, no less than of fewer tokens, and else in proportion to the nearest larger or smaller n."""
        if n in self.known:
            return self.known[n]
        below, above = max((m for m in self.known if m < n), default=None), min((m for m in self.known if m > n), default=None)
        if above is None:
            return self.known[below] * n / below
        if below is None:
            return self.known[above]
        share = (n - below) / (above - below)
        return self.known[below] + share * max(self.known[above] - self.known[below], 0.0)

    def measure(self, n: int, clock: Callable[[], float], one_pass: Callable[[int], None], *, repeats: int = 1) -> float:
        """Measure v(n), once for all; seconds that took. one_pass: runs and waits for a pass over n tokens."""
        times = []
        for _ in range(repeats if n not in self.known else 0):
            began = clock()
            one_pass(n)
            times.append(clock() - began)
        if times:
            self.known[n] = min(times)
        return sum(times)


def cost_table(model: torch.nn.Module, num_rows: int) -> CostTable:
    """The table of a model with that many rows, on its device and with these threads; empty at first."""
    key = (num_rows, str(next(model.parameters()).device), torch.get_num_threads())
    return _tables.setdefault(model, {}).setdefault(key, CostTable())


class Memory:
    """What calls with one model, drafter and device have found of drafting: whether the next one should try it, and with which draft."""

    def __init__(self):
        self._losses = self._waits = 0
        self.break_even: float | None = None
        self.decision = ""
        self.seen: Seen | None = None
        self.best: int | None = None

    def should_try(self) -> bool:
        """Whether this call drafts; asked once a call."""
        self._waits -= 1
        return self._waits < 0

    def learn(self, pace: "Pace") -> None:
        """How a call that tried has ended."""
        self.break_even, self.seen = pace.break_even, pace.seen
        self.best = pace.budget or None
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


class Seen:
    """Steps so far, by draft: how long they took, and how often each node was visited."""

    def __init__(self, plans: Mapping[int, TreeTemplate | None]):
        self.plans = plans
        self._times: dict[int, list[float]] = {m: [] for m in plans}
        self._visits: dict[int, Tensor] = {}
        self._steps = dict.fromkeys(plans, 0)

    def note(self, m: int, seconds: float, path: Tensor, emitted: Tensor) -> None:
        """A step with draft m. path, emitted: as in its `Verdict`; nothing here waits for the device."""
        self._steps[m] += 1
        self._times[m] = [*self._times[m][1 - _MOST_TIMES :], seconds]
        if m not in self._visits:
            self._visits[m] = torch.zeros(m + 1, device=path.device)
        counted = (path >= 0) & (emitted > 0)[:, None]
        self._visits[m].index_add_(0, path.clamp(min=0).flatten(), counted.flatten().float())

    def seconds(self, m: int) -> float | None:
        """The lower quartile of the latest steps; None where there were none."""
        times = sorted(self._times[m])
        return times[len(times) // 4] if times else None

    def num_steps(self) -> float:
        """Steps of all images and drafts."""
        return sum(float(found[0]) for found in self._visits.values())

    def tokens(self) -> dict[int, float]:
        """E of every draft, with what was counted until now."""
        visits = {m: found.tolist() for m, found in self._visits.items()}
        chances = self._chances(visits)
        is_counted = {m: found[0] > 0 and (self._steps[m] >= _PROBE or self.plans[m] is None) for m, found in visits.items()}
        known = {m: sum(found) / found[0] for m, found in visits.items() if is_counted[m]}
        return known | {m: _expected(t, chances) for m, t in self.plans.items() if t is not None and m not in known}

    def _chances(self, visits: dict[int, list[float]]) -> Callable[[int, int], float]:
        """a(d, k). Rank 0 is counted by depth, later ranks over all depths."""
        hits, tested = {}, {}
        for m, found in visits.items():
            template = self.plans[m]
            for node in range(1, m + 1) if template is not None else ():
                parent, rank = template.parents[node], template.ranks[node]
                where = (template.levels[node] - 1, 0) if rank == 0 else (None, rank)
                hits[where] = hits.get(where, 0.0) + found[node]
                tested[where] = tested.get(where, 0.0) + found[parent]

        def first(depth: int) -> float:
            while depth > 0 and not tested.get((depth, 0)):  # as deep as any draft came
                depth -= 1
            return hits.get((depth, 0), 0.0) / max(tested.get((depth, 0), 0.0), 1.0)

        later: list[float] = []  # of ranks 1, 2, ...: counted, or the first one's chance of what those before have left

        def chance(depth: int, rank: int) -> float:
            while len(later) < rank:
                k = len(later) + 1
                counted = tested.get((None, k))
                left = 1.0 - first(0) - sum(later)
                later.append(hits[(None, k)] / counted if counted else max(left, 0.0) * first(0))
            return first(depth) if rank == 0 else later[rank - 1]

        return chance


def _expected(template: TreeTemplate, chance: Callable[[int, int], float]) -> float:
    """E of a draft: every node counts by the chance that it is reached."""
    reached = [1.0]
    for node in range(1, len(template.parents)):
        reached.append(reached[template.parents[node]] * chance(template.levels[node] - 1, template.ranks[node]))
    return sum(reached)


class Pace:
    """The draft of each step of a call, by its number of tokens: `budget`; 0 where it is plain from now on."""

    def __init__(
        self,
        plans: Mapping[int, TreeTemplate | None],
        num_tokens: int,
        costs: CostTable,
        *,
        start: int | None = None,
        only_shorter: bool = False,
        seen: Seen | None = None,
        measure: Callable[[int], float] | None = None,
    ):
        """plans: the drafts there are by their number of tokens; None for one whose shape is not known beforehand. num_tokens: N.

        start: the first one; the largest by default. only_shorter: a draft that was cut never grows again. seen: of earlier calls with such
        plans. measure: puts v(n) into `costs` and returns the seconds that took; without it what is not in the table is never tried.
        """
        self.plans, self.seen = plans, seen or Seen(plans)
        self.budget = max(plans) if start is None else start
        self._only_shorter = only_shorter
        self._num_tokens, self._costs, self._t0, self._measure = num_tokens, costs, costs[1], measure
        self._steps = 0
        self._spent = 0.0
        self._last: int | None = None
        self._next_choice = _PROBE
        self.decision = "too few steps to choose"

    @property
    def break_even(self) -> float | None:
        """Tokens a step must give with the draft that was run last; None before a step was timed."""
        return self._cost(self._last) / self._t0 if self._last else None

    def note(self, seconds: float, progress: int, path: Tensor, emitted: Tensor) -> None:
        """A step took so long. progress: tokens of the slowest image since drafting began. path, emitted: of its verdict."""
        self._steps += 1
        self._last = self.budget
        self.seen.note(self.budget, seconds, path, emitted)
        cost = self._cost(self.budget)
        self._spent += cost
        if self._lost(progress) + cost - self._t0 > self._allowed:
            self._retreat()
        elif self._steps >= self._next_choice:
            self._choose(progress)

    @property
    def _allowed(self) -> float:
        return _MOST_LOST * self._t0 * self._num_tokens

    def _lost(self, progress: int) -> float:
        return self._spent - self._t0 * progress

    def _cost(self, m: int) -> float:
        """t(m)."""
        known = self.seen.seconds(m)
        if known is not None:
            return max(known, self._t0)
        run = {n: self.seen.seconds(n) for n in self.plans if self.seen.seconds(n) is not None}
        longer = min((n for n in run if n > m and self._is_chain(n)), default=None)
        if longer is not None:
            return self._t0 + max(run[longer] - self._t0, 0.0) * m / longer
        besides = min(max(t - self._costs[n + 1], 0.0) for n, t in run.items())
        return self._costs[m + 1] + besides

    def _is_chain(self, m: int) -> bool:
        template = self.plans[m]
        return template is not None and template.levels[-1] == m

    def _choose(self, progress: int) -> None:
        E = self.seen.tokens()
        gains = {m: E[m] * self._t0 / self._cost(m) for m in self._candidates(E, progress) if m in E}
        best, now = max(gains, key=gains.get), gains.get(self.budget, 0.0)
        changes = best != self.budget and gains[best] >= _CLEARLY * now
        if not changes:
            best = self.budget
        if gains[best] < 1 and self.seen.num_steps() >= _ENOUGH:  # until then the account alone ends it
            self._stop()
            return
        self._take(best, E[best], _PROBE if changes else _AGAIN)

    def _candidates(self, E: Mapping[int, float], progress: int) -> list[int]:
        """Drafts to choose among. A tree that was never run is one where v was measured; that is done here, smaller trees first."""
        found = []
        for m in sorted(m for m in self.plans if m <= self.budget or not self._only_shorter):
            is_known = self.seen.seconds(m) is not None
            if is_known or self._is_chain(m) or m + 1 in self._costs:
                found.append(m)
                continue
            best = max(E[self.budget] * self._t0 / self._cost(self.budget), 1.0)
            could_pay = E[m] * self._t0 > best * self._costs[max(self._costs.known)]
            if self._measure is None or not could_pay or self._lost(progress) + self._costs[m + 1] > self._allowed:
                break  # larger ones cost more
            self._spent += self._measure(m + 1)
            found.append(m)
        return found

    def _retreat(self) -> None:
        """The account is empty: go back to a draft that was seen to gain, or end drafting."""
        E = self.seen.tokens()
        run = [m for m in E if m != self.budget and self.seen.seconds(m) is not None and not self._only_shorter]
        gains = {m: E[m] * self._t0 / self._cost(m) for m in run}
        best = max(gains, key=gains.get, default=None)
        if best is None or gains[best] <= 1:
            self._stop()
        else:
            self._take(best, E[best], _PROBE)

    def _take(self, m: int, expected: float, steps: int) -> None:
        self.budget, self._next_choice = m, self._steps + steps
        kind = f"a chain of {m}" if self._is_chain(m) else f"a tree of {m}"
        self.decision = f"drafts {kind}: {expected:.2f} tokens a step for the time of {self._cost(m) / self._t0:.2f}"

    def _stop(self) -> None:
        E = self.seen.tokens().get(self._last, 1.0)
        self.decision = f"plain decoding after {self._steps} steps: {E:.2f} tokens a step, {self.break_even:.2f} would break even"
        self.budget = 0
