"""Rules that compare groups of tokens instead of tokens.

    cluster   c = cluster of x;  accept x ~ q with min(1, P(c)/Q(c));   else c' ~ norm([P - Q]+), y ~ p(. | c')
              P, Q: laws of the cluster under p, q. The law of the emitted cluster is P exactly; inside a cluster q may stand for p.
    GSD       C(x) = tokens ranked near x by p, of nearly its probability, with near embeddings
              accept x ~ q with min(1, P(C)/Q(C));   else draw from norm([p - q]+)          So et al. 2025, arXiv 2508.07747, section 3

Shapes: ... any, V vocabulary, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vistok.decoding.accept.registry import accept_rule
from vistok.decoding.accept.rounds import Position, Trial, chance, draws, end, leftover, quotient


def cluster_law(p: Tensor, clusters: Tensor) -> Tensor:
    """Law [..., V] that has at each token the probability of its whole cluster. clusters: [V] int64."""
    sums = torch.zeros(*p.shape[:-1], int(clusters.max()) + 1, dtype=p.dtype, device=p.device)
    return sums.index_add(-1, clusters, p)[..., clusters]


@accept_rule("cluster", paper="this library")
def cluster(at: Position, *, clusters: Tensor | int = 100) -> Iterator[Trial]:
    """Exact in the clusters, not in the tokens: off by sum_c min(P(c), Q(c)) TV(p(. | c), q(. | c)) for one candidate.

    clusters: [V], the cluster of each token, or how many to make of the tokenizer's codes.
    Source: this library; recursive rejection between clusters.
    """
    r = at.p
    for index, x, q_k in draws(at):
        P, Q = cluster_law(r, clusters), cluster_law(q_k, clusters)
        yield Trial(index, torch.where(chance(q_k, x) > 0, quotient(chance(P, x), chance(Q, x)), 0.0), r)
        rest = r * quotient((P - Q).clamp(min=0), P)  # [P - Q]+ of each cluster, spread as r is in it
        total = rest.sum(-1, keepdim=True)
        r = torch.where(total > 0, rest / total.clamp(min=torch.finfo(r.dtype).tiny), r)
    yield end(r)


@accept_rule("gsd", paper="2508.07747")
def gsd(at: Position, *, embeddings: Tensor, window: int = 7, gap: float = 0.15, reach: float = 0.5) -> Iterator[Trial]:
    """Grouped speculative decoding: a token is judged by those of about its probability that mean about the same. Lossy, without a bound.

    embeddings: [V, D] of the target's input tokens. window: ranks before x, and one fewer behind. gap: of probability. reach: of squared
    distance between embeddings. window 0 is the standard rule.
    Source: arXiv 2508.07747, section 3; sizes and the token's own residual as in the published code.
    """
    r = at.p
    for index, x, q_k in draws(at):
        ordered, order = torch.sort(r, dim=-1, descending=True, stable=True)
        rank = (order == x[..., None]).long().argmax(-1, keepdim=True)
        ranks = rank + torch.arange(-window, max(window, 1), device=r.device)
        is_near = (ranks >= 0) & (ranks < r.shape[-1])
        ranks = ranks.clamp(0, r.shape[-1] - 1)
        tokens = order.gather(-1, ranks)  # [..., 2 window]
        is_near &= (ordered.gather(-1, ranks) - chance(r, x)[..., None]).abs() < gap
        apart = (embeddings[tokens] - embeddings[x.clamp(min=0)][..., None, :]).square().sum(-1)
        is_near &= (apart < reach) | (tokens == x[..., None])
        P, Q = ((law.gather(-1, tokens) * is_near).sum(-1) for law in (r, q_k))
        yield Trial(index, torch.where(chance(q_k, x) > 0, quotient(P, Q), 0.0), r)
        r = leftover(r, q_k)
    yield end(r)
