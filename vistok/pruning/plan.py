"""ReductionPlan: which tokens stay and which are folded into them, as index tensors and nothing else.

    output row j starts as input row keep[j]                              j = 0..M-1
    input row source[i] is folded into output row slot[i]                 i = 0..r-1
    rows in neither are dropped

    fold with sizes   x'_j = sum_{i -> j} s_i x_i / sum_{i -> j} s_i,     s'_j = sum_{i -> j} s_i
    owner[n]          = output row that input row n went to, -1 if dropped

The same plan folds tokens, sizes, positions and source maps; undoing it is one gather by `owner`. A token's size is the number of original
tokens it stands for. Folding is associative, so plans compose (ToMe, Bolya et al. 2022, arXiv 2210.09461, section 3, keeps float one-hot
source matrices [B, M, N] for what the integers in `owner` say here).

B batch, N tokens in, M tokens out, r folded tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x: [B, N, ...], index: [B, M] int64. Returns [B, M, ...]: rows index[b] of x[b]."""
    B, N = x.shape[:2]
    start = torch.arange(B, device=index.device)[:, None] * N
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).unflatten(0, (B, index.shape[1]))


@dataclass(frozen=True)
class ReductionPlan:
    """One reduction of N tokens to M."""

    num_tokens: int
    """N, tokens before the reduction."""
    keep: Tensor
    """[B, M] int64: the input row that each output row starts from."""
    source: Tensor | None = None
    """[B, r] int64: input rows that are folded into an output row; None: none are."""
    slot: Tensor | None = None
    """[B, r] int64 in [0, M): the output row each source goes to; -1 drops it (only in composed plans, see `has_gaps`)."""
    has_gaps: bool = False
    """Whether `slot` may hold -1."""

    def __post_init__(self):
        if (self.source is None) != (self.slot is None):
            raise ValueError("a plan has both source and slot, or neither")
        if self.source is not None and self.source.shape != self.slot.shape:
            raise ValueError(f"source has shape {tuple(self.source.shape)}, slot {tuple(self.slot.shape)}; they must be equal")

    @classmethod
    def identity(cls, batch_size: int, num_tokens: int, device: torch.device | str | None = None) -> "ReductionPlan":
        """The plan that keeps every token in its place."""
        return cls(num_tokens, torch.arange(num_tokens, device=device).expand(batch_size, -1))

    @classmethod
    def from_mask(cls, mask: Tensor) -> "ReductionPlan":
        """mask: [B, N] bool, the same number of True in every row. Keeps those tokens, in order."""
        counts = mask.sum(1)
        if bool((counts != counts[0]).any()):
            raise ValueError(f"every row must keep the same number of tokens, got {counts.tolist()}")
        return cls(mask.shape[1], mask.nonzero()[:, 1].view(mask.shape[0], -1))

    @property
    def num_kept(self) -> int:
        """M, tokens after the reduction."""
        return self.keep.shape[1]

    @property
    def num_merged(self) -> int:
        """r, tokens folded into others (those that a composed plan drops included)."""
        return 0 if self.source is None else self.source.shape[1]

    @property
    def is_dropping(self) -> bool:
        """Whether some token is in no output row."""
        return self.has_gaps or self.num_kept + self.num_merged < self.num_tokens

    @property
    def owner(self) -> Tensor:
        """[B, N] int64: output row of each input row, -1 where it was dropped."""
        B, M = self.keep.shape
        rows = torch.arange(M, device=self.keep.device).expand(B, M)
        owner = torch.full((B, self.num_tokens), -1, device=self.keep.device, dtype=torch.int64).scatter(1, self.keep, rows)
        return owner if self.source is None else owner.scatter(1, self.source, self.slot)

    def gather(self, x: Tensor) -> Tensor:
        """x: [B, N, ...]. Returns [B, M, ...]: the rows that outputs start from, nothing folded (positions, rotary tables)."""
        self._check(x)
        return gather_rows(x, self.keep)

    def reduce(self, x: Tensor, mode: str = "sum") -> Tensor:
        """x: [B, N, C]. Returns [B, M, C]: each output row is the sum, mean (every row counts once) or amax of its members."""
        if mode not in ("sum", "mean", "amax"):
            raise ValueError(f"mode={mode!r} but it is one of sum, mean, amax")
        y = self.gather(x)
        if self.source is None:
            return y
        folded = gather_rows(x, self.source)
        if mode == "sum":
            return self._add(y, folded)
        if self.has_gaps:
            y = torch.cat([y, y.new_zeros(y.shape[0], 1, *y.shape[2:])], dim=1)
        slot = self.slot.where(self.slot >= 0, self.num_kept) if self.has_gaps else self.slot
        return y.scatter_reduce(1, slot[..., None].expand_as(folded), folded, reduce=mode)[:, : self.num_kept]

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Fold tokens as a mean weighted with their sizes.

        x: [B, N, C]. size: [B, N, 1] float32, None where every token still stands for itself.
        Returns x' [B, M, C] and size' [B, M, 1] (None as long as nothing was folded). Rows that take in nothing come back bit for bit.
        Weights are computed in float32 whatever x is.
        """
        if self.source is None:
            return self.gather(x), None if size is None else self.gather(size)
        self._check(x)
        B, M = self.keep.shape
        row = torch.arange(B, device=x.device)[:, None]
        # indices into the rows of the whole batch, made once: small operations are what a reduction costs on a CPU
        keep, source = (self.keep + row * self.num_tokens).flatten(), (self.source + row * self.num_tokens).flatten()
        slot = ((self.slot.clamp(min=0) if self.has_gaps else self.slot) + row * M).flatten()
        if size is None:
            total, own = torch.ones(len(keep), device=x.device), torch.ones(len(source), device=x.device)
        else:
            total, own = size.flatten().index_select(0, keep), size.flatten().index_select(0, source)
        if self.has_gaps:
            own = own * (self.slot.flatten() >= 0)
        total = total.index_add_(0, slot, own)
        tokens = x.flatten(0, 1)
        y = tokens.index_select(0, keep)
        # the weighted mean as a correction of the r folded rows, y + sum w (x_source - y): the other rows are copied and nothing else
        weight = (own / total.index_select(0, slot)).to(x.dtype)
        y.index_add_(0, slot, (tokens.index_select(0, source) - y.index_select(0, slot)) * weight[:, None])
        return y.view(B, M, -1), total.view(B, M, 1)

    def restore(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """y: [B, M, ...]. Returns [B, N, ...]: every input row gets its output row; dropped ones get `fill`."""
        if y.shape[1] != self.num_kept:
            raise ValueError(f"the plan made {self.num_kept} tokens, got {y.shape[1]}")
        owner = self.owner
        full = gather_rows(y, owner.clamp(min=0))
        return full.masked_fill((owner < 0).view(*owner.shape, *[1] * (y.ndim - 2)), fill) if self.is_dropping else full

    def compose(self, after: "ReductionPlan") -> "ReductionPlan":
        """The one plan that does this reduction and then `after`; folding with it equals folding twice."""
        if after.num_tokens != self.num_kept:
            raise ValueError(f"the second plan starts from {after.num_tokens} tokens, the first leaves {self.num_kept}")
        keep = self.keep.gather(1, after.keep)
        sources, slots = [], []
        if self.source is not None:
            slot = after.owner.gather(1, self.slot.clamp(min=0))
            sources.append(self.source)
            slots.append(slot.where(self.slot >= 0, -1) if self.has_gaps else slot)
        if after.source is not None:
            sources.append(self.keep.gather(1, after.source))
            slots.append(after.slot)
        if not sources:
            return ReductionPlan(self.num_tokens, keep)
        has_gaps = self.has_gaps or after.has_gaps or (self.source is not None and after.is_dropping)
        return ReductionPlan(self.num_tokens, keep, torch.cat(sources, 1), torch.cat(slots, 1), has_gaps=has_gaps)

    def _add(self, y: Tensor, folded: Tensor) -> Tensor:
        """Add the folded rows [B, r, C] to y [B, M, C], which `gather` has just made, at their slots."""
        B, M = self.keep.shape
        slot = self.slot
        if self.has_gaps:
            folded = folded * (slot >= 0)[..., None].to(folded.dtype)
            slot = slot.clamp(min=0)
        start = torch.arange(B, device=slot.device)[:, None] * M
        y.view(B * M, -1).index_add_(0, (slot + start).flatten(), folded.flatten(0, 1).view(B * slot.shape[1], -1))
        return y

    def _check(self, x: Tensor) -> None:
        if x.shape[:2] != (self.keep.shape[0], self.num_tokens):
            raise ValueError(f"the plan is for [{self.keep.shape[0]}, {self.num_tokens}, ...], got {list(x.shape)}")
