"""What the numbers of a claims table say: a difference, its spread, and one of three words.

    d      = mean over seeds of (A - B)
    spread = sqrt(variance over seeds / number of seeds + test-set variance of A + test-set variance of B)
    holds            d - 2 spread > bar         d: how much better A is; bar: 0 for "beats", -margin for "is as good as"
    does not hold    d + 2 spread <= bar
    undecided        otherwise

With one seed the first term is unknown and left out, which the verdict says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this spread"


@dataclass(frozen=True)
class Judgement:
    """A difference and what it decides."""

    what: str
    difference: float
    spread: float
    bar: float
    num_seeds: int
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.difference - 2 * self.spread > self.bar:
            return HOLDS
        return FAILS if self.difference + 2 * self.spread <= self.bar else UNDECIDED

    def line(self) -> str:
        """One sentence with the numbers."""
        bar = "" if not self.bar else f", bar {self.bar:+g}"
        seeds = f"{self.num_seeds} seeds" if self.num_seeds > 1 else "1 seed, so the spread is that of the test set alone"
        return f"{self.what}: {self.difference:+.3g} ± {self.spread:.2g}{self.unit}{bar} ({seeds}): {self.verdict}"


def judge(
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    test_stds: tuple[float, float] = (0.0, 0.0),
    bar: float = 0.0,
    unit: str = "",
) -> Judgement:
    """Compare A with B, seed by seed; test_stds: deviation of each over test images."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{what}: both sides need the same seeds, got {len(ours)} and {len(theirs)}")
    differences = [a - b for a, b in zip(ours, theirs)]
    over_seeds = variance(differences) / len(differences) if len(differences) > 1 else 0.0
    spread = (over_seeds + test_stds[0] ** 2 + test_stds[1] ** 2) ** 0.5
    return Judgement(what, fmean(differences), spread, bar, len(differences), unit)


def all_of(parts: Sequence[Judgement]) -> str:
    """A claim of several parts holds where all hold, and fails where one does not hold."""
    verdicts = [part.verdict for part in parts]
    if FAILS in verdicts:
        return FAILS
    return HOLDS if set(verdicts) == {HOLDS} else UNDECIDED
