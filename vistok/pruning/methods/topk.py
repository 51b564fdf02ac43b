"""Keep the best tokens by a score: the shared selection, and the scores that need nothing else (random, uniform, CLS attention, FastV).

    keep = the K largest scores, ties to the lower index, in raster order

B batch, N tokens, H heads, Q query rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vistok import rng
from vistok.pruning.plan import ReductionPlan


def count_to_keep(num_tokens: int, keep: int | None = None, keep_ratio: float | None = None) -> int:
    """The number of tokens to keep from a count or a share: N - round(N (1 - share)), halves to even, and at least one.

    That is the rule of FastV; PyramidDrop truncates (`int(N * share)`), which `keep` can say.
    """
    if (keep is None) == (keep_ratio is None):
        raise ValueError("give either keep (a count) or keep_ratio (a share)")
    if keep is not None:
        if not 1 <= keep <= num_tokens:
            raise ValueError(f"keep={keep} but there are 1 to {num_tokens} tokens to keep")
        return keep
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} but it is in (0, 1]")
    return max(1, num_tokens - round(num_tokens * (1 - keep_ratio)))


def ranked(score: Tensor) -> Tensor:
    """score: [B, N]. Returns [B, N] int64, best first; equal scores in index order on every backend."""
    return score.argsort(dim=-1, descending=True, stable=True)


def top_indices(score: Tensor, keep: int) -> Tensor:
    """score: [B, N]. Returns [B, keep] int64: the best, in raster order."""
    return ranked(score)[:, :keep].sort(dim=-1).values


def mask_of(indices: Tensor, num_tokens: int) -> Tensor:
    """indices: [B, K] int64. Returns [B, N] bool, True at the indices."""
    return torch.zeros(indices.shape[0], num_tokens, dtype=torch.bool, device=indices.device).scatter(1, indices, True)


def top_tokens(score: Tensor, keep: int, *, num_prefix: int = 0) -> ReductionPlan:
    """score: [B, T] for the tokens after the prefix. Keeps the prefix and the `keep` best tokens, in raster order; drops the rest."""
    B, T = score.shape
    prefix = torch.arange(num_prefix, device=score.device).expand(B, -1)
    return ReductionPlan(T + num_prefix, torch.cat([prefix, top_indices(score, keep) + num_prefix], dim=1))


def random_score(num_tokens: int, *, generators: Sequence[torch.Generator], device: torch.device | str | None = None) -> Tensor:
    """[B, N] uniform in [0, 1), one generator an image: the baseline every method has to beat."""
    return rng.rand((num_tokens,), generators, device=device)


def uniform_score(batch_size: int, num_tokens: int, keep: int, *, device: torch.device | str | None = None) -> Tensor:
    """[B, N]: 1 at `keep` evenly spaced tokens, 0 elsewhere."""
    position = (torch.arange(keep, device=device) * num_tokens + num_tokens // 2) // keep
    return torch.zeros(batch_size, num_tokens, device=device).index_fill(1, position.clamp(max=num_tokens - 1), 1.0)


def query_attention(query: Tensor, key: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Attention of a few query rows over all keys, without the full map: O(Q N d).

    query: [B, H, Q, d]. key: [B, H, N, d]. bias: broadcast against [B, H, Q, N] (a mask, log sizes).
    Returns [B, H, Q, N] float32 probabilities. scale is d^-1/2 unless given.
    """
    logits = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def cls_score(attention: Tensor) -> Tensor:
    """attention: [B, H, N] of the class token over the patches. Returns [B, N]: the mean over heads (EViT, FasterVLM, VisPruner)."""
    return attention.float().mean(dim=1)


def fastv_score(attention: Tensor, visual: slice | Tensor) -> Tensor:
    """FastV (Chen et al. 2024, arXiv 2403.06764): how much the last token attends to each visual token.

    attention: [B, H, L] probabilities of the last row in layer K - 1. visual: the visual span, a slice or [N] indices.
    Returns [B, N]. Layers K.. then run on `top_tokens(score, count_to_keep(N, keep_ratio=...))`.
    """
    return attention.float().mean(dim=1)[:, visual]


def pyramiddrop_counts(num_tokens: int, ratios: Sequence[float] = (0.5, 0.25, 0.125)) -> tuple[int, ...]:
    """PyramidDrop (Xing et al. 2024, arXiv 2410.17247): visual tokens left after each stage, int(N * ratio) of the original N.

    The score of a stage is FastV's, with the last instruction token's query and the keys of the next layer's projections.
    """
    if any(not 0 < ratio <= 1 for ratio in ratios) or list(ratios) != sorted(ratios, reverse=True):
        raise ValueError(f"ratios={tuple(ratios)} but they fall and lie in (0, 1]")
    return tuple(max(1, math.floor(num_tokens * ratio)) for ratio in ratios)
