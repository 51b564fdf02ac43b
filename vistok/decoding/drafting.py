"""Draft trees that depend on the draft law: draws without replacement, stochastic beam search, and the best nodes of a large tree.

    Gumbel top-b          tokens = top-b of log q(x) + G                G = -log(-log u); the order is that of successive draws
    stochastic beams      phi' = phi + log q(x);  g = phi' + G;  Z = max_x g                      Kool et al. 2019, 1903.06059, appendix B.3
                          psi' = -log(exp(-psi) - exp(-Z) + exp(-g));  keep the W largest psi'    RSD-S: Jeon et al. 2024, 2402.14160, 3.2
    best nodes            expand the best b of each round; keep the best of all by log q of the path    EAGLE-2: 2406.16858

V vocabulary, n nodes, W beams.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def gumbel(uniforms: Tensor) -> Tensor:
    """-log(-log u), finite for u = 0."""
    return -(-uniforms.clamp(min=torch.finfo(uniforms.dtype).tiny).log()).clamp(min=torch.finfo(uniforms.dtype).tiny).log()


def draw_without_replacement(log_probs: Tensor, uniforms: Tensor, k: int) -> Tensor:
    """k different tokens [..., k] in the order of successive draws: RSD-C's children. log_probs, uniforms: [..., V]."""
    return (log_probs + gumbel(uniforms)).topk(k, dim=-1).indices


class Beams(NamedTuple):
    """One level of a stochastic beam search, best first."""

    parents: Tensor
    """[W] int64, which beam of the level before."""
    tokens: Tensor
    """[W] int64."""
    phi: Tensor
    """[W] log-probability of the path."""
    psi: Tensor
    """[W] perturbed log-probability, falling."""


def perturb(phi: Tensor, psi: Tensor, uniforms: Tensor) -> Tensor:
    """psi' [n, V]: Gumbel-perturbed phi [n, V] given that the largest of a row is psi [n]. uniforms: [n, V]."""
    g = phi + gumbel(uniforms)
    Z, psi = g.amax(-1, keepdim=True), psi[:, None]
    v = psi - g + torch.log1p(-(g - Z).exp())  # -inf at the largest, which so gets psi itself
    return psi - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def beam_step(log_probs: Tensor, phi: Tensor, psi: Tensor, uniforms: Tensor, width: int) -> Beams:
    """The W best continuations of n beams. log_probs, uniforms: [n, V]; phi, psi: [n]."""
    V = log_probs.shape[1]
    phi = phi[:, None] + log_probs
    best = perturb(phi, psi, uniforms).flatten().topk(min(width, phi.numel()))
    return Beams(best.indices // V, best.indices % V, phi.flatten()[best.indices], best.values)


class DraftTree(NamedTuple):
    """A tree of drafted tokens; node 0 is the root, parents come before children."""

    tokens: list[int]
    parents: list[int]


def stochastic_beam_tree(next_log_probs: Callable[[Tensor], Tensor], root: int, uniforms: Tensor) -> DraftTree:
    """RSD-S: a tree of `levels` times W nodes; the children of a node are draws without replacement, in order.

    next_log_probs: paths [n, d] of tokens from the root on -> [n, V]. uniforms: [levels, W, V], one a beam and token (the first row alone
    for the root). Verify with `recursive_rejection(drawn="without_replacement")`. Source: arXiv 2402.14160, algorithm 4.
    """
    levels, width, _ = uniforms.shape
    tokens, parents = [root], [-1]
    paths, nodes = torch.tensor([[root]], device=uniforms.device), [0]
    phi = psi = uniforms.new_zeros(1)
    for level in range(levels):
        beams = beam_step(next_log_probs(paths).to(phi), phi, psi, uniforms[level, : len(nodes)], width)
        parents += [nodes[parent] for parent in beams.parents.tolist()]
        tokens += beams.tokens.tolist()
        nodes = list(range(len(tokens) - len(beams.tokens), len(tokens)))
        paths = torch.cat([paths[beams.parents], beams.tokens[:, None]], dim=1)
        phi, psi = beams.phi, beams.psi
    return DraftTree(tokens, parents)


def best_nodes_tree(next_log_probs: Callable[[Tensor], Tensor], root: int, *, num_nodes: int, rounds: int, top_k: int) -> DraftTree:
    """EAGLE-2: the num_nodes most probable nodes, root included, of a tree that grows its best top_k nodes for some rounds.

    next_log_probs: paths [n, d] of tokens from the root on -> [n, V]; called 1 + rounds times. Nodes keep the order they were made in.
    Raises ValueError: the grown tree has fewer nodes.
    """
    pool = 1 + top_k + rounds * top_k**2
    if not 1 <= num_nodes <= pool:
        raise ValueError(f"num_nodes={num_nodes} but {rounds} rounds of top_k={top_k} grow a tree of {pool} nodes")
    paths = torch.tensor([[root]])
    best = next_log_probs(paths)[0].topk(top_k)
    tokens, scores, parents = [best.indices], [best.values], [torch.full((top_k,), -1)]
    frontier, frontier_scores, frontier_tokens, made = torch.arange(top_k), best.values, best.indices, top_k
    paths = paths.repeat(top_k, 1)
    for _ in range(rounds):
        paths = torch.cat([paths, frontier_tokens[:, None]], dim=1)
        best = next_log_probs(paths).topk(top_k, dim=-1)
        grown = (frontier_scores[:, None] + best.values).flatten()
        tokens.append(best.indices.flatten())
        scores.append(grown)
        parents.append(frontier.repeat_interleave(top_k))
        ahead = grown.topk(top_k)
        paths, frontier = paths[ahead.indices // top_k], made + ahead.indices
        frontier_scores, frontier_tokens = ahead.values, tokens[-1][ahead.indices]
        made += top_k**2
    kept = torch.cat(scores).topk(num_nodes - 1).indices.sort().values.tolist()
    number = {-1: 0} | {node: i + 1 for i, node in enumerate(kept)}
    all_tokens, all_parents = torch.cat(tokens).tolist(), torch.cat(parents).tolist()
    # a path's score falls on the way, so the parent of a kept node is kept
    return DraftTree([root, *(all_tokens[node] for node in kept)], [-1, *(number[all_parents[node]] for node in kept)])
