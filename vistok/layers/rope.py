"""Rotary positions on a grid: pairs of channels turn by an angle that grows with the row or the column.

Su et al. 2021 (arXiv 2104.09864), two-dimensional as in LlamaGen (arXiv 2406.06525):

    frequency_j = base^(-2 j / (d/2)),  j = 0 ... d/4 - 1
    angle       = row * frequency_j for the first d/4 pairs, column * frequency_j for the last d/4
    rotate      : (x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i+1 cos + x_2i sin)

Shapes: B batch, h heads, T tokens, d head width, N positions.
"""

import torch
from torch import Tensor


def rope_table(coordinates: Tensor, head_width: int, *, base: float = 10000.0) -> Tensor:
    """[N, d/2, 2] cosine and sine of every pair, from rows and columns [N, 2] counted in cells.

    Raises ValueError: head_width is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"2D rotary positions need a head width that is a multiple of 4, got {head_width}")
    half = head_width // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # [d/4]
    angles = (coordinates.double()[:, :, None] * frequencies).flatten(1)  # [N, d/2]: rows, then columns
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of x [..., T, d] by the T rows of a table [T, d/2, 2], or by other tables that broadcast against the pairs.

    A row (1, 0) leaves x alone; a row (0, 0) makes it zero, so that every query scores it 0 (LlamaGen's condition tokens).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # the same products and sums in one kernel instead of eight; compilers fuse the form below and know no complex numbers
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table.float())).flatten(-2).to(x.dtype)
    cos, sin = table[..., 0], table[..., 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
