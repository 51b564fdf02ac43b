"""The nearest code of each vector, without ever holding the N x K distance matrix.

    argmin_k |x - c_k|^2 = argmax_k (x . c_k - |c_k|^2 / 2)
    cosine: argmax_k x . c_k / |c_k|                             |x| changes nothing

N vectors of width d, K codes, k neighbours.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ENTRIES = 1 << 22  # scores held at a time: 16 MB in float32


@torch.no_grad()
def nearest_codes(
    vectors: Tensor,
    codebook: Tensor,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    k: int | None = None,
    block_entries: int = BLOCK_ENTRIES,
) -> Tensor:
    """Index of the nearest code, the lowest of equals; or of the k nearest, nearest first.

    vectors: [..., d]; codebook: [K, d]. Computed in float32, outside autocast. A NaN or infinite entry counts as 0 or the largest float.
    Returns ids [...] int64, or [..., k] where k is given (among equals, any order).
    Memory: block_entries scores at a time, whatever N and K.
    Raises ValueError: the widths differ; k outside [1, K]; an unknown metric.
    """
    if vectors.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"vectors have width {vectors.shape[-1]}, the codebook {codebook.shape[-1]}")
    if k is not None and not 1 <= k <= codebook.shape[0]:
        raise ValueError(f"k={k} neighbours of {codebook.shape[0]} codes; k must be in [1, {codebook.shape[0]}]")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
    flat, codes = vectors.reshape(-1, vectors.shape[-1]).float(), codebook.float()
    codes = F.normalize(codes, dim=-1) if metric == "cosine" else codes
    # on the unit sphere every bias is the same but for rounding, which would then decide ties
    bias = codes.new_zeros(len(codes)) if metric == "cosine" else codes.square().sum(1).mul(-0.5)
    rows = max(1, block_entries // len(codes))
    shape = vectors.shape[:-1] if k is None else (*vectors.shape[:-1], k)
    ids = torch.empty(flat.shape[0] if k is None else (flat.shape[0], k), dtype=torch.int64, device=flat.device)
    with torch.autocast(flat.device.type, enabled=False):
        scores = flat.new_empty(min(rows, len(flat)), len(codes))  # one buffer for all blocks
        for start in range(0, len(flat), rows):
            block = flat[start : start + rows].nan_to_num()  # a NaN image must not index outside the codebook
            out = torch.addmm(bias, block, codes.t(), out=scores[: len(block)])
            ids[start : start + rows] = out.argmax(1) if k is None else out.topk(k, dim=1).indices
    return ids.view(shape)
