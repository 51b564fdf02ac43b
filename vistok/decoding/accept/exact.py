"""Rules that leave the target law as it is, whatever the draft.

    standard     accept x ~ q with min(1, p(x)/q(x)), else draw from norm([p - q]+)     Leviathan et al. 2023, 2211.17192, section 2.3
    recursive    the same again with r = norm([r - q_k]+) in place of p                 Jeon et al. 2024, 2402.14160, algorithm 2
    K-SEQ        accept with min(1, p(x)/(rho q(x))), k draws                           Sun et al. 2023, 2310.15141, algorithm 2

Given that all before were rejected, round k of the recursive rule emits law r_k whatever q_k is, as long as q_k depends on rejected draws
only; so the candidates may be drawn with replacement (q_k = q), without (q_k = q without earlier ones), or not at all (q_k = 1 at x_k).

Shapes: ... any, V vocabulary, k candidates of one position.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vistok.decoding.accept.registry import accept_rule, law_rule
from vistok.decoding.accept.rounds import Position, Trial, chance, end, one_hot, quotient


@law_rule("standard", exact=True, paper="2211.17192")
def standard(at: Position) -> Tensor:
    """Speculative sampling; with several candidates recursive rejection: drawn with or without replacement (RSD-C, RSD-S), or not drawn.

    Source: arXiv 2211.17192, section 2.3; 2402.14160 (RSD), algorithm 2; with replacement: SpecInfer, 2305.09781, algorithm 2;
    deterministic: EAGLE-2, 2406.16858.
    """
    return at.p


@accept_rule("greedy", paper="2211.17192")
def greedy(at: Position) -> Iterator[Trial]:
    """The most probable token (the first of equals) and no other: greedy decoding, of whatever law. p may be logits.

    At temperature 0 the standard rule does the same."""
    best = at.p.argmax(-1)
    law = one_hot(best, at.p)
    for index, x in enumerate(at.candidates.unbind(-1)):
        yield Trial(index, (x == best).to(law.dtype), law)
    yield end(law)


class KSeq(NamedTuple):
    """Constants of K-SEQ for pairs of laws."""

    rho: Tensor
    """[...]: smallest divisor of the ratio that leaves a residual, in [1, k]."""
    beta: Tensor
    """[...]: chance that one draw is accepted, sum_x min(q(x), p(x)/rho)."""
    accept: Tensor
    """[...]: chance that one of k draws is accepted, 1 - (1 - beta)^k."""
    residual: Tensor
    """[..., V] law on total failure: (p - min(q, p/rho) accept/beta) / (1 - accept)."""


def k_seq_constants(p: Tensor, q: Tensor, k: int | Tensor) -> KSeq:
    """Constants of K-SEQ for laws p, q [..., V] and k draws (a number, or one a pair), in float64.

    Source: arXiv 2310.15141, algorithm 2 and section 4 (rho is gamma there).
    rho solves 1 - (1 - beta(rho))^k = rho beta(rho) by bisection; below it the residual would be negative somewhere. With x sorted by
    p(x)/q(x), beta(rho) is a sum of p/rho over the first and of q over the rest, so a step of the bisection costs a look-up.
    """
    p, q = p.double(), q.double()
    k = torch.as_tensor(k, dtype=torch.float64, device=p.device).expand(p.shape[:-1])
    ratio, order = torch.where(q > 0, p / q.clamp(min=1e-300), float("inf")).sort(-1)
    zero = torch.zeros_like(p[..., :1])
    p_below = torch.cat([zero, p.gather(-1, order).cumsum(-1)], -1)
    q_above = torch.cat([q.gather(-1, order).flip(-1).cumsum(-1).flip(-1), zero], -1)

    def excess(rho: Tensor) -> Tensor:
        count = torch.searchsorted(ratio, rho[..., None].contiguous())
        beta = (p_below.gather(-1, count) / rho[..., None] + q_above.gather(-1, count))[..., 0]
        return 1 - (1 - beta.clamp(max=1)) ** k - rho * beta

    low, high = torch.ones_like(k), k.clone()
    high = torch.where(excess(low) <= 0, low, high)
    for _ in range(60):  # halves [1, k] to the last bit
        middle = 0.5 * (low + high)
        is_low = excess(middle) > 0
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    overlap = torch.minimum(q, p / high[..., None])
    beta = overlap.sum(-1)
    accept = 1 - (1 - beta).clamp(min=0) ** k
    rest = (p - overlap * quotient(accept, beta)[..., None]).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return KSeq(high, beta, accept, torch.where(total > 1e-14, rest / total.clamp(min=1e-14), p))


@accept_rule("k_seq", exact=True, paper="2310.15141")
def k_seq(at: Position) -> Iterator[Trial]:
    """SpecTr's K-SEQ for independent draws of q; exact. The trials before the last carry p as their law.

    Source: arXiv 2310.15141, algorithm 2. Raises ValueError: the candidates are not independent draws.
    """
    if not at.candidates.shape[-1]:
        yield end(at.p)
        return
    if at.drawn != "with_replacement" or at.q is None:
        raise ValueError(f"K-SEQ needs independent draws of q, but the candidates are drawn {at.drawn!r}")
    count = (at.candidates >= 0).sum(-1)
    constants = k_seq_constants(at.p, at.q, count.clamp(min=1))
    rho = constants.rho.to(at.p.dtype)
    for index, x in enumerate(at.candidates.unbind(-1)):
        yield Trial(index, quotient(chance(at.p, x), rho * chance(at.q, x)), at.p)
    yield end(torch.where((count > 0)[..., None], constants.residual.to(at.p.dtype), at.p))
