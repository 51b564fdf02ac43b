"""From logits to an id: pure functions that reshape the law, and one that draws from it.

    warp:    logits / temperature -> top_k -> top_p -> min_p -> typical_p   each one sees the law its predecessor left
    sample:  the first id whose cumulative probability exceeds u            u uniform on [0, 1), one a draw

Shapes: ... any, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.typical import keep_typical


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How ids are drawn. The defaults draw from the model's own law."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable id."""
    top_k: int = 0
    """Keep the k most probable ids (ties of the k-th stay); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable ids whose mass reaches top_p; 1 keeps all."""
    min_p: float = 0.0
    """Keep ids at least min_p times as probable as the most probable; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the ids whose surprise is nearest to the expected one, up to this much mass (`decoding.typical`); 1 keeps all."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.typical_p <= 1:
            raise ValueError(f"typical_p must be in (0, 1], got {self.typical_p}")


def keep_best(logits: Tensor) -> Tensor:
    """Only the first of the largest logits is left: the law of temperature 0."""
    best = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, float("-inf")).scatter_(-1, best, 0.0)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., K] below the k-th largest become -inf."""
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Ids are dropped, from the least probable on, while the more probable ones alone have a mass of p or more; the best stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1)
    before = mass.cumsum(-1) - mass
    dropped = before >= p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), float("-inf"))


def keep_min_p(logits: Tensor, fraction: float) -> Tensor:
    """Ids less probable than `fraction` of the most probable become -inf."""
    gap = torch.tensor(fraction, dtype=torch.float64).log().item()  # a ratio of probabilities is a difference of logits
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < gap, float("-inf"))


def warp(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits [..., K] float32 of the law that `sampling` asks for; ids that cannot be drawn have -inf."""
    logits = logits.float()
    if sampling.temperature == 0:
        return keep_best(logits)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    if sampling.typical_p < 1:
        logits = keep_typical(logits, mass=sampling.typical_p)
    return logits


def sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids by the inverse of the cumulative law, in float64.

    probabilities: [..., K], not negative, some positive; need not sum to 1. uniforms: [...] in [0, 1).
    Returns ids [...] int64. An id of probability 0 is never drawn; a row depends on its own uniform only.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total, which no id exceeds
    target = torch.minimum(uniforms.double() * total, below)
    return torch.searchsorted(cumulative, target[..., None], right=True)[..., 0]


def draw(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> Tensor:
    """Ids [...] of logits [..., K] under the law that `sampling` asks for; the uniforms [...] decide, except at temperature 0."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return sample(warp(logits, sampling).softmax(-1), uniforms)
