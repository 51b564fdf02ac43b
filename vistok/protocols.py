"""The contracts between the parts of vistok; nothing here computes.

Shapes: B images, N tokens, H W pixels, T sequence, K codebook size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from vistok.tokens import TokenLayout, VisualTokens

if TYPE_CHECKING:
    from vistok.decoding.accept.rounds import Position, Trial
    from vistok.decoding.draft import Draft
    from vistok.decoding.state import DecodingState, TargetPass
    from vistok.decoding.walk import Verdict
    from vistok.layers.placement import PlacedCache, Placement


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


@runtime_checkable
class NextTokenGenerator(Generator, Protocol):
    """A generator whose tokens can be drafted: one after another, and readable at places of their own."""

    head: torch.nn.Module
    embedding: torch.nn.Module

    def features(self, ids: Tensor, condition=None, *, cache=None) -> Tensor:
        """What `head` makes logits of: as `forward`, [B, T + 1, D], or [B, T, D] behind a filled cache."""

    def extend(self, ids: Tensor, placement: "Placement", cache: "PlacedCache", *, layers: Sequence[int] | None = None) -> Tensor:
        """Features [B, M, D] of inputs ids [B, M] that stand where the placement says, behind the prefix in the cache."""


class Drafter(Protocol):
    """Proposes the tokens that a target verifies. It may keep what it likes from step to step; what it proposes may depend on everything
    but the uniforms that verify it, and `q` must be the law it drew from."""

    name: str
    num_nodes: int
    """The most draft tokens of a step. A drafter with several shapes to choose from also has `plans`, their `TreeTemplate`s by number of
    tokens: `propose` then gets one of these numbers, and `decoding.tuning` finds out which of them pays."""

    def start(self, state: "DecodingState") -> None:
        """A new batch: the target has read the condition, and each image has its first token."""

    def propose(self, state: "DecodingState", budget: int) -> "Draft":
        """At most `budget` draft tokens behind the root; as many in every step, so that shapes stay."""

    def observe(self, state: "DecodingState", verdict: "Verdict", target: "TargetPass") -> None:
        """What became of the draft; the state has moved on already."""


class AcceptRule(Protocol):
    """Decides which draft tokens stay. Pure: the only place where exactness lives."""

    exact: bool
    """Whether the emitted law is the target's, whatever the draft."""
    bound: float | None
    """At most so much total variation a position; None: nothing bounds it."""
    needs_hidden: bool

    def __call__(self, at: "Position") -> "Iterator[Trial]":
        """The candidates of a position one by one, each with its chance; the last trial is the law of the token if none is taken."""

    def law(self, at: "Position") -> Tensor | None:
        """The law that the position emits, where the rule verifies exactly against one; else None."""
