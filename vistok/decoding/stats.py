"""What a speculative call cost and what it got for it.

accepted_per_step = tokens / (passes of an image)            tokens that one pass of the target gives to an image, drafts and the one after
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.generate import GenerationStats
from vistok.decoding.walk import Verdict


@dataclass(frozen=True)
class SpeculationStats(GenerationStats):
    """Stats of several batches add up. target_passes counts passes of the whole batch, image_passes what each image took part in."""

    drafter: str = "none"
    rule: str = "none"
    image_passes: int = 0
    """Passes that images took part in before they were finished, over all images; the one that reads the condition is not among them."""
    accepted: tuple[int, ...] = ()
    """How many of those passes accepted 0, 1, 2, ... draft tokens; what overshoots the image is not counted."""
    drafter_seconds: float = 0.0
    """Host time of drafting, part of seconds."""
    total_variation_spent: float | None = 0.0
    """Sum over all tokens of the total variation between the law they were drawn from and the target's; 0 for exact rules, None where the
    rule does not know."""
    break_even: float | None = None
    """Tokens a pass and image from which on drafting is quicker than the plain loop here; None where nothing was measured."""
    decision: str = ""
    """Why this many tokens were drafted, where that was left open."""

    @classmethod
    def of_plain(cls, cost: GenerationStats, *, drafter, rule, memory) -> "SpeculationStats":
        """Of a call that did not draft, because of what the memory says; plain decoding loses nothing, whatever the rule."""
        passes = cost.num_tokens - cost.num_images
        return cls(
            cost.num_images, cost.num_tokens, cost.target_passes, cost.seconds, drafter=drafter.name, rule=str(rule), image_passes=passes,
            accepted=(passes,), break_even=memory.break_even, decision=memory.decision,
        )  # fmt: skip

    @property
    def accepted_per_step(self) -> float:
        """Mean tokens that a pass gave to an image."""
        return (self.num_tokens - self.num_images) / max(self.image_passes, 1) if self.image_passes else 1.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Of the passes that accepted d draft tokens or more, the fraction that accepted the next one."""
        reached = [sum(self.accepted[depth:]) for depth in range(len(self.accepted))]
        return tuple(after / before if before else 0.0 for before, after in zip(reached, reached[1:]))

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{self.drafter}, {self.rule}: {self.accepted_per_step:.2f} tokens a pass"]
        if self.decision:
            parts.append(self.decision)
        if self.total_variation_spent is None:
            parts.append("what it cost in total variation is not known")
        elif self.total_variation_spent:
            parts.append(f"total variation spent a token: {self.total_variation_spent / max(self.num_tokens, 1):.4f}")
        return "; ".join(parts)

    def __add__(self, other: "SpeculationStats") -> "SpeculationStats":
        longest = max(len(self.accepted), len(other.accepted))
        pad = [part.accepted + (0,) * (longest - len(part.accepted)) for part in (self, other)]
        spent = (self.total_variation_spent, other.total_variation_spent)
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(GenerationStats)}
        return replace(
            self,
            **added,
            image_passes=self.image_passes + other.image_passes,
            accepted=tuple(a + b for a, b in zip(*pad)),
            drafter_seconds=self.drafter_seconds + other.drafter_seconds,
            total_variation_spent=None if None in spent else sum(spent),
        )


class Tally:
    """Counts of a call while it runs, on its device, so that counting waits for nothing."""

    def __init__(self, num_images: int, depth: int, *, device):
        self.num_images, self.drafter_seconds, self._passes = num_images, 0.0, 0
        self._accepted = torch.zeros(depth + 1, dtype=torch.int64, device=device)
        self._spent = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, draft: Draft, verdict: Verdict) -> None:
        """Count one pass."""
        self._passes += 1
        counted: Tensor = (verdict.emitted > 0).long()
        self._accepted.index_add_(0, (verdict.emitted - 1).clamp(min=0).clamp(max=draft.shape.depth), counted)
        self._spent += verdict.spent.sum()

    def add_plain(self, active: Tensor) -> None:
        """Count one pass over the roots alone. active: [B] bool, images it gave a token."""
        self._passes += 1
        self._accepted[0] += active.sum()

    def accepted(self) -> Tensor:
        """Counts of passes that accepted 0, 1, 2, ... draft tokens, on the CPU."""
        return self._accepted.cpu()

    def stats(self, *, num_tokens: int, seconds: float, drafter, rule, pace) -> SpeculationStats:
        """The numbers of the call. The pass over the condition counts as a target pass."""
        accepted = self._accepted.tolist()
        while len(accepted) > 1 and not accepted[-1]:
            accepted.pop()
        spent = 0.0 if rule.exact else float(self._spent) or None
        return SpeculationStats(
            self.num_images, num_tokens, 1 + self._passes, seconds, drafter=drafter.name, rule=str(rule), image_passes=sum(accepted),
            accepted=tuple(accepted), drafter_seconds=self.drafter_seconds, total_variation_spent=spent,
            break_even=pace and pace.break_even, decision=pace.decision if pace else "",
        )  # fmt: skip
