"""Pictures of a reduction: which patches are left, which were folded together, which are gone.

A patch that stands for itself shows the image. Patches folded into one token share a tint and an outline. A dropped patch is pale.
"""

import colorsys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TINT, PALE = 0.45, 0.8
_GOLDEN = 0.61803398875  # hues of neighbouring tokens lie far apart


def overlay(image: Tensor, owner: Tensor, grid: tuple[int, int], *, width: int = 288) -> Image.Image:
    """One image under one reduction.

    image: [3, H, W] in [-1, 1]. owner: [T] int64, the token each patch is in, -1 where it was dropped; patches in raster order.
    grid: rows and columns, T in all. width: pixels of the picture, rounded to whole pixels a patch.
    Raises ValueError: the grid does not hold T patches.
    """
    rows, columns = grid
    if owner.shape != (rows * columns,):
        raise ValueError(f"{tuple(owner.shape)} owners do not fill a grid of {rows} x {columns}")
    cell = max(4, round(width / columns))
    owner = owner.cpu().numpy().reshape(rows, columns)
    size = (rows * cell, columns * cell)
    picture = torch.nn.functional.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    pixels = ((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()
    strength, colour = _paint(owner)
    spread = lambda x: x.repeat(cell, axis=0).repeat(cell, axis=1)  # noqa: E731  patches to pixels
    pixels = pixels * (1 - spread(strength)) + spread(strength * colour)
    for below, right in ((1, 0), (0, 1)):  # an outline between patches of different tokens
        differs = owner[below:, right:] != owner[: rows - below, : columns - right]
        folded = (strength[..., 0] == TINT)[below:, right:] | (strength[..., 0] == TINT)[: rows - below, : columns - right]
        for row, column in np.argwhere(differs & folded):
            top, left = (row + below) * cell, (column + right) * cell
            pixels[top : top + (2 if below else cell), left : left + (cell if below else 2)] = 0.15
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _paint(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How strongly each patch is painted over, [h, w, 1], and with which colour, [h, w, 3] in [0, 1]."""
    strength, colour = np.zeros((*owner.shape, 1)), np.ones((*owner.shape, 3))
    for token in np.unique(owner):
        members = owner == token
        if token < 0:
            strength[members] = PALE
        elif members.sum() > 1:
            strength[members] = TINT
            colour[members] = colorsys.hsv_to_rgb(token * _GOLDEN % 1.0, 0.85, 1.0)
    return strength, colour
