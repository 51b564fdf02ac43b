"""Rules that leave the target law as it is, whatever the draft.

    standard     accept x ~ q with min(1, p(x)/q(x)), else draw from norm([p - q]+)     Leviathan et al. 2023, 2211.17192, section 2.3
    recursive    the same again with r = norm([r - q_k]+) in place of p                 Jeon et al. 2024, 2402.14160, algorithm 2
    K-SEQ        accept with min(1, p(x)/(rho q(x))), k draws                           Sun et al. 2023, 2310.15141, algorithm 2

Given that all before were rejected, round k of the recursive rule emits law r_k whatever q_k is, as long as q_k depends on rejected draws
only; so the candidates may be drawn with replacement (q_k = q), without (q_k = q without earlier ones), or not at all (q_k = 1 at x_k).

V vocabulary, k candidates of one position.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vistok.decoding.accept.rounds import Trial, leftover

Drawn = Literal["with_replacement", "without_replacement", "deterministic"]


def recursive_rejection(p: Tensor, candidates: Sequence[int], q: Tensor | None, *, drawn: Drawn) -> Iterator[Trial]:
    """Recursive rejection sampling; exact. With one candidate this is standard speculative sampling.

    p: [V] target law. candidates: tokens in the order they were drawn. q: [V] law of the first draw; None where drawn is "deterministic".
    A candidate of draft law 0 is not one of the draft's and is passed over.
    Source: arXiv 2402.14160 (RSD), algorithm 2; with replacement: SpecInfer, 2305.09781, algorithm 2; deterministic: EAGLE-2, 2406.16858.
    Raises ValueError: q is missing, or given with deterministic candidates.
    """
    if (q is None) != (drawn == "deterministic"):
        raise ValueError(f"candidates drawn {drawn!r} {'need the' if q is None else 'have no'} draft law q")
    r = p
    for index, token in enumerate(candidates):
        q_k = draft_law(q, candidates[:index], drawn) if q is not None else torch.zeros_like(p)
        if q is None:
            q_k[token] = 1
        chance = float(q_k[token])
        yield Trial(index, float(r[token]) / chance if chance > 0 else 0.0, r)
        if chance > 0:
            r = leftover(r, q_k)
    yield Trial(-1, 1.0, r)


def standard(p: Tensor, candidate: int, q: Tensor) -> Iterator[Trial]:
    """Speculative sampling of one token drawn from q [V]; exact. Source: arXiv 2211.17192, section 2.3."""
    return recursive_rejection(p, [candidate], q, drawn="with_replacement")


def draft_law(q: Tensor, earlier: Sequence[int], drawn: Drawn) -> Tensor:
    """Law [V] of the draw after `earlier`: q, or without replacement q(x) 1[x not in earlier] / (1 - q(earlier)); 0 if nothing is left."""
    if drawn == "with_replacement" or not earlier:
        return q
    rest = q.clone()
    rest[list(earlier)] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest


def greedy(p: Tensor, candidates: Sequence[int]) -> Iterator[Trial]:
    """The most probable token (the first of equals) and no other; equals greedy decoding. p: [V] law or logits."""
    best = int(p.argmax())
    law = torch.zeros_like(p)
    law[best] = 1
    for index, token in enumerate(candidates):
        yield Trial(index, float(token == best), law)
    yield Trial(-1, 1.0, law)


class KSeq(NamedTuple):
    """Constants of K-SEQ for one pair of laws."""

    rho: float
    """Smallest divisor of the ratio that leaves a residual, in [1, k]."""
    beta: float
    """Chance that one draw is accepted: sum_x min(q(x), p(x)/rho)."""
    accept: float
    """Chance that one of k draws is accepted: 1 - (1 - beta)^k."""
    residual: Tensor
    """[V] law on total failure: (p - min(q, p/rho) accept/beta) / (1 - accept)."""


def k_seq_constants(p: Tensor, q: Tensor, k: int) -> KSeq:
    """Constants of K-SEQ for laws p, q [V] and k draws, in float64.

    Source: arXiv 2310.15141, algorithm 2 and section 4 (rho is gamma there).
    rho solves 1 - (1 - beta(rho))^k = rho beta(rho) by bisection; below it the residual would be negative somewhere.
    """
    p, q = p.double(), q.double()

    def excess(rho: float) -> float:
        beta = float(torch.minimum(q, p / rho).sum())
        return 1 - (1 - beta) ** k - rho * beta

    low, high = 1.0, float(k)
    if excess(low) <= 0:
        high = low
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    overlap = torch.minimum(q, p / high)
    beta = float(overlap.sum())
    accept = 1 - (1 - beta) ** k
    rest = (p - overlap * (accept / beta)).clamp(min=0) if beta > 0 else p
    total = rest.sum()
    return KSeq(high, beta, accept, rest / total if total > 1e-14 else p)


def k_seq(p: Tensor, candidates: Sequence[int], q: Tensor) -> Iterator[Trial]:
    """SpecTr's K-SEQ for candidates drawn independently from q [V]; exact. Source: arXiv 2310.15141, algorithm 2.

    The constants depend on the number of candidates and are computed at each call; the trials before the last carry p as their law.
    """
    constants = k_seq_constants(p, q, max(1, len(candidates)))
    for index, token in enumerate(candidates):
        chance = float(q[token]) * constants.rho
        yield Trial(index, float(p[token]) / chance if chance > 0 else 0.0, p)
    yield Trial(-1, 1.0, constants.residual.to(p.dtype) if candidates else p)
