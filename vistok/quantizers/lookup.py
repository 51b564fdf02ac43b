"""The nearest code of each vector, without ever holding the N x K distance matrix.

    argmin_k |x - c_k|^2 = argmax_k (x . c_k - |c_k|^2 / 2)
"""

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 22  # scores held at a time: 16 MB in float32


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, *, block_entries: int = BLOCK_ENTRIES) -> Tensor:
    """Index of the nearest code (Euclidean; the lowest of equals).

    vectors: [..., d]; codebook: [K, d]. Computed in float32, outside autocast. Returns ids [...] int64.
    Memory: block_entries scores at a time, whatever N and K.
    Raises ValueError: the widths differ.
    """
    if vectors.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"vectors have width {vectors.shape[-1]}, the codebook {codebook.shape[-1]}")
    flat, codes = vectors.reshape(-1, vectors.shape[-1]).float(), codebook.float()
    rows = max(1, block_entries // codes.shape[0])
    bias = codes.square().sum(1).mul(-0.5)
    with torch.autocast(vectors.device.type, enabled=False):
        ids = [torch.addmm(bias, block, codes.t()).argmax(1) for block in flat.split(rows)]
    return torch.cat(ids).view(vectors.shape[:-1]) if ids else flat.new_zeros(vectors.shape[:-1], dtype=torch.int64)
