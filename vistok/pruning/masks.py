"""Index helpers for rows of tokens that become shorter: packing, gathering of tokens, masks and positions.

B prompts, L tokens of a row, K left of them; a row of indices [B, K] has -1 where a shorter prompt is filled on the left.
"""

import torch
from torch import Tensor

from vistok.pruning.plan import gather_rows


def pack_left(stays: Tensor) -> Tensor:
    """stays: [B, L] bool. Returns [B, K] int64: indices of True in order, -1 on the left of shorter rows."""
    index = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    return torch.where(stays, index, -1).sort(dim=-1).values[:, -int(stays.sum(dim=-1).max()) :]


def take(x: Tensor, rows: Tensor, fill: int = 0) -> Tensor:
    """x: [..., B or 1, L] at rows [B, K], `fill` where a row is -1: [..., B, K]."""
    B, K = rows.shape
    x = x.expand(*x.shape[:-2], B, x.shape[-1])
    taken = gather_rows(x.reshape(-1, B, x.shape[-1]).permute(1, 2, 0), rows.clamp(min=0))  # [B, K, leading]
    return taken.permute(2, 0, 1).reshape(*x.shape[:-2], B, K).masked_fill(rows < 0, fill)


def gather_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """x: [B or 1, L, ...] at rows [B, K]: [B, K, ...]. A filled place gets token 0; what is there must not be looked at."""
    return gather_rows(x.expand(rows.shape[0], *x.shape[1:]), rows.clamp(min=0))


def gather_square(mask: Tensor, rows: Tensor) -> Tensor:
    """mask: [B or 1, H or 1, L, L] at rows [B, K] in both axes: [B, H or 1, K, K]."""
    B, K = rows.shape
    mask, index = mask.expand(B, -1, -1, -1), rows.clamp(min=0)
    H, L = mask.shape[1], mask.shape[3]
    mask = mask.gather(2, index[:, None, :, None].expand(B, H, K, L))
    return mask.gather(3, index[:, None, None, :].expand(B, H, K, K))


def validity(mask, batch_size: int, length: int, device) -> tuple[Tensor, bool]:
    """mask: [B, total] of ones and zeros or None. Returns ([B, length] bool: which of the last tokens are no padding; whether all are).

    Raises ValueError for a mask prepared in four dimensions, where padding cannot be told from what a query may not see.
    """
    if mask is None or length == 1:  # a single new token is never padding; asking would wait for the device at every step
        return torch.ones(batch_size, length, dtype=torch.bool, device=device), True
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "give attention_mask as [B, L] ones and zeros: pruning inside the language model makes the masks of its layers itself"
        )
    is_valid = mask[:, -length:].bool()
    return is_valid, bool(is_valid.all())
