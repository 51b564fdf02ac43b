"""Token Recycling: the likely successors of each token, as last seen, are the draft.

Luo et al. 2024, arXiv 2408.08696, section 3:

    draft    token[child] = A[token[parent], rank of the child]                 down a fixed tree
    update   A[token[i]]  = top-k of logits[i]                                  every node, rejected ones too

A starts at zeros and needs V x k ids. The children are no draws: verify with the greedy rule, or with recursive rejection of
deterministic candidates.

V vocabulary, n + 1 nodes, k successors.
"""

import torch
from torch import Tensor

from vistok.decoding.trees import TreeTemplate


def recycled_tree(successors: Tensor, root: int | Tensor, template: TreeTemplate) -> Tensor:
    """Tokens [n + 1] of the tree, or [B, n + 1] of the trees behind roots [B]. successors: [V, k].

    Raises ValueError: the template has a rank of k or more.
    """
    if max(template.ranks) >= successors.shape[1]:
        raise ValueError(f"the tree asks for successor {max(template.ranks)} but the table has {successors.shape[1]} columns")
    root = torch.as_tensor(root, dtype=torch.int64, device=successors.device)
    tokens = root[..., None].repeat(*[1] * root.ndim, len(template.parents))
    parents, ranks = torch.tensor(template.parents), torch.tensor(template.ranks)
    bounds = template.level_bounds.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:]):
        tokens[..., begin:end] = successors[tokens[..., parents[begin:end]], ranks[begin:end]].long()
    return tokens


def updated_successors(successors: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """The table after a pass: a new [V, k]. tokens: [n + 1]; logits: [n + 1, V]. Of equal tokens the last counts, on every device."""
    V, k = successors.shape
    nodes = torch.arange(len(tokens), device=tokens.device)
    last = torch.full((V,), -1, device=tokens.device).scatter_reduce_(0, tokens.long(), nodes, "amax")
    seen = last >= 0
    best = logits.topk(k, dim=-1).indices.to(successors.dtype)
    return torch.where(seen[:, None], best[last.clamp(min=0)], successors)


def longest_match(paths: Tensor, tokens: Tensor, choices: Tensor) -> tuple[int, int]:
    """The first path with the longest run of tokens that the target chooses, and the number of its nodes, root included.

    paths: [P, D + 1], -1 behind a leaf. tokens: [n + 1]. choices: [n + 1], the target's token after each node.
    """
    parents, children = paths[:, :-1].clamp(min=0), paths[:, 1:]
    matches = (tokens[children.clamp(min=0)] == choices[parents]) & (children >= 0)
    lengths = matches.long().cumprod(1).sum(1)
    best = int(lengths.argmax())
    return best, 1 + int(lengths[best])
