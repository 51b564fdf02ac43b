"""In which order images are seen, and how each is varied: pure functions of a seed and a counter, so resuming needs one number.

Position p counts samples since the start of training, over all processes: p = 0, 1, 2, ... Epoch p // n visits all n images once, in a
random order of its own.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """Integers -> one 63-bit number, the same on every machine; for seeding."""
    text = ":".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class SampleOrder:
    """Position -> index of an image.

    num_samples: n. seed: another seed, another order. shuffle: False visits 0, 1, ..., n - 1 each epoch.
    Nothing changes between calls but a cache of the last two permutations (8 n bytes each).
    """

    def __init__(self, num_samples: int, seed: int = 0, *, shuffle: bool = True):
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))

    def indices(self, start: int, count: int) -> list[int]:
        """Indices at positions start, ..., start + count - 1; may cross epochs."""
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative, got {start} and {count}")
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.num_samples)
            found += self._permutation(epoch)[offset : offset + count - len(found)].tolist()
        return found


def augmentation(seed: int, positions: np.ndarray, *, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flip, and shift in pixels, of the samples at these positions: bool [B], int64 [B] down, int64 [B] right, each in [-shift, shift]."""
    with np.errstate(over="ignore"):
        # SplitMix64 of a stream chosen by the seed: one multiply-and-xor chain a position, no generator objects
        state = np.uint64(mix(seed, 0x5EED)) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = state ^ (state >> np.uint64(31))
    flips = (bits & np.uint64(1)).astype(bool)
    span = np.uint64(2 * shift + 1)
    down = ((bits >> np.uint64(8)) & np.uint64(0xFFFFFF)) % span
    right = ((bits >> np.uint64(32)) & np.uint64(0xFFFFFF)) % span
    return flips, down.astype(np.int64) - shift, right.astype(np.int64) - shift
