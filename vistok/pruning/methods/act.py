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
    sinks = (received > threshold).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=attention.device), False)
    return attention.index_copy(1, torch.tensor(list(heads), device=attention.device), turn_down(chosen, sinks, beta))


def turn_down(attention: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """attention: [B, H, R, L] probabilities of some rows. sinks: [B, H, L] bool. Returns the rows with the sinks' mass times beta."""
    sinks = sinks[:, :, None, :]
    turned = torch.where(sinks, attention * beta, attention)
    others = attention.masked_fill(sinks, 0).sum(dim=-1, keepdim=True)
    freed = attention.sum(dim=-1, keepdim=True) - turned.sum(dim=-1, keepdim=True)
    return torch.where(sinks, turned, attention * (1 + freed / others.clamp(min=torch.finfo(attention.dtype).tiny)))
