"""Selections and merges by what the vision encoder attends to: VisionZip, PruMerge(+), HiPrune, VScan (first stage), FlowCut.

They act on the output of the vision tower. B batch, N patch tokens (a square grid), D width, K kept; "cls" is the attention of the class
token to the patches. Towers without a class token use the attention a patch receives instead.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.methods.topk import mask_of, ranked, top_indices
from vistok.pruning.plan import gather_rows


def visionzip(hidden: Tensor, attention: Tensor, key: Tensor, *, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """VisionZip (Yang et al. 2024, arXiv 2412.04467): keep the dominant tokens, merge the rest into a few evenly spaced ones.

    hidden: [B, 1+N, D] and key: [B, 1+N, d] (mean over heads) with CLS first. attention: [B, H, N] of CLS to the patches.
    Returns (indices [B, 1+dominant] in raster order, CLS first; tokens [B, 1+dominant+contextual, D]). A contextual token is a target
    plus the mean of the tokens most similar to it.
    """
    B, N = hidden.shape[0], hidden.shape[1] - 1
    if dominant + contextual > N:
        raise ValueError(f"dominant={dominant} and contextual={contextual} are more than the {N} patch tokens")
    best = top_indices(attention.float().sum(dim=1), dominant) + 1
    indices = torch.cat([best.new_zeros(B, 1), best], dim=1)
    rest = (~mask_of(indices, N + 1)).nonzero()[:, 1].view(B, N - dominant)
    tokens = [gather_rows(hidden, indices)]
    if contextual:
        step = max(1, rest.shape[1] // contextual)
        is_target = mask_of(torch.arange(contextual, device=hidden.device)[None] * step, rest.shape[1])[0]
        targets, others = rest[:, is_target], rest[:, ~is_target]
        metric = F.normalize(key.float(), dim=-1)
        owner = (gather_rows(metric, others) @ gather_rows(metric, targets).transpose(1, 2)).argmax(dim=-1)
        members = F.one_hot(owner, contextual).to(hidden.dtype).transpose(1, 2)  # [B, contextual, others]
        count = members.sum(dim=-1, keepdim=True).clamp(min=1)
        tokens.append(gather_rows(hidden, targets) + members @ gather_rows(hidden, others) / count)
    return indices, torch.cat(tokens, dim=1)


def outlier_share(attention: Tensor) -> float:
    """Share of values above Q3 + 1.5 IQR. attention: [N]."""
    attention = attention.float()
    first, third = attention.quantile(0.25), attention.quantile(0.75)
    return int((attention > third + 1.5 * (third - first)).sum()) / attention.numel()


def prumerge_kept(attention: Tensor, share: float, *, is_plus: bool = False) -> Tensor:
    """attention: [N]. Returns the kept indices: the best int(N * share) by falling attention, then, for "plus", a grid of every
    int(int(1 / share) / 3)-th token."""
    N = attention.shape[0]
    kept = ranked(attention[None])[0, : max(1, int(N * share))]
    if is_plus:
        step = max(1, int(int(1 / max(share, 1 / N)) / 3))
        grid = torch.arange(0, N - 1, step, device=attention.device)
        kept = torch.cat([kept, grid[~torch.isin(grid, kept)]])
    return kept


def prumerge_merge(x: Tensor, key: Tensor, attention: Tensor, kept: Tensor, *, num_neighbours: int = 32) -> Tensor:
    """x: [N, D], key: [N, d], attention: [N], kept: [K] indices. Returns [K+1, D]: y_i = x_i + sum over the nearest j by key cosine of
    a_j x_j, and last the sum of the dropped a_j x_j."""
    N = x.shape[0]
    key = F.normalize(key, dim=-1)
    similarity = key[kept] @ key.T
    similarity[torch.arange(kept.numel(), device=x.device), kept] = -torch.inf
    neighbours = similarity.topk(min(num_neighbours, N - 1), dim=-1).indices
    weighted = attention.to(x.dtype)[:, None] * x
    merged = x[kept] + weighted[neighbours].sum(dim=1)
    extra = weighted[~mask_of(kept[None], N)[0]].sum(dim=0, keepdim=True)
    return torch.cat([merged, extra])


def prumerge(
    features: Tensor, query: Tensor, key: Tensor, *, is_plus: bool = False, keep_ratio: float | None = None, num_neighbours: int = 32
) -> Tensor:
    """LLaVA-PruMerge (Shang et al. 2024, arXiv 2403.15388): keep the tokens CLS looks at, each with its neighbours folded in.

    a = softmax(q k^T D^-1/2)[CLS, patches];  y_i = x_i + sum over the 32 nearest j by key cosine of a_j x_j (weights not normalised);
    one more token is the sum of the dropped a_j x_j. The kept share is the share of outliers of a, unless given; "plus" adds a grid.
    features, query, key: [1, 1+N, D] of the last layer, heads side by side, CLS first: the share, so the length, belongs to one image.
    Returns [1, K+1, D]: kept tokens by falling attention, then the grid, then the extra one.
    """
    if features.shape[0] != 1:
        raise ValueError(
            f"PruMerge keeps another number of tokens in every image: call it image by image, got a batch of {features.shape[0]}"
        )
    attention = (query[0, 0].float() @ key[0].float().T * features.shape[2] ** -0.5).softmax(dim=-1)[1:]  # [N]
    share = outlier_share(attention) if keep_ratio is None else keep_ratio
    kept = prumerge_kept(attention, share, is_plus=is_plus)
    return prumerge_merge(features[0, 1:], key[0, 1:].float(), attention, kept, num_neighbours=num_neighbours)[None]


def hiprune(middle: Tensor, deep: Tensor, keep: int, *, alpha: float = 0.1, grid_width: int | None = None) -> Tensor:
    """HiPrune (Liu et al. 2025, arXiv 2508.00553): anchors of a middle layer with their four neighbours, the rest by a deep layer.

    middle, deep: [B, N] attention received in the object layer and in the last but one. round(keep * alpha / 5) anchors.
    Returns [B, N] bool with `keep` True a row. Neighbours are index +- 1 and +- width, cut to the sequence, so they wrap over row ends as
    in the reference.
    """
    N = middle.shape[1]
    width = math.isqrt(N) if grid_width is None else grid_width
    anchors = ranked(middle)[:, : round(keep * alpha / 5)]
    around = torch.tensor([0, -1, 1, -width, width], device=middle.device)
    first = mask_of((anchors[..., None] + around).clamp(0, N - 1).flatten(1), N)
    rank = ranked(deep.float().masked_fill(first, -torch.inf)).argsort(dim=-1)
    return first | (rank < keep - first.sum(dim=1, keepdim=True))


def vscan_mask(shallow: Tensor, deep: Tensor, keep: int, *, window: int = 6, grid_width: int | None = None) -> Tensor:
    """VScan, first stage (Zhang et al. 2025, arXiv 2505.22654): half local by windows of a shallow layer, half global by a deep one.

    shallow, deep: [B, N] CLS attention. Every window x window square keeps an equal number of its best by `shallow`; the best of the others
    by `deep` fill up to `keep`. Returns [B, N] bool with `keep` True a row.
    """
    B, N = shallow.shape
    width = math.isqrt(N) if grid_width is None else grid_width
    if width % window or N % width or (N // width) % window:
        raise ValueError(f"a grid of {N // width} x {width} is not made of whole {window} x {window} windows")
    rows, columns = N // width // window, width // window
    index = (
        torch.arange(N, device=shallow.device).view(rows, window, columns, window).transpose(1, 2).flatten(2).flatten(0, 1)
    )  # [windows, cells]
    each = keep // 2 // index.shape[0]
    best = ranked(shallow[:, index].flatten(0, 1))[:, :each].unflatten(0, (B, -1))  # [B, windows, each]
    local = mask_of(index.expand(B, -1, -1).gather(2, best).flatten(1), N)
    return local | mask_of(ranked(deep.float().masked_fill(local, -torch.inf))[:, : keep - each * index.shape[0]], N)


def vscan_merge(features: Tensor, mask: Tensor) -> Tensor:
    """Average each dropped token into the kept one most similar to it.

    features: [B, N, D]. mask: [B, N] bool, the same number kept in every row. Returns [B, K, D]: means of the groups, in raster order.
    """
    B, N, _ = features.shape
    metric = F.normalize(features.float(), dim=-1)
    similarity = metric @ metric.transpose(1, 2)
    owner = similarity.masked_fill(~mask[:, None, :], -torch.inf).argmax(dim=-1)
    owner = torch.where(mask, torch.arange(N, device=mask.device), owner)
    members = F.one_hot(owner, N).to(features.dtype).transpose(1, 2)
    return (members @ features / members.sum(dim=-1, keepdim=True).clamp(min=1))[mask].view(B, -1, features.shape[-1])


def flowcut_score(cls: Tensor, semantic: Tensor, value: Tensor, previous: Tensor | None = None, *, momentum: float = 0.5) -> Tensor:
    """FlowCut (Tong et al. 2025, arXiv 2505.19536): (cls/sum + semantic/sum) * |v|_1, averaged with the score so far.

    cls: [B, N] CLS attention. semantic: [B, N] similarity to CLS. value: [B, N, D]. previous: [B, N] or None. Returns [B, N].
    """
    score = (cls / cls.sum(dim=-1, keepdim=True) + semantic / semantic.sum(dim=-1, keepdim=True)) * value.abs().sum(dim=-1)
    return score if previous is None else momentum * previous + (1 - momentum) * score


def flowcut_count(cls: Tensor, layers_left: int, target: int) -> list[int]:
    """How many tokens FlowCut prunes now: int((N - target) / sqrt(layers_left) * (1 - H^2)).

    H in [0, 1] is the entropy of the CLS row over its maximum: a row that has made up its mind prunes more. cls: [B, N], normalised here.
    """
    N = cls.shape[1]
    p = cls.float() / cls.float().sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(p).sum(dim=-1) / math.log(N)
    return [int(count) for count in ((N - target) / math.sqrt(layers_left) * (1 - entropy**2)).tolist()]
