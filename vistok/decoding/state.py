"""What the speculative loop knows: what is decided, what the target said of the last draft, and the laws both are read by.

B images, R rows (B, or 2B under guidance: conditional rows first), N tokens, M draft tokens, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.sampling import SamplingConfig, warp
from vistok.decoding.walk import Verdict
from vistok.layers.placement import PlacedCache


@dataclass
class DecodingState:
    """Progress of a call; the loop moves it, drafters read it."""

    model: torch.nn.Module
    """The target."""
    condition: object
    """Conditions of the R rows."""
    sampling: SamplingConfig
    scales: Tensor | float
    """[N] float: guidance of each position; one number where it is the same for all."""
    guided_tokens: int
    """Tokens from the first to the last one with a scale other than 1."""
    num_images: int
    num_rows: int
    num_tokens: int
    stream: object
    """Uniforms of the call: `draw(count)` gives [B, count]."""
    ids: Tensor
    """[B, N + margin] int64; anything from counts on is left over."""
    counts: Tensor
    """[B] tokens decided."""
    span: tuple[int, int]
    """The smallest and the largest count, as Python numbers."""
    cache: PlacedCache
    """The target's; holds the prefix and counts - 1 tokens of each row, all but the root."""
    features: Tensor
    """[R, D] what the target's head read to decide the root: its features at the token before (`model.head` makes logits of them)."""

    @property
    def root(self) -> Tensor:
        """[B] the last decided token, which the target has not read yet."""
        return self.ids.gather(1, self.counts[:, None] - 1)[:, 0]

    @property
    def active(self) -> Tensor:
        """[B] bool: images that still grow."""
        return self.counts < self.num_tokens

    def rows(self, x: Tensor) -> Tensor:
        """[R, ...] of [B, ...]: conditional and unconditional rows share every decision."""
        return x if self.num_rows == self.num_images else torch.cat([x, x])

    def end_guidance(self) -> None:
        """Drop the unconditional rows once no token left to decide is guided; drafters follow when they draft next (`follow_rows`)."""
        if self.num_rows > self.num_images and self.span[0] >= self.guided_tokens:
            self.num_rows = self.num_images
            self.condition, self.features = self.condition[: self.num_rows], self.features[: self.num_rows]
            self.follow_rows(self.cache)

    def follow_rows(self, cache: PlacedCache) -> None:
        """Drop the rows of a cache, the target's or a drafter's, that are not decoded any more."""
        if len(cache.lengths) > self.num_rows:
            cache.keep_rows(self.num_rows)

    def uniforms(self, count: int) -> Tensor:
        """[B, count] on [0, 1); row b does not depend on the other rows."""
        return self.stream.draw(count)

    def guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        """[B, n, V] float32 of logits [R, n, V] that decide the tokens at positions [B, n]."""
        logits = logits.float()
        if self.num_rows == self.num_images:
            return logits
        conditional, unconditional = logits.chunk(2)
        if isinstance(self.scales, float):
            return unconditional + self.scales * (conditional - unconditional)
        scale = self.scales[positions.clamp(max=len(self.scales) - 1)][..., None]
        return torch.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))

    def law(self, logits: Tensor, positions: Tensor) -> Tensor:
        """p [B, n, V] of logits [R, n, V] that decide the tokens at positions [B, n]: guided, then warped."""
        return warp(self.guided(logits, positions), self.sampling).softmax(-1)


class TargetPass:
    """What one pass of the target says of the root and the M draft tokens behind it."""

    def __init__(self, state: DecodingState, draft: Draft, ids: Tensor, features: Tensor):
        """ids: [B, M + 1]. features: [R, M + 1, D]."""
        self.draft, self.ids, self.features = draft, ids, features
        self._state, self._logits = state, state.model.head(features)
        self._positions = state.counts[:, None] + draft.shape.depths.expand(state.num_images, -1)  # which each node decides

    def logits(self, nodes: Tensor | None = None) -> Tensor:
        """Guided logits [B, n, V] after nodes [B, n], before warping; after all M + 1 nodes where none are named."""
        if nodes is None:
            return self._state.guided(self._logits, self._positions)
        rows = self._state.rows(nodes)
        at = self._logits[torch.arange(len(rows), device=rows.device)[:, None], rows]
        return self._state.guided(at, self._positions.gather(1, nodes))

    def law(self, nodes: Tensor | None = None) -> Tensor:
        """p [B, n, V] after nodes [B, n], or all of them: guided and warped."""
        return warp(self.logits(nodes), self._state.sampling).softmax(-1)

    def on_path(self, verdict: Verdict) -> Tensor:
        """Features [R, D + 1, width] of the root and the accepted nodes; the root's again behind them."""
        path = self._state.rows(verdict.path.clamp(min=0))
        return self.features[torch.arange(len(path), device=path.device)[:, None], path]
