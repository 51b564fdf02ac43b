"""Pictures a tokenizer's training shows: the same few images of the data set, above what is left of them."""

import torch
from torch import Tensor

from vistok.image import from_uint8

NUM_IMAGES = 8


def preview_images(dataset, device: torch.device | str, *, count: int = NUM_IMAGES) -> Tensor:
    """[B, 3, H, W] in [-1, 1]: images spread evenly over the data set, always the same ones."""
    return from_uint8(torch.stack([dataset.read(row) for row in preview_rows(dataset, count=count)])).to(device)


def preview_rows(dataset, *, count: int = NUM_IMAGES) -> list[int]:
    """The numbers of these images."""
    count = min(count, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def prefix_counts(max_tokens: int) -> list[int]:
    """1, 2, 4, ... up to max_tokens, which is always there."""
    counts = [1 << i for i in range(max_tokens.bit_length()) if 1 << i < max_tokens]
    return [*counts, max_tokens]


def histogram(ids: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs in ids (padding is -1), int64 [K]; the loop turns it into usage and perplexity."""
    return torch.bincount(ids[ids >= 0].flatten(), minlength=codebook_size)
