"""LANTERN: accept a token for the probability of its neighbours in the codebook; and a version whose loss is bounded.

Jang et al. 2024, arXiv 2410.03355, section 4; Park et al. 2025 (LANTERN++), arXiv 2502.06352, section 4:

    c_j(x)  = p(n_1(x)) + .. + p(n_j(x))                  n_j(x): j-th nearest token of x
    A(x)    = {x, n_1, .., n_m},  m = largest j <= k with c_j <= bound(x)
    bound   = delta (LANTERN)    or    (lambda - 1) p(x) (LANTERN++)
    accept x ~ q with min(1, P_A(x)/q(x)),  P_A(x) = p(x) + c_m(x);   else draw from norm([p^x - q]+),  p^x = p with A's mass moved to x

delta bounds each p^x, not the law of the emitted token: p uniform on n groups of k + 1 neighbours and q uniform on one token a group lose
k/(k + 1) in total variation at delta = k / (n (k + 1)). `lantern_budget` moves the mass first, once for all candidates of the position,
and then verifies exactly against the moved law; so the loss of a position is at most eps.

Shapes: ... any, V vocabulary, C candidates, k neighbours.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from vistok.decoding.accept.neighbours import Neighbours, nearest_tokens
from vistok.decoding.accept.registry import accept_rule, law_rule
from vistok.decoding.accept.relaxed import blend
from vistok.decoding.accept.rounds import Position, Trial, chance, draws, end, leftover, quotient

Residual = Literal["corrected", "reference"]


def aggregated(p: Tensor, tokens: Tensor, near: Tensor, *, delta: float | None = None, multiple: float | None = None) -> Tensor:
    """Which of the neighbours near [..., k] lend the tokens [...] their probability: the first m, [..., k] bool.

    Exactly one of delta and multiple (lambda) is given. Raises ValueError: both or neither.
    """
    if (delta is None) == (multiple is None):
        raise ValueError(f"give delta (LANTERN) or multiple (LANTERN++), not both or neither: delta={delta}, multiple={multiple}")
    bound = delta if delta is not None else (multiple - 1) * chance(p, tokens)[..., None]
    return p.gather(-1, near).cumsum(-1) <= bound


@accept_rule("lantern", paper="2410.03355")
def lantern(
    at: Position, *, neighbours: Neighbours, k: int = 1000, delta: float = 0.1, residual: Residual = "corrected"
) -> Iterator[Trial]:
    """LANTERN: a token takes at most delta from its neighbours. Lossy, and delta does not bound by how much: see `lantern_budget`."""
    return aggregation(at, neighbours=neighbours, k=k, delta=delta, residual=residual)


@accept_rule("lantern++", paper="2502.06352")
def lantern_plus(
    at: Position, *, neighbours: Neighbours, k: int = 1000, multiple: float = 2.0, residual: Residual = "corrected"
) -> Iterator[Trial]:
    """LANTERN++: a token takes at most multiple - 1 times its own probability from its neighbours. Lossy, without a bound."""
    return aggregation(at, neighbours=neighbours, k=k, multiple=multiple, residual=residual)


def aggregation(
    at: Position,
    *,
    neighbours: Neighbours,
    k: int,
    delta: float | None = None,
    multiple: float | None = None,
    residual: Residual = "corrected",
    chances: Tensor | None = None,
) -> Iterator[Trial]:
    """LANTERN (delta) or LANTERN++ (multiple) at one position.

    residual: "corrected" draws from norm([p^x - q]+) after a rejection. "reference" does as the published code does where m > 0: of
    candidates that were not drawn the k + 1 nearest lose their mass, of drawn ones the draft loses its mass there; and an empty residual
    becomes uniform on all tokens.
    chances: [..., C], q of each candidate given the draws before it, where these hold more than the candidates (a tree that tries some of
    its draws).
    """
    r = at.p
    for index, x, q_k in draws(at):
        near = nearest_tokens(neighbours, x, k)
        lends = aggregated(r, x, near, delta=delta, multiple=multiple)
        mass = chance(r, x) + (r.gather(-1, near) * lends).sum(-1)
        drawn_with = chance(q_k, x) if chances is None else chances[..., index]
        yield Trial(index, quotient(mass, drawn_with), r)
        if residual == "corrected":
            moved = r.scatter(-1, near, torch.where(lends, 0.0, r.gather(-1, near)))
            moved = moved.scatter(-1, x.clamp(min=0)[..., None], mass[..., None])
            after = leftover(moved, q_k)
        else:
            wide = nearest_tokens(neighbours, x, k + 1)
            after = _reference_residual(r, x, wide, lends.any(-1, keepdim=True), q_k, is_drawn=at.q is not None)
        r = torch.where((drawn_with > 0)[..., None], after, r)
    yield end(r)


def _reference_residual(r: Tensor, x: Tensor, wide: Tensor, has_neighbours: Tensor, q_k: Tensor, *, is_drawn: bool) -> Tensor:
    if is_drawn:
        rest = (r - q_k.scatter(-1, wide, torch.where(has_neighbours, 0.0, q_k.gather(-1, wide)))).clamp(min=0)
    else:
        rest = r.scatter(-1, wide, torch.where(has_neighbours, 0.0, r.gather(-1, wide))).scatter(-1, x.clamp(min=0)[..., None], 0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), 1 / rest.shape[-1])


def accepts_greedily(
    logits: Tensor, token: int, neighbours: Neighbours | None, *, k: int = 0, delta: float | None = None, multiple: float | None = None
) -> bool:
    """Whether the token is the most probable once it has its neighbours' probability, while they keep theirs.

    logits: [V]. neighbours None: plain greedy decoding. Source: the published code of arXiv 2410.03355 at temperature 0.
    """
    if neighbours is None:
        return int(logits.argmax()) == token
    p, x = logits.float().softmax(-1), torch.tensor(token, device=logits.device)
    near = nearest_tokens(neighbours, x, k)
    lends = aggregated(p, x, near, delta=delta, multiple=multiple)
    raised = p.clone()
    raised[token] += (p[near] * lends).sum()
    return int(raised.argmax()) == token


def move_mass(p: Tensor, candidates: Tensor, neighbours: Neighbours, *, k: int, eps: float) -> Tensor:
    """Laws within eps of p in total variation: up to eps of probability is moved to candidates that were not drawn.

    p: [..., V]; candidates: [..., C]. From their neighbours, nearest first. All candidates share eps and none is robbed; at equal rank
    the earlier candidate takes first.
    """
    V, C = p.shape[-1], candidates.shape[-1]
    if not C or eps == 0:
        return p
    near = nearest_tokens(neighbours, candidates, k)  # [..., C, k]
    givers = near.transpose(-1, -2).flatten(-2)  # by rank and then by candidate
    takers = candidates[..., None, :].expand(*candidates.shape[:-1], near.shape[-1], C).flatten(-2)
    is_taker = one_or_more(candidates, V)
    gives = torch.where(is_taker.gather(-1, givers) | (takers < 0), 0.0, p.gather(-1, givers))
    # a token near several candidates gives once, to the first of them
    order = torch.arange(givers.shape[-1], device=p.device).expand_as(givers)
    order = torch.where(takers < 0, len(order.flatten()) + V, order)
    first = torch.full(p.shape, order.shape[-1] + V, device=p.device).scatter_reduce(-1, givers, order, "amin")
    gives = torch.where(first.gather(-1, givers) == order, gives, 0.0)
    before = gives.cumsum(-1) - gives
    gives = torch.minimum(gives, (eps - before).clamp(min=0))
    return p.scatter_add(-1, givers, -gives).scatter_add(-1, takers.clamp(min=0), gives).clamp(min=0)


def one_or_more(tokens: Tensor, V: int) -> Tensor:
    """Which of V tokens are among tokens [..., C]: [..., V] bool."""
    counts = torch.zeros(*tokens.shape[:-1], V, dtype=torch.int64, device=tokens.device)
    return counts.scatter_add(-1, tokens.clamp(min=0), (tokens >= 0).long()) > 0


def carry_mass(p: Tensor, q: Tensor, neighbours: Neighbours, *, k: int, eps: float, takers: int = 128) -> Tensor:
    """Laws at total variation min(eps, TV(p, q)) of p, on the way from p to q [..., V], moving mass between near tokens first.

    A token with q > p takes what it lacks from those of its k neighbours with p > q, in proportion to their surplus; a neighbour that is
    asked for more than its surplus gives to all in proportion. What is left of eps is spent as a blend. Only the `takers` tokens that lack
    most take from neighbours. Depends on p and q alone, not on what was drawn.
    """
    lack, tokens = (q - p).clamp_(min=0).topk(min(takers, p.shape[-1]), dim=-1)
    near = nearest_tokens(neighbours, tokens, k).flatten(-2)  # [..., takers * k]
    surplus = (p - q).clamp_(min=0)
    offered = surplus.gather(-1, near).unflatten(-1, (tokens.shape[-1], -1))
    total = offered.sum(-1)
    asked = (offered * quotient(torch.minimum(lack, total), total)[..., None]).flatten(-2)
    load = torch.zeros_like(p).scatter_add_(-1, near, asked).gather(-1, near)
    moved = asked * quotient(offered.flatten(-2), load).clamp_(max=1)
    spent = moved.sum(-1, keepdim=True)
    moved = moved * quotient(spent.clamp(max=eps), spent)
    gained = moved.unflatten(-1, offered.shape[-2:]).sum(-1)
    v = p.scatter_add(-1, near, -moved).scatter_add_(-1, tokens, gained).clamp_(min=0)
    return blend(v, q, (eps - spent[..., 0]).clamp(min=0))


@law_rule("lantern_budget", bound="eps", paper="this library, after 2410.03355")
def lantern_budget(at: Position, *, neighbours: Neighbours, k: int = 10, eps: float = 0.1) -> Tensor:
    """Relaxed acceptance with a certificate: the emitted token has a law within eps of p in total variation.

    Exact verification against a law near p that favours the candidates; it is chosen before any uniform is seen, and for drawn candidates
    from p and q alone. One drawn candidate is so accepted with eps more than by the exact rule, and no rule gains more for a loss of eps.
    Source: this library; the bound follows from the exactness of recursive rejection.
    """
    if at.q is None:
        return move_mass(at.p, at.candidates, neighbours, k=k, eps=eps)
    return carry_mass(at.p, at.q, neighbours, k=k, eps=eps)
