"""What a vision transformer costs at given token counts, and the report of a reduced forward.

    MACs of a block = 4 N C^2 + 2 N^2 C + MLP weights * N'         N tokens in attention, N' in the feed-forward, C width

Counted with the true number of tokens before and after the reduction; matching and folding are not counted. Papers print multiply-adds as
"FLOPs".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vistok.pruning.blocks import ViTParts, weights


@dataclass(frozen=True)
class ViTCost:
    """The weights that each token meets."""

    num_prefix: int
    stem: int
    """Multiply-adds of a patch before the blocks."""
    blocks: Sequence[tuple[int, int, int]]
    """Of each block: weights of its attention, width of its heads together, weights of its feed-forward."""
    head: int
    """Multiply-adds after the blocks, once an image."""

    @classmethod
    def of(cls, parts: ViTParts) -> "ViTCost":
        """Count the weights of a model."""
        blocks = [(weights(part.attention), part.width, weights(part.mlp)) for part in parts.blocks]
        return cls(parts.num_prefix, weights(parts.stem, nn.Conv2d), blocks, sum(weights(head) for head in parts.heads))

    def macs(self, counts: Sequence[int], *, at_block_end: bool) -> int:
        """Multiply-adds of one image with counts[l] tokens entering layer l and counts[-1] leaving the last one.

        at_block_end: the feed-forward of a layer sees the tokens that entered it; otherwise those that leave it.
        """
        total = self.stem * (counts[0] - self.num_prefix) + self.head
        for (attention, width, mlp), before, after in zip(self.blocks, counts, counts[1:]):
            total += attention * before + 2 * width * before**2 + mlp * (before if at_block_end else after)
        return total


@dataclass(frozen=True)
class ViTReport:
    """What the last forward did."""

    num_tokens: tuple[int, ...]
    """Tokens entering each layer, prefix included, and leaving the last."""
    macs: int
    """Multiply-adds of one image: stem, blocks at their true token counts, head. Matching and folding are not counted."""
    full_macs: int
    """The same without reduction."""
    planning_share: float | None
    """Share of the forward's processor time spent on choosing: scores, similarities, matching; None unless attached with timed=True."""
    folding_share: float | None
    """The same for making the shorter sequence: sums of folded tokens, copies of kept ones."""

    @property
    def macs_ratio(self) -> float:
        return self.macs / self.full_macs
