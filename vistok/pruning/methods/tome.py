"""ToMe: merge the most similar tokens of two alternating halves.

Bolya et al. 2022, "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3.

    A, B     = even, odd positions of the whole sequence, prefix included
    S        = cos(metric_A, metric_B);  a prefix token in A is never a source, one in B never a destination
    best_i   = max_j S_ij;  dst_i = argmax_j S_ij
    the r rows of A with the largest best_i are folded into dst_i; the rest of A and all of B stay

The metric is the mean of the keys over the heads. B batch, N tokens with the P prefix tokens first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.plan import ReductionPlan

Schedule = int | Sequence[int] | tuple[int, float]


def tome_schedule(num_layers: int, r: Schedule) -> tuple[int, ...]:
    """Tokens to merge in each layer.

    r: an int for a constant schedule; a list for one number a layer (missing ones are 0); a tuple (r, inflection) for a linear one with
    mean r that rises for inflection in (0, 1] and falls for [-1, 0). Source: section 3 and appendix D; the ramp is cut off, not rounded.
    """
    if isinstance(r, tuple):
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection must be in [-1, 1], got {inflection}")
        if num_layers == 1:
            return (int(mean),)
        low = int(mean * (1.0 - inflection))
        high = 2 * mean - low
        return tuple(int(low + layer * (high - low) / (num_layers - 1)) for layer in range(num_layers))
    if isinstance(r, int):
        return (r,) * num_layers
    if len(r) > num_layers:
        raise ValueError(f"r names {len(r)} layers but the model has {num_layers}")
    return (*r, *[0] * (num_layers - len(r)))


def even_schedule(num_layers: int, num_patches: int, keep: int) -> tuple[int, ...]:
    """Tokens to remove in each layer so that `keep` of `num_patches` are left at the end, as evenly as merging at most half allows."""
    if not 1 <= keep <= num_patches:
        raise ValueError(f"keep={keep} but there are 1 to {num_patches} patch tokens to keep")
    left, schedule = num_patches, []
    for layer in range(num_layers):
        later = num_layers - layer - 1
        # from at most keep * 2^later tokens the later layers can still get there
        r = min(max(math.ceil((left - keep) / (later + 1)), left - (keep << later)), left // 2)
        schedule.append(r)
        left -= r
    if left != keep:
        raise ValueError(f"keep={keep} of {num_patches}: {num_layers} layers can halve the tokens to {left} at most")
    return tuple(schedule)


def tome(metric: Tensor, r: int, *, num_prefix: int = 1, sort_unmerged: bool = True) -> ReductionPlan:
    """Bipartite soft matching.

    metric: [B, N, d], compared by cosine in float32. r: tokens to merge, at most half of the patch tokens (more is cut to that).
    sort_unmerged: keep the unmerged tokens of A in raster order; False leaves them by falling similarity, as the reference does for
    models without a class token.
    Output order: prefix, unmerged A, B; N - r tokens.
    """
    B, N, _ = metric.shape
    r = min(r, (N - num_prefix) // 2)
    if r <= 0:
        return ReductionPlan.identity(B, N, metric.device)
    with torch.no_grad():
        metric = F.normalize(metric.float(), dim=-1)
        first_a, first_b = (num_prefix + 1) // 2 * 2, num_prefix // 2 * 2 + 1  # the first patches at even and at odd positions
        similarity = torch.bmm(metric[:, first_a::2], metric[:, first_b::2].transpose(1, 2))
        order = similarity.amax(dim=-1).argsort(dim=-1, descending=True, stable=True)  # [B, patches in A]
        chosen = order[:, :r, None].expand(-1, -1, similarity.shape[2])
        slot = similarity.gather(1, chosen).argmax(dim=-1).add_(num_prefix + order.shape[1] - r)
        order = order.mul_(2).add_(first_a)  # as positions
        merged, unmerged = order[:, :r], order[:, r:]
        if sort_unmerged:
            unmerged = unmerged.sort(dim=-1).values
        position = torch.arange(N, device=metric.device).expand(B, -1)
        keep = torch.cat([position[:, :num_prefix], unmerged, position[:, first_b::2]], dim=1)
    return ReductionPlan(N, keep, merged, slot)


def kth_tome(metric: Tensor, every: int) -> ReductionPlan:
    """Keep the last token of each run of `every` and fold each other token into the kept one most similar to it: N // every are left.

    metric: [B, N, d]. Tokens after the last whole run are dropped.
    """
    B, N, _ = metric.shape
    if not 1 < every <= N:
        raise ValueError(f"every={every} but it is 2 to {N}")
    with torch.no_grad():
        metric = F.normalize(metric.float(), dim=-1)
        position = torch.arange(N // every * every, device=metric.device).unflatten(0, (-1, every))
        kept, folded = position[:, -1], position[:, :-1].flatten()
        slot = (metric[:, folded] @ metric[:, kept].transpose(1, 2)).argmax(dim=-1)
    return ReductionPlan(N, kept.expand(B, -1), folded.expand(B, -1), slot)
