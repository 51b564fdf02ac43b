"""Where a token sits and when a diffusion step happens, as vectors.

Shapes: D width, h w grid, T times.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2D position table [width, h, w] (MoCo v3 layout, arXiv 2104.02057): sin, cos of the row, then sin, cos of the column.

    width must be a multiple of 4; frequencies are 10000^(-j / (width/4)).
    """
    if width % 4:
        raise ValueError(f"a 2D sine table needs a width that is a multiple of 4, got {width}")
    h, w = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = torch.arange(h, dtype=torch.float64)[:, None] * omega  # [h, D/4]
    columns = torch.arange(w, dtype=torch.float64)[:, None] * omega
    row_part = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(h, w, -1)
    column_part = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(h, w, -1)
    return torch.cat([row_part, column_part], dim=-1).permute(2, 0, 1).float().contiguous()


def fit_positions(table: Tensor, grid: tuple[int, int], *, interpolate: bool) -> Tensor:
    """Positions [D, h, w] for a grid from a table [D, H, W]: its top-left corner, or the whole of it resized bilinearly.

    Raises ValueError: the grid is larger than the table and interpolate is False.
    """
    h, w = grid
    if table.shape[-2:] == (h, w):
        return table
    if interpolate:
        return F.interpolate(table[None], size=(h, w), mode="bilinear", align_corners=True)[0]
    if h > table.shape[-2] or w > table.shape[-1]:
        raise ValueError(
            f"the image makes a {h} x {w} grid of patches but the position table holds {table.shape[-2]} x {table.shape[-1]}; "
            "use a smaller image, or a model with position_scaling='interpolate'"
        )
    return table[:, :h, :w]


def time_features(t: Tensor, *, width: int, max_period: float, time_scale: float = 1.0) -> Tensor:
    """Sinusoidal features [T, width] of times t [T]: cosines, then sines, of time_scale * t * max_period^(-j / (width/2)); an odd
    width ends in a zero."""
    half = width // 2
    frequencies = time_scale * torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))
