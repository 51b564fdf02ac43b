"""DiffRate: drop the patches the class token ignores, fold the next ones into those it looks at; how many, each layer has learned.

Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", arXiv 2305.17997.

    o     = patches by falling attention of the class token (mean over heads)
    drop    o[K1:]            K1, K2: what the layer's pruning and its merging leave
    fold    o[K2:K1]          each into the most similar of o[:K2], by cosine of the block's normalised input

The rates were found by gradient descent with a budget loss; what is here are the static schedules that came out, as presets. Folding is the
size-weighted mean of all methods here, where the original takes the plain mean and scales the size by the similarity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.methods.topk import ranked
from vistok.pruning.plan import ReductionPlan, gather_rows

PRESETS = {
    "deit-small-2.9g": (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
}
"""Name -> tokens left by pruning and by merging in each layer, class token included, for 197 tokens and 12 layers."""


def diffrate(score: Tensor, metric: Tensor, pruned: int, merged: int, *, num_prefix: int = 1) -> ReductionPlan:
    """score: [B, T] of the patches. metric: [B, N, d]. pruned, merged: patches left by dropping, then by folding.

    Prefix tokens stay; what is left is in raster order.
    """
    B, T = score.shape
    if not 1 <= merged <= pruned <= T:
        raise ValueError(f"pruned={pruned}, merged={merged} but 1 <= merged <= pruned <= {T} patches")
    with torch.no_grad():
        order = ranked(score)[:, :pruned]
        stay, fold = order[:, :merged].sort(dim=-1).values, order[:, merged:]
        prefix = torch.arange(num_prefix, device=score.device).expand(B, -1)
        keep = torch.cat([prefix, stay + num_prefix], dim=1)
        if pruned == merged:
            return ReductionPlan(T + num_prefix, keep)
        metric = F.normalize(metric[:, num_prefix:].float(), dim=-1)
        slot = (gather_rows(metric, fold) @ gather_rows(metric, stay).transpose(1, 2)).argmax(dim=-1)
    return ReductionPlan(T + num_prefix, keep, fold + num_prefix, slot + num_prefix)


def diffrate_counts(preset: str, num_layers: int, num_patches: int) -> tuple[tuple[int, int], ...]:
    """(patches left by dropping, by folding) in each layer; a preset's shares at another number of patches or layers.

    Raises ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} but DiffRate has {', '.join(PRESETS)}")
    dropped, folded = PRESETS[preset]
    counts, left = [], num_patches
    for layer in range(num_layers):
        at = round(layer * (len(dropped) - 1) / max(1, num_layers - 1))
        pruned, merged = (max(1, round((count - 1) * num_patches / 196)) for count in (dropped[at], folded[at]))
        pruned = min(left, pruned)
        left = min(pruned, merged)
        counts.append((pruned, left))
    return tuple(counts)
