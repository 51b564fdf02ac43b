"""Groups of channels that share one index: TokenFlow's dual codebook as data.

Qu et al. 2024, arXiv 2412.03069, section 3.1:  id = argmin_k sum_g w_g |z_g - e_gk|^2.

A group is a slice of the vector with its own weight and metric; "cosine" compares unit vectors. Because every group's distance is
Euclidean once its slice is normalised, the sum is the plain Euclidean distance of the slices scaled by sqrt(w_g): one matrix product
looks all groups up.

TokenFlow is `(CodeGroup(dim=32, metric="cosine"), CodeGroup(dim=8, metric="cosine"))`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("euclidean", "cosine")
SHORTEST = 1e-6
"""Length under which a vector has no direction worth a gradient."""


@dataclass(frozen=True, kw_only=True)
class CodeGroup:
    """One slice of the vectors."""

    dim: int
    """Channels of the slice."""
    weight: float = 1.0
    """w_g: how much its squared distance counts in the choice of the index."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """How the slice is compared; "cosine" compares unit vectors."""

    def __post_init__(self):
        if self.dim < 1 or self.weight <= 0:
            raise ValueError(f"a group needs dim >= 1 and weight > 0, got dim {self.dim} and weight {self.weight}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}")


def normalize_groups(vectors: Tensor, groups: tuple[CodeGroup, ...]) -> Tensor:
    """Vectors [..., d] with the slices of cosine groups made unit vectors; the others are left as they are.

    A slice shorter than SHORTEST gets no gradient. What a code leaves of the vector it was placed on is such a slice; its gradient, up to
    1e12 times that of the unit vector, would be all that the step learns from, and its square can overflow in the norm.
    """
    if all(group.metric == "euclidean" for group in groups):
        return vectors
    slices = vectors.split([group.dim for group in groups], -1)
    return torch.cat([_unit(x) if group.metric == "cosine" else x for x, group in zip(slices, groups)], -1)


def _unit(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1)
    if not unit.requires_grad:
        return unit
    return torch.where(x.detach().norm(dim=-1, keepdim=True) > SHORTEST, unit, unit.detach())


def weigh_groups(vectors: Tensor, groups: tuple[CodeGroup, ...]) -> Tensor:
    """Vectors [..., d] with slice g scaled by sqrt(w_g): their Euclidean distance is the weighted sum of the groups'."""
    if all(group.weight == 1 for group in groups):
        return vectors
    return torch.cat([x * math.sqrt(g.weight) for x, g in zip(vectors.split([g.dim for g in groups], -1), groups)], -1)
