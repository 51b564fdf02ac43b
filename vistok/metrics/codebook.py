"""How much of a codebook is in use, counted over a stream of ids.

    usage      = codes seen at least once / K
    perplexity = exp(-sum_k p_k log p_k)          p_k: share of the tokens that are code k; K means an even use, 1 a collapse

K codebook size.
"""

import torch
from torch import Tensor


class CodebookUsage:
    """Histogram of ids. `counts` [K] int64 is plain data: sum it over processes (`accelerator.reduce(usage.counts)`) or `merge` two."""

    def __init__(self, codebook_size: int):
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape. -1 is padding and not counted; anything else outside [0, K) is a ValueError."""
        ids = ids.detach().flatten()
        ids = ids[ids != -1].cpu()
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.codebook_size):
            raise ValueError(f"ids run from {int(ids.min())} to {int(ids.max())} but this codebook has 0 to {self.codebook_size - 1}")
        self.counts += torch.bincount(ids, minlength=self.codebook_size)

    def merge(self, other: "CodebookUsage") -> None:
        """Add the counts of another accumulator of the same codebook."""
        if other.codebook_size != self.codebook_size:
            raise ValueError(f"a codebook of {other.codebook_size} codes cannot join one of {self.codebook_size}")
        self.counts += other.counts

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far."""
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """Codes seen at least once."""
        return int((self.counts > 0).sum())

    @property
    def usage(self) -> float:
        """Share of the codes seen at least once. Fewer tokens than codes cannot reach 1."""
        return self.num_used / self.codebook_size

    @property
    def perplexity(self) -> float:
        """Effective number of codes, 1 to K; 0 before the first token."""
        if self.num_tokens == 0:
            return 0.0
        p = self.counts[self.counts > 0].double() / self.num_tokens
        return float(torch.exp(-(p * p.log()).sum()))
