"""Keys and values of the tokens seen so far, in memory that is allocated once.

Shapes: L layers, B rows (images, twice that with guidance), h heads, S capacity in positions, d head width, T new positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class KVCache:
    """Static cache: writes are slices at `length`, reads are views of the filled part, forgetting is lowering `length`.

    keys, values: [L, B, h, S, d]. length: positions filled, a Python int, so nothing here waits for the device.
    visible: [B, P] bool of the first P positions, False where later ones may not look (a caption's padding); None: they may everywhere.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (num_layers, batch_size, num_heads, max_length, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0
        self.visible: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        """Bytes of both tables, filled or not."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def check(self, num_new: int) -> None:
        """Raises ValueError: `num_new` more positions do not fit."""
        if self.length + num_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {self.length} are filled and {num_new} more do not fit")

    def layer(self, index: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What layer `index` gives to Attention: writes k, v [B, h, T, d] behind the filled part, returns views of all length + T.

        `length` itself moves when the last layer is through (`advance`). No gradient flows through a cache.
        """

        def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            start, end = self.length, self.length + k.shape[2]
            keys, values = self.keys[index], self.values[index]
            keys[:, :, start:end] = k.detach()
            values[:, :, start:end] = v.detach()
            return keys[:, :, :end], values[:, :, :end]

        return write

    def advance(self, num_new: int) -> None:
        """Count `num_new` positions, written by every layer, as filled."""
        self.check(num_new)
        self.length += num_new

    def rollback(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError: there are not that many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot go back to {length} positions: {self.length} are filled")
        self.length = length

    def keep_rows(self, num_rows: int) -> None:
        """Forget all rows but the first ones: the unconditional half, once guidance is over. Copies nothing."""
        self.keys, self.values = self.keys[:, :num_rows], self.values[:, :num_rows]
        self.visible = None if self.visible is None else self.visible[:num_rows]
