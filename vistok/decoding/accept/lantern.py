"""LANTERN: accept a token for the probability of its neighbours in the codebook; and a version whose loss is bounded.

Jang et al. 2024, arXiv 2410.03355, section 4; Park et al. 2025 (LANTERN++), arXiv 2502.06352, section 4:

    c_j(x)  = p(n_1(x)) + .. + p(n_j(x))                  n_j(x): j-th nearest token of x
    A(x)    = {x, n_1, .., n_m},  m = largest j <= k with c_j <= bound(x)
    bound   = delta (LANTERN)    or    (lambda - 1) p(x) (LANTERN++)
    accept x ~ q with min(1, P_A(x)/q(x)),  P_A(x) = p(x) + c_m(x);   else draw from norm([p^x - q]+),  p^x = p with A's mass moved to x

delta bounds each p^x, not the law of the emitted token: p uniform on n groups of k + 1 neighbours and q uniform on one token a group lose
k/(k + 1) in total variation at delta = k / (n (k + 1)). `lantern_budget` moves the mass first, once for all candidates of the position,
and then verifies exactly against the moved law; so the loss of a position is at most eps.

V vocabulary, k neighbours. Shapes: neighbours [V, >= k] (> k for the reference's residual).
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.decoding.accept.exact import Drawn, draft_law, recursive_rejection
from vistok.decoding.accept.rounds import Trial, leftover
from vistok.quantizers.lookup import nearest_codes


def neighbour_table(codebook: Tensor, k: int, *, metric: Literal["euclidean", "cosine"] = "euclidean") -> Tensor:
    """The k nearest other tokens of each token, nearest first: [V, k] int32.

    codebook: [V, d]. metric: that of the tokenizer's own lookup; LlamaGen's is "cosine", though LANTERN's published tables are "euclidean".
    Memory: a block of scores at a time, never V x V. Raises ValueError: k is not in [1, V - 1].
    """
    V = len(codebook)
    if not 1 <= k < V:
        raise ValueError(f"k={k} neighbours but {V} codes have 1 to {V - 1} others")
    nearest = nearest_codes(codebook, codebook, metric=metric, k=k + 1)
    is_other = nearest != torch.arange(V, device=nearest.device)[:, None]
    is_other[:, -1] &= ~is_other.all(1)  # a code with k + 1 equals may not find itself: drop the last then
    return nearest[is_other].view(V, k).int()


def num_aggregated(p: Tensor, token: int, neighbours: Tensor, *, k: int, delta: float | None = None, multiple: float | None = None) -> int:
    """m: how many neighbours of the token lend it their probability. Exactly one of delta and multiple (lambda) is given."""
    if (delta is None) == (multiple is None):
        raise ValueError(f"give delta (LANTERN) or multiple (LANTERN++), not both or neither: delta={delta}, multiple={multiple}")
    bound = delta if delta is not None else (multiple - 1) * float(p[token])
    return int((p[neighbours[token, :k].long()].cumsum(0) <= bound).sum())


def lantern(
    p: Tensor,
    candidates: Sequence[int],
    q: Tensor | None,
    neighbours: Tensor,
    *,
    k: int,
    delta: float | None = None,
    multiple: float | None = None,
    residual: Literal["paper", "reference"] = "paper",
    drawn: Drawn = "without_replacement",
    chances: Sequence[float] | None = None,
) -> Iterator[Trial]:
    """LANTERN (delta) and LANTERN++ (multiple) at one position; lossy, and by how much nothing here bounds: see `lantern_budget`.

    p: [V] target law. candidates: distinct tokens in order of drawing. q: [V] draft law, None where drawn is "deterministic".
    residual: "paper" draws from norm([p^x - q]+) after a rejection. "reference" does as the published code does where m > 0: of
    deterministic candidates the k + 1 nearest lose their mass, of drawn ones the draft loses its mass there; and an empty residual
    becomes uniform on all tokens.
    chances: q of each candidate given the draws before it, where these hold more than the candidates (a tree that tries some of its draws).
    """
    if (q is None) != (drawn == "deterministic"):
        raise ValueError(f"candidates drawn {drawn!r} {'need the' if q is None else 'have no'} draft law q")
    r = p
    for index, token in enumerate(candidates):
        m = num_aggregated(r, token, neighbours, k=k, delta=delta, multiple=multiple)
        near = neighbours[token, :k].long()
        mass = r[token] + r[near[:m]].sum()
        q_k = draft_law(q, candidates[:index], drawn) if q is not None else torch.zeros_like(p)
        if q is None:
            q_k[token] = 1
        chance = float(q_k[token]) if chances is None else float(chances[index])
        yield Trial(index, float(mass) / chance if chance > 0 else 0.0, r)
        if chance <= 0:
            continue
        if residual == "paper":
            moved = r.clone()
            moved[near[:m]] = 0
            moved[token] = mass
            r = leftover(moved, q_k)
        else:
            wide = neighbours[token, : k + 1].long() if m else near[:0]
            r = _reference_residual(r, token, wide, q_k, is_drawn=q is not None)
    yield Trial(-1, 1.0, r)


def _reference_residual(r: Tensor, token: int, near: Tensor, q_k: Tensor, *, is_drawn: bool) -> Tensor:
    if is_drawn:
        q_k = q_k.clone()
        q_k[near] = 0
        rest = (r - q_k).clamp(min=0)
    else:
        rest = r.clone()
        rest[near] = 0
        rest[token] = 0
    total = rest.sum()
    return rest / total if total > 0 else torch.full_like(rest, 1 / len(rest))


def accepts_greedily(
    logits: Tensor, token: int, neighbours: Tensor | None, *, k: int = 0, delta: float | None = None, multiple: float | None = None
) -> bool:
    """Whether the token is the most probable once it has its neighbours' probability, while they keep theirs.

    logits: [V]. neighbours None: plain greedy decoding. Source: the published code of arXiv 2410.03355 at temperature 0.
    """
    if neighbours is None:
        return int(logits.argmax()) == token
    p = logits.float().softmax(-1)
    m = num_aggregated(p, token, neighbours, k=k, delta=delta, multiple=multiple)
    raised = p.clone()
    raised[token] += p[neighbours[token, :m].long()].sum()
    return int(raised.argmax()) == token


def move_mass(p: Tensor, candidates: Sequence[int], neighbours: Tensor, *, k: int, eps: float) -> Tensor:
    """Law [V] within eps of p in total variation: up to eps of probability is moved to the candidates from their neighbours, nearest first.

    All candidates share eps and none is robbed; at equal rank the earlier candidate takes first.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps={eps} but a total variation is in [0, 1]")
    moved = p.clone()
    if not candidates or eps == 0:
        return moved
    targets = torch.as_tensor(candidates, device=p.device)
    takers = targets.repeat(k)  # [k * C], by rank and then by candidate
    givers = neighbours[targets, :k].long().t().reshape(-1)
    gives = torch.where(torch.isin(givers, targets), torch.zeros_like(p[givers]), p[givers])
    # a token near several candidates gives once, to the first of them
    order = torch.arange(len(givers), device=p.device)
    first = torch.full((len(p),), len(givers), device=p.device).scatter_reduce_(0, givers, order, "amin")
    gives = torch.where(first[givers] == order, gives, torch.zeros_like(gives))
    before = gives.cumsum(0) - gives
    gives = torch.minimum(gives, (eps - before).clamp(min=0))
    moved.index_add_(0, givers, -gives)
    moved.index_add_(0, takers, gives)
    return moved.clamp(min=0)


def lantern_budget(p: Tensor, candidates: Sequence[int], neighbours: Tensor, *, k: int, eps: float) -> Iterator[Trial]:
    """Relaxed acceptance with a certificate: the emitted token has a law within eps of p in total variation.

    p: [V]. candidates: not drawn (the best children of a tree, table look-ups). Exact verification against `move_mass(p, ...)`, whose
    choice is made before any uniform is seen; the candidates are accepted with p(candidates) + the mass moved, and
    no rule gains more than eps for a loss of eps.
    Source: this library; the bound follows from the exactness of recursive rejection.
    """
    return recursive_rejection(move_mass(p, candidates, neighbours, k=k, eps=eps), candidates, None, drawn="deterministic")
