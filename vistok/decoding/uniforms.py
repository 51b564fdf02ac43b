"""Uniform numbers for a loop whose rows go at their own pace: number n of image b is a function of b's generator and n alone.

    u(b, n) = mix(mix(key_b) + n * 0x9E3779B97F4A7C15) / 2^64          SplitMix64 (Steele et al. 2014), key_b drawn from b's generator

A torch.Generator a row would have to be called row by row at every step; a hash is one tensor operation for all of them, and the same on
every device. B images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vistok import rng

_AHEAD = 1024  # numbers made at once: a few tensor operations for many small draws


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> keeps the sign of an int64


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


class Uniforms:
    """A stream of uniforms on [0, 1) for each image; all rows draw equally many at a time."""

    def __init__(self, keys: Tensor):
        """keys: [B] int64, from the images' generators."""
        self._keys, self._used = _mix(keys), 0
        self._block, self._begin, self._end = torch.empty(len(keys), 0), 0, 0

    @classmethod
    def from_generators(cls, generators: Sequence[torch.Generator], device: torch.device | str) -> "Uniforms":
        """One key from each generator, which is advanced by it."""
        return cls(rng.randint(2**62, (), generators, device=device))

    def draw(self, count: int) -> Tensor:
        """The next `count` numbers of every row: [B, count] float64."""
        if self._used + count > self._end:
            ahead = max(count, min(_AHEAD, 2**20 // len(self._keys)))
            numbers = torch.arange(self._used + 1, self._used + 1 + ahead, device=self._keys.device)
            bits = _shifted(_mix(self._keys[:, None] + numbers * _GOLDEN), 11)
            self._block, self._begin, self._end = bits.double() * 2.0**-53, self._used, self._used + ahead
        first = self._used - self._begin
        self._used += count
        return self._block[:, first : first + count]


class GivenUniforms:
    """A stream that was written down beforehand, [B, n]; for tests and for repeating a run by hand."""

    def __init__(self, table: Tensor):
        self._table, self._used = table, 0

    def draw(self, count: int) -> Tensor:
        """The next columns [B, count]. Raises ValueError: there are not as many left."""
        if self._used + count > self._table.shape[1]:
            raise ValueError(f"uniforms hold {self._table.shape[1]} draws an image; {self._used + count} are asked for")
        self._used += count
        return self._table[:, self._used - count : self._used]
