"""Rules between official tensors and ours: each says of one tensor of ours what it is made of there, and is read both ways."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {  # kind: (official tensors -> ours, ours and the number of official ones -> those)
    "same": (lambda parts: parts[0], lambda ours, count: (ours,)),
    "joined": (lambda parts: torch.cat(list(parts)), lambda ours, count: ours.chunk(count)),  # along axis 0
    "row": (lambda parts: parts[0][0], lambda ours, count: (ours[None],)),  # one leading axis of 1 there
    "rows": (lambda parts: parts[0][0, 0], lambda ours, count: (ours[None, None],)),  # two of them
    "columns": (lambda parts: parts[0][0, 0].t(), lambda ours, count: (ours.t()[None, None],)),  # two of them, and transposed
    # biases of q and v; one on the keys moves all logits of a query alike, so leaving it out changes nothing
    "no_key_bias": (lambda parts: torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]]), lambda ours, count: ours.chunk(3)[::2]),
}


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, the official ones it is made of, and how: one of KINDS."""

    ours: str
    official: tuple[str, ...]
    kind: str = "same"

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        return KINDS[self.kind][0](parts)

    def to_official(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return KINDS[self.kind][1](tensor, len(self.official))


def both(ours: str, *official: str) -> list[Rule]:
    """Rules for the weight and the bias of one layer, made of one official layer or joined from several."""
    kind = "joined" if len(official) > 1 else "same"
    return [Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in official), kind) for part in ("weight", "bias")]


def to_official_names(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours (weights, or gradients of some of them) under their official names. Raises KeyError: one has no rule."""
    table = {rule.ours: rule for rule in rules}
    return {name: part for key, value in tensors.items() for name, part in zip(table[key].official, table[key].to_official(value))}
