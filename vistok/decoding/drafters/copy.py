"""Copies as drafts: what followed the same tokens earlier in this image, or the tokens above, or the token to the left.

    n-gram    the latest earlier place with the same last two tokens (or the same last one); the tokens behind it      LLMA, 2304.04487
    above     the tokens one row up                                                                                     pictures alone
    left      the last token again

Nothing is trained and nothing is drawn. Good for flat regions and repeated patterns; worth little where the target's law is flat.
B images, N tokens, M draft tokens.
"""

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.drafters.registry import register_drafter


@register_drafter("copy")
class CopyDrafter:
    """A chain of `length` copied tokens. source: "ngram" (where nothing matches: above, or left on a sequence), "above" or "left"."""

    def __init__(self, target, *, length: int = 4, source: str = "ngram"):
        if source not in ("ngram", "above", "left"):
            raise ValueError(f"source={source!r} but copies come from ngram, above or left")
        if length < 1:
            raise ValueError(f"length={length} but a chain has 1 token or more")
        is_grid = target.layout.kind == "grid"
        if source == "above" and not is_grid:
            raise ValueError("only tokens on a grid have tokens above them; use source='left' or 'ngram'")
        self.num_nodes, self.source, self.width = length, source, target.layout.shape[1] if is_grid else 1

    def start(self, state) -> None:
        """Nothing is kept between steps: the image itself is the table."""

    def propose(self, state, budget: int) -> Draft:
        steps = torch.arange(budget, device=state.ids.device)
        drafts = self._behind(state, state.counts - (1 if self.source == "left" else self.width), steps)
        if self.source == "ngram":
            match = self._latest_match(state)
            drafts = torch.where((match > 0)[:, None], self._behind(state, match, steps), drafts)
        return Draft.chain(drafts)

    def observe(self, state, verdict, target) -> None:
        """Nothing to learn."""

    def _behind(self, state, first: Tensor, steps: Tensor) -> Tensor:
        """[B, M] tokens from places first [B] on; a copy that runs into the end starts over."""
        period = (state.counts - first).clamp(min=1)[:, None]
        places = (first[:, None] + steps % period).clamp(min=0)
        return state.ids.gather(1, torch.minimum(places, state.counts[:, None] - 1))

    def _latest_match(self, state) -> Tensor:
        """[B] the place behind the latest earlier pair of tokens that is the last pair, or single token that is the last one; else 0."""
        ids, counts, places = state.ids, state.counts[:, None], torch.arange(state.ids.shape[1], device=state.ids.device)
        same = (ids == state.root[:, None]) & (places < counts - 1)
        before = ids.gather(1, (counts - 2).clamp(min=0))
        pair = same & (ids.roll(1, 1) == before) & (places > 0) & (counts > 1)
        single, double = (torch.where(found, places + 1, 0).amax(1) for found in (same, pair))
        return torch.where(double > 0, double, single)
