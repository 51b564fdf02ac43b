"""Randomness that belongs to an image, not to a batch.

Every random draw of the library comes from one `torch.Generator` per image, so that image i gets the same tokens and pixels whatever the
batch it travels in, whichever process it lands on, and wherever a training run was interrupted.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads neighbouring (seed, index) pairs over the whole range (SplitMix64)


def image_generators(seed: int, indices: int | Iterable[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per image; that of image i depends on (seed, i) alone.

    indices: the images' numbers, or how many there are (then 0, 1, ...).
    """
    numbers = range(indices) if isinstance(indices, int) else indices
    return [torch.Generator(device).manual_seed(_mix(seed, int(i))) for i in numbers]


def _mix(seed: int, index: int) -> int:
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * _MIX) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


def _stack(draw, generators: Sequence[torch.Generator], device: torch.device | str | None) -> Tensor:
    rows = torch.stack([draw(generator) for generator in generators])
    return rows if device is None else rows.to(device)


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], *, device=None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal [B, *shape]; row i comes from generators[i], drawn on that generator's device, then moved to `device`."""
    return _stack(lambda g: torch.randn(tuple(shape), generator=g, device=g.device, dtype=dtype), generators, device)


def rand(shape: Sequence[int], generators: Sequence[torch.Generator], *, device=None, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform on [0, 1), [B, *shape]; row i comes from generators[i]."""
    return _stack(lambda g: torch.rand(tuple(shape), generator=g, device=g.device, dtype=dtype), generators, device)


def randint(high: int, shape: Sequence[int], generators: Sequence[torch.Generator], *, device=None) -> Tensor:
    """Uniform integers in [0, high), int64 [B, *shape]; row i comes from generators[i]."""
    return _stack(lambda g: torch.randint(high, tuple(shape), generator=g, device=g.device), generators, device)
