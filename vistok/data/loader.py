"""Endless batches of images from any position on: the same global batches whatever the number of processes or threads."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vistok.data.base import ImageDataset, read_all
from vistok.data.order import SampleOrder, augmentation
from vistok.image import from_uint8

KEEP_DECODED_BYTES = 512 * 2**20
"""A data set smaller than this is decoded once and kept as one uint8 tensor."""
READ_AHEAD = 2
"""Batches that threads prepare before they are asked for."""


@dataclass(frozen=True)
class Batch:
    """Some training images and what belongs to them; B rows.

    images: [B, 3, H, W] float32 in [-1, 1], flipped and shifted. labels: [B] int64, -1 when there is none. captions: B texts.
    indices: [B] int64, which image of the data set. flips: [B] bool. positions: [B] int64, counted over all processes since the start.
    """

    images: Tensor
    labels: Tensor
    captions: list[str]
    indices: Tensor
    flips: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> "Batch":
        """A copy with its tensors on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class BatchLoader:
    """Iterate over batches for ever, beginning at sample `start`; every `iter` begins there anew.

    batch_size: rows of the global batch; this process yields batch_size / world_size of them (rows rank, rank + world_size, ...).
    seed: of the order and the augmentation, both pure functions of (seed, position). start: samples seen before, over all processes.
    flip: mirror half of the images. shift: move each image by up to this many pixels, repeating the edge.
    workers: threads that decode ahead when the data set is too large to keep decoded; 0 decodes in this thread.
    To resume after k batches: the same loader with start = old start + k * batch_size.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        flip: bool = True,
        shift: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} but there are {world_size} processes")
        if start < 0 or shift < 0 or workers < 0:
            raise ValueError(f"start, shift and workers must not be negative, got {start}, {shift} and {workers}")
        self.dataset, self.batch_size, self.seed, self.start = dataset, batch_size, seed, start
        self.flip, self.shift = flip, shift
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.order = SampleOrder(len(dataset), seed, shuffle=shuffle)
        self._labels = torch.tensor(dataset.labels, dtype=torch.int64)
        self._decoded: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.dataset.num_bytes <= KEEP_DECODED_BYTES and self._decoded is None:
            if self.workers:
                with ThreadPoolExecutor(self.workers) as pool:
                    self._decoded = read_all(self.dataset, map_fn=pool.map)
            else:
                self._decoded = read_all(self.dataset)
        if self._decoded is not None or not self.workers:
            return self._read_now()
        return self._read_ahead()

    def _read_now(self) -> Iterator[Batch]:
        start = self.start
        while True:
            positions = self._positions(start)
            rows = self._rows(positions)
            if self._decoded is None:
                yield self._located_batch(positions, [self.dataset.locate(row) for row in rows])
            else:
                images, indices = self._decoded
                yield self._batch(positions, indices[rows], images[rows])
            start += self.batch_size

    def _read_ahead(self) -> Iterator[Batch]:
        pending: deque[tuple[np.ndarray, list[Future]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                start = self.start
                while True:
                    while len(pending) < READ_AHEAD:
                        positions = self._positions(start)
                        pending.append((positions, [pool.submit(self.dataset.locate, row) for row in self._rows(positions)]))
                        start += self.batch_size
                    positions, futures = pending.popleft()
                    yield self._located_batch(positions, [future.result() for future in futures])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _positions(self, start: int) -> np.ndarray:
        return np.arange(start + self.rank, start + self.batch_size, self.world_size)

    def _rows(self, positions: np.ndarray) -> list[int]:
        first = int(positions[0]) - self.rank
        return self.order.indices(first, self.batch_size)[self.rank :: self.world_size]

    def _located_batch(self, positions: np.ndarray, located: list[tuple[int, Tensor]]) -> Batch:
        indices, images = zip(*located, strict=True)
        return self._batch(positions, torch.tensor(indices), torch.stack(images))

    def _batch(self, positions: np.ndarray, indices: Tensor, pixels: Tensor) -> Batch:
        captions = [self.dataset.captions[i] for i in indices.tolist()]
        return make_batch(pixels, self._labels[indices], captions, indices, positions, seed=self.seed, flip=self.flip, shift=self.shift)


def make_batch(
    pixels: Tensor, labels: Tensor, captions: list[str], indices: Tensor, positions: np.ndarray, *, seed: int, flip: bool, shift: int
) -> Batch:
    """Flip and shift decoded images as (seed, position) say. pixels: [B, 3, H, W] uint8; the others as in Batch, positions as an array."""
    flips, down, right = augmentation(seed, positions, shift=shift)
    flips = torch.from_numpy(flips if flip else np.zeros_like(flips))
    images = from_uint8(_move(pixels, flips, torch.from_numpy(down), torch.from_numpy(right)))
    return Batch(images, labels, captions, indices, flips, torch.from_numpy(positions.astype(np.int64)))


def _move(pixels: Tensor, flips: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Mirror, then shift each image of [B, C, H, W], repeating the edge."""
    B, C, H, W = pixels.shape
    rows = (torch.arange(H) - down[:, None]).clamp(0, H - 1)  # [B, H]: where each row comes from
    columns = (torch.arange(W) - right[:, None]).clamp(0, W - 1)
    columns = torch.where(flips[:, None], W - 1 - columns, columns)
    pixels = pixels.gather(2, rows[:, None, :, None].expand(B, C, H, W))
    return pixels.gather(3, columns[:, None, None, :].expand(B, C, H, W))
