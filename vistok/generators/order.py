"""The X of next-X prediction: which tokens form an entity, in which sequence, as one table that everything else reads.

Ren et al. 2025, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388), section 3.

    kind        entities on an h x w grid        token s of entity e
    token       N of 1                           the e-th in the tokens' own sequence; "patch" on a grid
    cell k      (h/k)(w/k) of k^2                row k (e div w/k) + s div k, column k (e mod w/k) + s mod k
    subsample q q^2 of hw/q^2                    row q (s div w/q) + e div q, column q (s mod w/q) + e mod q
    scale       one a side, hw' each             the grid averaged down to each side, coarse to fine; only the last is the picture
    image       1 of N                           the e-th in the tokens' own sequence
    group n     N/n of n, the last may be less   a run of a 1D sequence (FlexTok's registers in blocks)
    random n    as group                         a permutation of all tokens drawn from `seed`

A slot is a place in the sequence of entities. A generator reads lengths, coordinates and the mask; tables it learns have a row a slot.

N tokens of the tokenizer, S slots (S = N except for scale), E entities, h w grid.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.tokens import TokenLayout

CPU = "cpu"  # where a table is made, whatever device a model is built on, "meta" included
KINDS = ("token", "patch", "cell", "subsample", "scale", "image", "group", "random")
ORDER_FORMS = "token, patch, cell-K, subsample-Q, scale, scale-1-2-4-8, image, group-N, random-N, random-N-SEED"
_SIZED = {"cell": "side of a cell", "subsample": "stride", "group": "tokens of a group", "random": "tokens of an entity"}


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Which order, over which tokens; the default is xAR's 8 x 8 cells."""

    kind: Literal["token", "patch", "cell", "subsample", "scale", "image", "group", "random"] = "cell"
    """The X."""
    layout_kind: Literal["grid", "sequence", "scales"] = "grid"
    """How the tokenizer's tokens lie."""
    layout_shape: tuple[int | tuple[int, int], ...] = (16, 16)
    """(h, w), (N,), or the (h, w) of each scale."""
    size: int = 8
    """Side of a cell, stride of a subsample, tokens of a group; not used by the other kinds."""
    scales: tuple[tuple[int, int], ...] = ()
    """Grids of the order "scale" over a grid of tokens, coarse to fine, the full one last."""
    seed: int = 0
    """Of the permutation of "random"."""

    def __post_init__(self):
        object.__setattr__(self, "layout_shape", self.layout.shape)
        object.__setattr__(self, "scales", tuple((int(h), int(w)) for h, w in self.scales))
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no order; allowed: {', '.join(KINDS)}")
        if self.layout.num_tokens < 1 or min(side for part in self.layout.shape for side in _sides(part)) < 1:
            raise ValueError(f"layout_shape={self.layout_shape} has no tokens")
        if self.kind in _SIZED and self.size < 1:
            raise ValueError(f"size={self.size}, the {_SIZED[self.kind]}, must be at least 1")
        if self.kind in ("patch", "cell", "subsample") and self.layout_kind != "grid":
            raise ValueError(f"the order {self.kind!r} needs a grid of tokens, got a {self.layout_kind} layout")
        if self.kind in ("cell", "subsample") and any(side % self.size for side in self.layout_shape):
            raise ValueError(f"size={self.size} does not divide the grid {self.layout_shape}")
        if self.kind == "scale":
            self._check_scales()
        elif self.scales:
            raise ValueError(f"scales are given but the order {self.kind!r} has none")

    def _check_scales(self) -> None:
        if self.layout_kind == "sequence":
            raise ValueError("the order 'scale' needs a grid or scales of tokens, got a sequence layout")
        if self.layout_kind == "scales":
            if self.scales:
                raise ValueError("tokens that lie in scales have their own; leave scales out")
            return
        if not self.scales or self.scales[-1] != self.layout_shape:
            raise ValueError(f"scales={self.scales} must end in the full grid {self.layout_shape}")
        if any(side < 1 or side > full for scale in self.scales for side, full in zip(scale, self.layout_shape)):
            raise ValueError(f"scales={self.scales} must lie between (1, 1) and the full grid {self.layout_shape}")

    @property
    def layout(self) -> TokenLayout:
        """The tokenizer's layout."""
        return TokenLayout(self.layout_kind, tuple(self.layout_shape))

    @classmethod
    def parse(cls, text: str | None, layout: TokenLayout) -> "OrderConfig":
        """The order that a text names, over the tokens of a layout: its kind and what it needs, joined by dashes.

        token, patch, image; cell-K, subsample-Q, group-N with their size; random-N or random-N-SEED; scale, which over a grid doubles its
        sides up to the full grid, or scale-1-2-4-8 with the sides of its square grids. None: what suits the layout (`default_order`).
        Raises ValueError: no such order, or it does not fit the layout.
        """
        kind, *numbers = (default_order(layout) if text is None else text).split("-")
        if kind not in KINDS or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"order={text!r}; allowed: {ORDER_FORMS}")
        numbers = [int(number) for number in numbers]
        wanted = {"cell": (1,), "subsample": (1,), "group": (1,), "random": (1, 2), "scale": range(100)}.get(kind, (0,))
        if len(numbers) not in wanted:
            raise ValueError(f"order={text!r} has {len(numbers)} numbers; allowed: {ORDER_FORMS}")
        where = dict(kind=kind, layout_kind=layout.kind, layout_shape=layout.shape)
        if kind == "scale":
            if layout.kind == "grid":
                where["scales"] = tuple((side, side) for side in numbers) or doubling_scales(layout.shape)
            elif numbers:
                raise ValueError(f"order={text!r}: tokens that lie in scales have their own; write scale alone")
        elif numbers:
            where |= dict(zip(("size", "seed"), numbers))
        return cls(**where)

    def build(self) -> "PredictionOrder":
        """The table."""
        layout, n = self.layout, self.layout.num_tokens
        if self.kind == "scale":
            scales = self.scales or layout.shape
            return PredictionOrder(
                layout, tuple(h * w for h, w in scales), torch.arange(sum(h * w for h, w in scales), device=CPU), scales=scales
            )
        if self.kind in ("cell", "subsample"):
            entities = _cut(self.kind, layout.shape, self.size)  # [E, n]
            return PredictionOrder(layout, (entities.shape[1],) * entities.shape[0], entities.flatten())
        tokens = torch.arange(n, device=CPU)
        if self.kind == "random":
            tokens = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed), device=CPU)
        size = {"token": 1, "patch": 1, "image": n}.get(self.kind, self.size)
        return PredictionOrder(layout, tuple(len(part) for part in tokens.split(size)), tokens)


