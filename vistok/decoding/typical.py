"""Locally typical sampling: keep the ids whose surprise is nearest to the expected one.

Meister et al. 2023, arXiv 2202.00666, equation 10:

    H = -sum_x p(x) log p(x);   d(x) = |-log p(x) - H|;   keep by ascending d until the mass reaches tau

Shapes: ... any, K codebook size.
"""

import torch
from torch import Tensor


def is_typical(logits: Tensor, *, mass: float, min_tokens: int = 1) -> Tensor:
    """Which ids stay, [..., K] bool: the fewest of least d whose probability reaches mass.

    Ids that tie with the last stay too, and so do at least min_tokens.
    An id at -inf has probability 0 and adds nothing to H. Raises ValueError: mass is not in (0, 1), or min_tokens is below 1.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass={mass} must be above 0 and below 1")
    if min_tokens < 1:
        raise ValueError(f"min_tokens={min_tokens} must be 1 or more")
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.nansum(p * log_p, dim=-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    total = p.gather(-1, order).cumsum(-1)
    last = (total < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    is_dropped = ordered > ordered.gather(-1, last)
    is_dropped[..., :min_tokens] = False
    return ~torch.zeros_like(is_dropped).scatter(-1, order, is_dropped)


def keep_typical(logits: Tensor, *, mass: float, min_tokens: int = 1) -> Tensor:
    """Logits [..., K] that are not typical become -inf."""
    return logits.masked_fill(~is_typical(logits, mass=mass, min_tokens=min_tokens), float("-inf"))
