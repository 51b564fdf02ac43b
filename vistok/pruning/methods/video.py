"""EVS: of a video, keep what changed since the frame before.

Efficient video sampling (Bagrov et al. 2025, arXiv 2510.14624), section 3: every cell of the first frame stays; of the others, the cells
whose feature has the lowest cosine to the same cell one frame earlier.

T frames, N cells a frame, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.methods.topk import top_indices


def evs(features: Tensor, keep: int) -> Tensor:
    """features: [B, T, N, D]. Returns [B, keep] int64 indices into the T * N cells, in order.

    Raises ValueError when keep is smaller than a frame: the first one stays whole.
    """
    B, T, N, _ = features.shape
    if not N <= keep <= T * N:
        raise ValueError(f"keep={keep} but the first frame of {N} tokens stays whole and there are {T * N}")
    features = F.normalize(features.float(), dim=-1)
    change = 1 - (features[:, 1:] * features[:, :-1]).sum(dim=-1)  # [B, T-1, N]
    score = torch.cat([change.new_full((B, 1, N), torch.inf), change], dim=1)
    return top_indices(score.flatten(1), keep)
