"""ACT: turn down attention sinks in chosen heads. It changes attention maps and drops no token.

Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765, section 4.

    received_t = sum_i A_it / (L - t);   sinks = {t > 0: received_t > threshold}
    A[:, sinks] *= beta;   the freed mass of a row goes to its other columns in proportion
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def act(attention: Tensor, *, beta: float, threshold: float, heads: Sequence[int]) -> Tensor:
    """attention: [B, H, L, L] causal probabilities. heads: those to calibrate. Returns the maps, the other heads unchanged."""
    L = attention.shape[-1]
    chosen = attention[:, list(heads)]
    received = chosen.sum(dim=-2) / torch.arange(L, 0, -1, device=attention.device)
    sinks = (received > threshold).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=attention.device), False)[:, :, None, :]
    turned = torch.where(sinks, chosen * beta, chosen)
    others = chosen.masked_fill(sinks, 0).sum(dim=-1, keepdim=True)
    freed = chosen.sum(dim=-1, keepdim=True) - turned.sum(dim=-1, keepdim=True)
    calibrated = torch.where(sinks, turned, chosen * (1 + freed / others.clamp(min=torch.finfo(chosen.dtype).tiny)))
    return attention.index_copy(1, torch.tensor(list(heads), device=attention.device), calibrated)