def default_order(layout: TokenLayout) -> str:
    """The text of a good order: cells of half the grid's height where they fit (xAR's), eighths of a sequence, scale by scale."""
    if layout.kind == "scales":
        return "scale"
    if layout.kind == "sequence":
        return f"group-{-(-layout.num_tokens // 8)}"
    h, w = layout.shape
    return f"cell-{h // 2}" if h % 2 == 0 and w % (h // 2) == 0 else "patch"


def doubling_scales(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Grids that double from one row or column on up to the full one: (1, 1), (2, 2), (4, 4), (8, 8) for 8 x 8."""
    (h, w), halvings = grid, (min(grid) - 1).bit_length()
    return tuple((-(-h >> n), -(-w >> n)) if n else (h, w) for n in range(halvings, -1, -1))


def _sides(part) -> tuple[int, ...]:
    return part if isinstance(part, tuple) else (part,)


def _cut(kind: str, grid: tuple[int, int], size: int) -> Tensor:
    """[E, n] raster index of each token of each cell or subsample."""
    h, w = grid
    tokens = torch.arange(h * w, device=CPU)
    if kind == "cell":
        return tokens.view(h // size, size, w // size, size).transpose(1, 2).reshape(-1, size * size)
    return tokens.view(h // size, size, w // size, size).permute(1, 3, 0, 2).reshape(size * size, -1)


class PredictionOrder:
    """The table of one order.

    layout: of the tokens. lengths: tokens of each entity. tokens: [S] int64, which token sits in each slot; of the order "scale", its place
    among the tokens of all scales. scales: grids of the order "scale", else None.
    """

    def __init__(self, layout: TokenLayout, lengths: tuple[int, ...], tokens: Tensor, *, scales: tuple[tuple[int, int], ...] | None = None):
        self.layout, self.lengths, self.tokens, self.scales = layout, lengths, tokens, scales
        self.is_pyramid = scales is not None and layout.kind == "grid"  # the entities before the last are made from it

    @property
    def is_sequential(self) -> bool:
        """Whether the slots are the tokens in their own order, so that the first entities are a beginning of the tokens."""
        return not self.is_pyramid and bool((self.tokens.diff() == 1).all())

    @property
    def num_entities(self) -> int:
        return len(self.lengths)

    @property
    def num_slots(self) -> int:
        return len(self.tokens)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Slots up to and with each entity."""
        return tuple(accumulate(self.lengths))

    @cached_property
    def entities(self) -> Tensor:
        """[S] int64: the entity of each slot."""
        lengths = torch.tensor(self.lengths, device=CPU)
        return torch.repeat_interleave(torch.arange(self.num_entities, device=CPU), lengths, output_size=self.num_slots)

    @cached_property
    def coordinates(self) -> Tensor:
        """[S, 2] float: row and column of each slot, in cells of the full grid; (0, position) in a sequence.

        A token of a coarse scale sits at the centre of the area it stands for.
        """
        if self.scales is not None:
            h, w = self.scales[-1]
            return torch.cat([torch.cartesian_prod(_centres(p, h), _centres(q, w)).view(-1, 2) for p, q in self.scales])[self.tokens]
        if self.layout.kind == "grid":
            width = self.layout.shape[1]
            return torch.stack([self.tokens // width, self.tokens % width], dim=1).float()
        if self.layout.kind == "sequence":
            return torch.stack([torch.zeros_like(self.tokens), self.tokens], dim=1).float()
        h, w = self.layout.shape[-1]
        table = torch.cat([torch.cartesian_prod(_centres(p, h), _centres(q, w)).view(-1, 2) for p, q in self.layout.shape])
        return table[self.tokens]

    def mask(self) -> Tensor:
        """[S, S] bool, block-causal: a slot (row) sees its own entity and all before."""
        return self.entities[:, None] >= self.entities

    def entity(self, number: int) -> slice:
        """The slots of an entity."""
        return slice(self.ends[number] - self.lengths[number], self.ends[number])

    def entities_within(self, num_slots: int) -> int:
        """How many entities the first slots are. Raises ValueError: they end inside an entity."""
        if num_slots not in (0, *self.ends):
            shown = ", ".join(map(str, self.ends[:20]))
            raise ValueError(f"{num_slots} slots end inside an entity; entities end at {shown}{', ...' if len(self.ends) > 20 else ''}")
        return self.ends.index(num_slots) + 1 if num_slots else 0

    def to_slots(self, table: Tensor) -> Tensor:
        """Rows of a table in the tokens' own sequence [..., S, D] as rows of the slots."""
        return table.index_select(-2, self.tokens.to(table.device))

    def to_raster(self, table: Tensor) -> Tensor:
        """The inverse of `to_slots`: rows of the slots [..., S, D] in the tokens' own sequence."""
        return table.index_select(-2, self.tokens.argsort().to(table.device))

    def pack(self, data: Tensor) -> Tensor:
        """Tokens of images in slots: ids [B, N] or values [B, N, C] to [B, S] or [B, S, C].

        The order "scale" over a grid averages values to each scale. Raises ValueError: it is asked to do so with ids.
        """
        if not self.is_pyramid:
            return data.index_select(1, self.tokens.to(data.device))
        if data.ndim != 3:
            raise ValueError("ids of a grid have no coarser scales; the order 'scale' needs values, or tokens that lie in scales")
        picture = data.transpose(1, 2).unflatten(2, self.layout.shape)  # [B, C, h, w]
        return torch.cat([F.interpolate(picture, size=scale, mode="area").flatten(2).transpose(1, 2) for scale in self.scales], dim=1)

    def unpack(self, slots: Tensor) -> Tensor:
        """The inverse of `pack`: ids [B, S] or values [B, S, C] of the slots in the tokens' own sequence, [B, N] or [B, N, C]."""
        if self.is_pyramid:
            return slots[:, self.entity(self.num_entities - 1)]
        return slots.index_select(1, self.tokens.argsort().to(slots.device))

    def partial(self, slots: Tensor) -> Tensor:
        """What the values [B, n, C] of the first entities show, in the tokens' own sequence [B, N, C]; 0 where nothing is known yet.

        Of the order "scale" over a grid: the newest scale, enlarged. Raises ValueError: n slots end inside an entity.
        """
        known = self.entities_within(slots.shape[1])
        if self.is_pyramid and known:
            newest = slots[:, self.entity(known - 1)].transpose(1, 2).unflatten(2, self.scales[known - 1])
            return F.interpolate(newest, size=self.layout.shape, mode="nearest").flatten(2).transpose(1, 2)
        return self.unpack(F.pad(slots, (0, 0, 0, self.num_slots - slots.shape[1])))


def _centres(side: int, full: int) -> Tensor:
    return (torch.arange(side, device=CPU) + 0.5) * full / side - 0.5
