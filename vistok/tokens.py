"""VisualTokens: what a tokenizer makes of an image, and TokenLayout: where each token sits.

Shapes: B images, N tokens (padded to the longest row), C channels of a continuous token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

KINDS = ("sequence", "grid", "scales")
PADDING_ID = -1


@dataclass(frozen=True)
class TokenLayout:
    """Where tokens sit: a 1D "sequence" (N,), a "grid" (h, w) in raster order, or "scales" ((1, 1), (2, 2), ...) coarse to fine."""

    kind: str
    shape: tuple

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not a token layout; allowed: {', '.join(KINDS)}")
        shape = tuple(tuple(side) if isinstance(side, (list, tuple)) else int(side) for side in self.shape)
        object.__setattr__(self, "shape", shape)
        sides = {"sequence": 1, "grid": 2}.get(self.kind)
        if (sides is not None and len(shape) != sides) or not shape:
            raise ValueError(f"a {self.kind} layout cannot have the shape {shape}")

    @property
    def num_tokens(self) -> int:
        """Tokens of a full image."""
        if self.kind == "scales":
            return sum(h * w for h, w in self.shape)
        return self.shape[0] if self.kind == "sequence" else self.shape[0] * self.shape[1]

    def whole_counts(self, low: int, high: int) -> list[int] | None:
        """Token counts from low to high at which a scale ends; None where every count is whole."""
        if self.kind != "scales":
            return None
        ends = accumulate(h * w for h, w in self.shape)
        return [end for end in ends if low <= end <= high]

    def coordinates(self) -> Tensor:
        """[N, 2] float: row and column of each token in [0, 1). A sequence has row 0 and its position as column."""
        if self.kind == "sequence":
            n = self.shape[0]
            return torch.stack([torch.zeros(n), torch.arange(n) / n], dim=1)
        grids = self.shape if self.kind == "scales" else (self.shape,)
        return torch.cat([torch.cartesian_prod(torch.arange(h) / h, torch.arange(w) / w).view(-1, 2) for h, w in grids])


@dataclass(frozen=True)
class VisualTokens:
    """The tokens of a batch of images. Exactly one of `ids` and `values` is given; rows are left-aligned and padded.

    ids: [B, N] int64, -1 in the padding, or None.
    values: [B, N, C] float, 0 in the padding, or None.
    counts: [B] int64, tokens of each image.
    layout: where the tokens of a full image sit.
    """

    ids: Tensor | None
    values: Tensor | None
    counts: Tensor
    layout: TokenLayout

    def __post_init__(self):
        if (self.ids is None) == (self.values is None):
            raise ValueError("exactly one of ids and values must be given")
        data = self.data
        if data.ndim != (2 if self.values is None else 3):
            raise ValueError(f"ids must be [B, N] and values [B, N, C], got shape {tuple(data.shape)}")
        if self.counts.shape != (data.shape[0],):
            raise ValueError(f"counts must be [{data.shape[0]}], got shape {tuple(self.counts.shape)}")

    @classmethod
    def from_ids(cls, ids: Tensor, layout: TokenLayout, counts: Tensor | None = None) -> "VisualTokens":
        """Tokens from ids [B, N]; counts default to N for every image. Ids beyond a count are overwritten by the padding."""
        B, N = ids.shape
        counts = torch.full((B,), N, dtype=torch.int64, device=ids.device) if counts is None else counts.to(ids.device, torch.int64)
        return cls(ids.long().masked_fill(~_valid(counts, N), PADDING_ID), None, counts, layout)

    @classmethod
    def from_values(cls, values: Tensor, layout: TokenLayout, counts: Tensor | None = None) -> "VisualTokens":
        """Tokens from values [B, N, C]; counts default to N for every image."""
        B, N, _ = values.shape
        counts = torch.full((B,), N, dtype=torch.int64, device=values.device) if counts is None else counts.to(values.device, torch.int64)
        return cls(None, values * _valid(counts, N)[..., None], counts, layout)

    @classmethod
    def stack(cls, parts: Sequence["VisualTokens"]) -> "VisualTokens":
        """Join batches of the same layout and kind, padding rows to the longest."""
        if not parts:
            raise ValueError("nothing to stack")
        if len({part.layout for part in parts}) > 1 or len({part.ids is None for part in parts}) > 1:
            raise ValueError("only tokens of one layout and one kind can be stacked")
        longest = max(part.data.shape[1] for part in parts)
        fill = PADDING_ID if parts[0].ids is not None else 0.0
        rows = torch.cat([_pad(part.data, longest, fill) for part in parts])
        counts = torch.cat([part.counts for part in parts])
        return replace(parts[0], counts=counts, **{"values" if parts[0].ids is None else "ids": rows})

    @property
    def data(self) -> Tensor:
        """ids [B, N] int64 or values [B, N, C] float, whichever there is."""
        return self.values if self.ids is None else self.ids

    @property
    def mask(self) -> Tensor:
        """[B, N] bool: True where there is a token."""
        return _valid(self.counts, self.data.shape[1])

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, rows: int | slice | Tensor) -> "VisualTokens":
        """Some of the images, as tokens again (an int gives a batch of one)."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return self._with(self.data[rows], self.counts[rows])

    def truncate(self, counts: int | Tensor) -> "VisualTokens":
        """Keep the first tokens of each image.

        counts: one number for all, or [B] int64, each in [1, self.counts].
        Returns new VisualTokens padded to the largest count; self is unchanged.
        Raises ValueError: a count is outside its range; the message names the first image at fault.
        """
        wanted = torch.as_tensor(counts, dtype=torch.int64, device=self.counts.device).expand_as(self.counts)
        bad = (wanted < 1) | (wanted > self.counts)
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            high = int(self.counts[i])
            raise ValueError(f"image {i} has {high} tokens, so it cannot keep {int(wanted[i])}; allowed: 1 to {high}")
        N = int(wanted.max())
        valid = _valid(wanted, N)
        data = self.data[:, :N]
        data = data.masked_fill(~valid, PADDING_ID) if self.ids is not None else data * valid[..., None]
        return self._with(data, wanted.clone())

    def to(self, device: torch.device | str) -> "VisualTokens":
        """The same tokens on another device."""
        return self._with(self.data.to(device), self.counts.to(device))

    def _with(self, data: Tensor, counts: Tensor) -> "VisualTokens":
        return replace(self, counts=counts, **{"values" if self.ids is None else "ids": data})


def _valid(counts: Tensor, N: int) -> Tensor:
    return torch.arange(N, device=counts.device) < counts[:, None]


def _pad(rows: Tensor, longest: int, fill: float) -> Tensor:
    B, N = rows.shape[:2]
    return torch.cat([rows, rows.new_full((B, longest - N, *rows.shape[2:]), fill)], dim=1)
