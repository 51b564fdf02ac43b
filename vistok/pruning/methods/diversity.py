"""Selections that spread over the features: DivPrune, CDPruner, DART. They see the tokens that enter the language model, no attention.

B batch, N visual tokens, D width, K kept. The greedy loops run over K; everything else is batched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.methods.topk import mask_of, ranked


def divprune(features: Tensor, keep: int) -> Tensor:
    """DivPrune (Alvar et al. 2025, arXiv 2503.02175): greedy max-min diversity.

    d_ij = 1 - cos(x_i, x_j); first the token farthest from its nearest neighbour; then, K - 1 times, argmax_j min_{i chosen} d_ij.
    features: [B, N, D]. Returns [B, K] int64 in the order of choice. O(N^2 D + K N) with a running minimum.
    """
    B, N, _ = features.shape
    _check_keep(keep, N)
    features = F.normalize(features.float(), dim=-1)
    distance = 1 - features @ features.transpose(1, 2)
    nearest = distance.topk(min(2, N), dim=-1, largest=False).values[..., -1]  # the smallest is the distance to itself
    chosen = [nearest.argmax(dim=-1)]
    batch = torch.arange(B, device=features.device)
    gap = torch.full((B, N), torch.inf, device=features.device)
    for _ in range(keep - 1):
        gap = torch.minimum(gap, distance[batch, chosen[-1]]).scatter(1, chosen[-1][:, None], -torch.inf)
        chosen.append(gap.argmax(dim=-1))
    return torch.stack(chosen, dim=1)


def text_relevance(image_embeds: Tensor, text_embeds: Tensor, *, is_inverted: bool = True) -> Tensor:
    """Relevance of each patch to the text: the mean of -cos over the text, scaled to [0, 1] in each image.

    image_embeds: [B, N, C], text_embeds: [T, C] or [B, T, C], of one contrastive model. The minus sign is intended: CLIP's patch-text
    similarity is inverted; is_inverted=False takes +cos, for embeddings where it is not. The reference scales over the whole batch, which
    makes an image depend on its neighbours.
    """
    cosine = F.normalize(image_embeds.float(), dim=-1) @ F.normalize(text_embeds.float(), dim=-1).transpose(-2, -1)
    relevance = cosine.mean(dim=-1) * (-1 if is_inverted else 1)
    low, high = relevance.amin(dim=-1, keepdim=True), relevance.amax(dim=-1, keepdim=True)
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-12)


def cdpruner(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """CDPruner (Zhang et al. 2025, arXiv 2506.10967): a determinantal point process conditioned on the text, by greedy MAP.

    L = diag(rel) S diag(rel), S = cos(features);  repeat K times: j = argmax d2;  e = (L_j - C^T c_j) / sqrt(d2_j);  d2 -= e^2.
    features: [B, N, D], relevance: [B, N]. Returns [B, K] int64 in the order of choice.
    """
    B, N, _ = features.shape
    _check_keep(keep, N)
    features = F.normalize(features.float(), dim=-1)
    kernel = relevance[:, :, None] * (features @ features.transpose(1, 2)) * relevance[:, None, :]
    residual = kernel.diagonal(dim1=1, dim2=2).clone()  # d2, [B, N]
    basis = torch.zeros(B, keep, N, device=features.device)
    batch = torch.arange(B, device=features.device)
    chosen = []
    for step in range(keep):
        best = residual.argmax(dim=-1)
        chosen.append(best)
        known = basis[:, :step]
        row = kernel[batch, best] - torch.einsum("bkn,bk->bn", known, known[batch, :, best])
        row = row / residual[batch, best].clamp(min=1e-12).sqrt()[:, None]
        basis[:, step] = row
        residual = (residual - row**2).scatter(1, torch.stack(chosen, 1), -torch.inf)
    return torch.stack(chosen, dim=1)


def dart(features: Tensor, key_norm: Tensor, keep: int, *, text: Tensor | None = None, num_pivots: int = 4) -> Tensor:
    """DART (Wen et al. 2025, arXiv 2502.11494): keep what duplicates the pivots least.

    Pivots are the visual tokens with the largest L1 key norm (and the given text tokens); each pivot in turn keeps its share of the
    remaining visual tokens, those of least cosine similarity to it. Visual pivots are kept themselves.
    features: [B, N, D] visual tokens. key_norm: [B, N]. text: [B, P, D] text pivots or None. Returns [B, keep] int64 in raster order.
    """
    B, N, _ = features.shape
    _check_keep(keep, N)
    num_pivots = min(num_pivots, keep)
    pivots = ranked(key_norm)[:, :num_pivots]
    features = F.normalize(features.float(), dim=-1)
    batch = torch.arange(B, device=features.device)[:, None]
    directions = features[batch, pivots]
    if text is not None:
        directions = torch.cat([directions, F.normalize(text.float(), dim=-1)], dim=1)
    similarity = directions @ features.transpose(1, 2)  # [B, pivots, N]
    taken = mask_of(pivots, N)
    left, turns = keep - num_pivots, directions.shape[1]
    for turn in range(turns):
        share = left // turns + (turn < left % turns)
        score = (-similarity[:, turn]).masked_fill(taken, -torch.inf)
        taken = taken | mask_of(ranked(score)[:, :share], N)
    return taken.nonzero()[:, 1].view(B, keep)


def _check_keep(keep: int, num_tokens: int) -> None:
    if not 1 <= keep <= num_tokens:
        raise ValueError(f"keep={keep} but there are 1 to {num_tokens} tokens to keep")
