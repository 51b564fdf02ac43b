"""The contracts between the parts of vistok; nothing here computes.

Shapes: B images, N tokens, H W pixels, T sequence, K codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vistok.tokens import TokenLayout, VisualTokens


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer's training pass gives.

    reconstruction: images [B, 3, H, W], or None where the loss needs no decoded image.
    tokens: the tokens of the batch. losses: named scalars; their sum is minimised.
    """

    reconstruction: Tensor | None
    tokens: VisualTokens
    losses: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to tokens and back."""

    min_tokens: int
    max_tokens: int
    codebook_size: int | None
    code_dim: int
    layout: TokenLayout

    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """Tokens of images [B, 3, H, W] in [-1, 1]."""

    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens."""

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors [..., code_dim] of ids [...]."""


@runtime_checkable
class Generator(Protocol):
    """A model of p(token n | tokens < n, condition)."""

    vocab_size: int
    max_tokens: int

    def new_cache(self, batch_size: int, max_tokens: int):
        """A preallocated cache for `max_tokens` steps of `batch_size` rows."""

    def forward(self, ids: Tensor, condition, *, cache=None) -> Tensor:
        """Logits [B, T, vocab_size] that predict the token after each position."""
