"""Where evaluated images come from: a data set, or images already in memory. Anything with `len` and `read(i)` will do."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vistok.image import from_uint8, to_uint8


class ImageSource(Protocol):
    """Images by number; every `vistok.data` set is one."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, index: int) -> Tensor:
        """Image number `index`: [3, H, W] uint8."""


class ImagesInMemory:
    """Images that exist already: [N, 3, H, W] uint8, float images in [-1, 1], or a list of PIL images of one size."""

    def __init__(self, images: Tensor | Sequence):
        if not isinstance(images, Tensor):
            pixels = [to_uint8(image) for image in images]
            if len({tuple(image.shape) for image in pixels}) > 1:
                raise ValueError("images of different sizes cannot be compared as one set")
            images = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        elif images.is_floating_point():
            images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W], got {tuple(images.shape)}")
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Image number `index`: [3, H, W] uint8."""
        return self.images[index]


def choose(source: ImageSource, num_images: int | None, seed: int) -> list[int]:
    """All images, or `num_images` of them drawn by this seed, ascending. (The first ones of a sorted folder would be of one class.)"""
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if num_images is None or num_images >= len(source):
        return list(range(len(source)))
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return sorted(order[:num_images].tolist())


def batches(source: ImageSource, indices: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, images [B, 3, H, W] float32 in [-1, 1]) in order.

    A broken image, for which a data set would put the next good one in its place, is left out: an image must not count twice.
    """
    found, pixels = [], []
    for index in indices:
        actual, image = source.locate(index) if hasattr(source, "locate") else (index, source.read(index))
        if actual == index:
            found.append(index)
            pixels.append(image)
        if len(found) == batch_size:
            yield found, from_uint8(torch.stack(pixels))
            found, pixels = [], []
    if found:
        yield found, from_uint8(torch.stack(pixels))
