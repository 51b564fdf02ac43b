"""Zero-TPrune: rank patches by page rank on the attention graph, drop look-alikes first, then the unimportant.

Wang et al. 2024, "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph", arXiv 2305.17328.

    WPR   s^{t+1} = A^T s^t per head            votes flow from query to key; mass is conserved
    VHF   heads whose variance over the patches is outside [0.01, 0.7] do not vote (on scores of mean 1; all vote if none passes)
    EIR   s_i = sqrt(mean_h s_i^(h)^2)
    I'    one vote; S: of the less important half, remove those most similar (keys, cosine) to the more important half;
    I     WPR among the survivors (rows renormalised), keep the best

Written from the paper: no official code was available. On scores that sum to 1 no variance can reach 0.01 (the bound is 1/N), so scores
have mean 1 here. B batch, H heads, N tokens with the P prefix tokens first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.methods.topk import mask_of, ranked
from vistok.pruning.plan import ReductionPlan, gather_rows


def page_rank(
    attention: Tensor, *, num_iterations: int, num_prefix: int = 1, is_uniform: bool = False, alive: Tensor | None = None
) -> Tensor:
    """attention: [B, H, N, N] rows summing to 1. alive: [B, N] bool, the tokens that vote; rows are renormalised over them. None: all.

    Returns [B, H, N] scores of mean 1 over the living, 0 for the others. The class token starts with sqrt(N) times the vote of the others,
    unless is_uniform or there is none.
    """
    B, H, N, _ = attention.shape
    score = attention.new_ones(B, H, N)
    if num_prefix and not is_uniform:
        score[..., 0] = N**0.5
    if alive is None:
        score = score / score.mean(dim=-1, keepdim=True)
        for _ in range(num_iterations):
            score = (score[:, :, None] @ attention)[:, :, 0]
        return score
    mask = alive[:, None].to(attention.dtype).expand(B, H, N)
    # the graph of the survivors without copying it: dead columns are masked out of every vote and of the row sums
    votes = mask / (attention * mask[:, :, None]).sum(dim=-1)
    score = score * mask
    score = score * (mask.sum(dim=-1, keepdim=True) / score.sum(dim=-1, keepdim=True))
    for _ in range(num_iterations):
        score = ((score * votes)[:, :, None] @ attention)[:, :, 0] * mask
    return score


def head_mean(score: Tensor, *, variance: tuple[float, float] | None = (0.01, 0.7)) -> Tensor:
    """score: [B, H, T]. Returns [B, T]: root mean square over the heads that pass the variance filter (VHF, then EIR)."""
    squared = score**2
    if variance is None:
        return squared.mean(dim=1).sqrt()
    spread = score.var(dim=-1, unbiased=False)
    passes = (spread >= variance[0]) & (spread <= variance[1])
    passes = passes | ~passes.any(dim=1, keepdim=True)
    weight = passes.to(score.dtype)[..., None]
    return ((squared * weight).sum(dim=1) / weight.sum(dim=1)).sqrt()


def zero_tprune(
    attention: Tensor,
    key: Tensor,
    keep: int,
    *,
    num_similar: int = 10,
    num_iterations: int = 5,
    num_prefix: int = 1,
    is_uniform: bool = False,
    variance: tuple[float, float] | None = (0.01, 0.7),
) -> ReductionPlan:
    """One pruning layer: I', S, I.

    attention: [B, H, N, N] probabilities. key: [B, H, N, d], heads side by side are the feature of the S stage. keep: patches to keep.
    num_similar: patches that S removes. Prefix tokens stay, kept patches in raster order.
    """
    B, H, N, _ = attention.shape
    T = N - num_prefix
    num_similar = max(0, min(num_similar, T - keep, T // 2))
    with torch.no_grad():
        attention = attention.float()
        alive = torch.arange(T, device=key.device).expand(B, -1)
        if num_similar:
            vote = page_rank(attention, num_iterations=1, num_prefix=num_prefix, is_uniform=is_uniform)[..., num_prefix:]
            order = ranked(head_mean(vote, variance=variance))
            important, rest = order[:, : T - T // 2], order[:, T - T // 2 :]
            feature = F.normalize(key[:, :, num_prefix:].float().transpose(1, 2).flatten(2), dim=-1)
            closeness = (gather_rows(feature, rest) @ gather_rows(feature, important).transpose(1, 2)).amax(dim=-1)
            gone = mask_of(rest.gather(1, ranked(closeness)[:, :num_similar]), T)
            alive = alive[~gone].view(B, T - num_similar)
        if keep < alive.shape[1]:
            prefix = torch.ones(B, num_prefix, dtype=torch.bool, device=key.device)
            voters = torch.cat([prefix, mask_of(alive, T)], dim=1)
            score = page_rank(attention, num_iterations=num_iterations, num_prefix=num_prefix, is_uniform=is_uniform, alive=voters)
            score = gather_rows(score.transpose(1, 2), alive + num_prefix).transpose(1, 2)  # [B, H, survivors]
            alive = alive.gather(1, ranked(head_mean(score, variance=variance))[:, :keep].sort(dim=-1).values)
        prefix = torch.arange(num_prefix, device=key.device).expand(B, -1)
        index = torch.cat([prefix, alive + num_prefix], dim=1)
    return ReductionPlan(N, index)


def zero_tprune_iterations(layer: int, num_layers: int) -> int:
    """30 in the first quarter of the layers, 5 in the middle, 1 in the last quarter (the lower ends of the paper's ranges)."""
    if layer < num_layers / 4:
        return 30
    return 5 if layer < 3 * num_layers / 4 else 1


def zero_tprune_rates(num_layers: int) -> dict[int, float]:
    """Block to prune after, from 0 -> share kept: 1, .9, .8, .7, 1 after blocks 1, 3, 6, 9, 11 of 12; in proportion for other depths."""
    rates = {}
    for after, rate in zip((1, 3, 6, 9, 11), (1.0, 0.9, 0.8, 0.7, 1.0)):
        layer = max(1, round(after * num_layers / 12)) - 1
        rates[layer] = rates.get(layer, 1.0) * rate
    return rates


def zero_tprune_keeps(num_patches: int, rates: Sequence[float], num_similar: int) -> tuple[int, ...]:
    """Patches left after each pruning layer: num_similar removed by S, then the share `rate` of what is left, rounded up."""
    kept = []
    for rate in rates:
        num_patches -= min(num_similar, num_patches // 2)
        num_patches = max(1, math.ceil(num_patches * rate))
        kept.append(num_patches)
    return tuple(kept)
