"""A key/value cache whose rows have lengths of their own: trees of drafts behind each row, cells in any order.

A pass may hold inputs that do not follow one another. `Placement` says where each of them stands: which visual token it is, which cache
slot it fills and which slots it sees. Forgetting is lowering a row's length; keeping one path of a tree is moving its slots together.

Shapes: L layers, B rows, h heads, S slots, d head width, P prefix slots, M inputs of a pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.layers.kv_cache import KVCache

_BUCKET = 32  # a pass reads a multiple of this many slots, so that a compiled model sees few shapes


@dataclass(frozen=True)
class Placement:
    """Where the M inputs of a pass stand."""

    positions: Tensor
    """[B, M] int64: which visual token of the image an input is, from 0."""
    slots: Tensor
    """[B, M] int64: where its key and value go."""
    mask: Tensor | None
    """[B, 1, M, S] bool: the slots it sees; S is how many slots the pass reads. None: all S, up to its own."""
    start: int | None = None
    """The first slot, where all rows fill the same M slots in a row: a copy is then a slice."""


class PlacedCache:
    """Keys and values with one length a row; shares the memory of a `KVCache` that holds the prefix.

    keys, values: [L, B, h, capacity, d]. lengths: [B] int64, slots that count; the prefix has P of them. prefix: the cache it was made of.
    """

    def __init__(self, cache: KVCache):
        self.prefix, self.keys, self.values, self.visible = cache, cache.keys, cache.values, cache.visible
        self.prefix_length = cache.length
        self.lengths = torch.full((cache.batch_size,), cache.length, dtype=torch.int64, device=cache.keys.device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def layer(self, index: int, placement: Placement) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What layer `index` gives to Attention: writes k, v [B, h, M, d] to their slots, returns views of the S slots that are read."""
        start, mask = placement.start, placement.mask
        S = start + placement.slots.shape[1] if mask is None else mask.shape[-1]

        def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            for table, new in ((self.keys[index], k), (self.values[index], v)):
                if start is not None:
                    table[:, :, start : start + new.shape[2]] = new
                else:
                    rows = torch.arange(len(new), device=new.device)[:, None]
                    table.transpose(1, 2)[rows, placement.slots] = new.transpose(1, 2)
            return self.keys[index, :, :, :S], self.values[index, :, :, :S]

        return write

    def behind(
        self, depths: Tensor, ancestors: Tensor, *, lengths: Tensor | None = None, span: tuple[int, int], offset: int = 0
    ) -> Placement:
        """A tree behind each row's length; its inputs fill the next slots in node order.

        depths: [1 or B, M], added to the row's next position. ancestors: [1 or B, M, offset + M] bool, who sees whom among the last
        offset + M slots (the first `offset` of them were filled by earlier levels of the same tree).
        lengths: [B], of this cache by default. span: the smallest and largest of them, Python numbers so that nothing waits for the device.
        Raises ValueError: the tree does not fit.
        """
        lengths = self.lengths if lengths is None else lengths
        B, M = len(lengths), depths.shape[1]
        shortest, longest = span
        end = longest + offset + M
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {longest} are filled and {offset + M} more do not fit")
        start = longest + offset if shortest == longest else None
        if M == 1 and not offset and start is not None and self.visible is None:  # a plain step: it sees all that is there
            first = lengths[:, None]
            return Placement(first - self.prefix_length + depths, first, None, start)
        S = min(-(-end // _BUCKET) * _BUCKET, self.capacity)
        first = lengths[:, None]  # the slot of the root
        slots = first + offset + torch.arange(M, device=lengths.device)
        slot = torch.arange(S, device=lengths.device)
        mask = (slot < first)[:, None].expand(B, M, S)
        if self.visible is not None:
            hidden = F.pad(~self.visible, (0, S - self.visible.shape[1]))
            mask = mask & ~hidden[:, None]
        # the tree's own part: slot s is node s - length of it
        node = (slot - first).clamp(0, ancestors.shape[2] - 1)[:, None].expand(B, M, S)
        inside = ((slot >= first) & (slot < first + ancestors.shape[2]))[:, None]
        mask = mask | (inside & ancestors.expand(B, -1, -1).gather(2, node))
        return Placement(first - self.prefix_length + depths, slots, mask[:, None], start)

    def keep_rows(self, num_rows: int) -> None:
        """Forget all rows but the first ones: the unconditional half, once guidance is over. Copies nothing."""
        self.prefix.keep_rows(num_rows)
        self.keys, self.values, self.lengths = self.keys[:, :num_rows], self.values[:, :num_rows], self.lengths[:num_rows]
        self.visible = None if self.visible is None else self.visible[:num_rows]

    def keep(self, path: Tensor, accepted: Tensor, *, is_chain: bool) -> None:
        """Keep the slots of each row's path, the root and its accepted nodes, and forget the others.

        path: [B, D + 1] nodes from 0, anything behind `accepted` [B] + 1 of them. accepted: -1 where a row keeps nothing.
        is_chain: the nodes of a path are consecutive already, so that only the lengths move.
        """
        if not is_chain and path.shape[1] > 1:
            first = self.lengths[:, None]
            steps = torch.arange(path.shape[1], device=path.device)
            source = first + torch.where(steps <= accepted[:, None], path, steps)
            rows = torch.arange(len(path), device=path.device)[:, None]
            target = first + steps
            for table in (self.keys, self.values):
                by_slot = table.transpose(2, 3)  # [L, B, capacity, h, d], a view; gathered before it is written: source and target overlap
                by_slot[:, rows, target] = by_slot[:, rows, source]
        self.lengths = self.lengths + accepted + 1
