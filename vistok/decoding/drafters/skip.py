"""The target drafts for itself with its first layers: no second model, and no second cache.

Elhoushi et al. 2024 (LayerSkip), arXiv 2404.16710, section 3.3; Zhang et al. 2023 (Draft & Verify), 2309.08168. What the first layers keep
of decided tokens is what the whole target keeps, so both share one cache; what they write for drafts is overwritten when the drafts are
verified. The head reads the features where they leave: good where the target was trained for that, or its last layers add little.
"""

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.drafters.registry import register_drafter
from vistok.decoding.growth import grow_chain


@register_drafter("skip")
class SkipDrafter:
    """A chain of `length` tokens by the first `layers` of the target; half of them where layers is 0.

    Raises ValueError: the target has not more layers than that.
    """

    def __init__(self, target, *, layers: int = 0, length: int = 3):
        depth = len(target.blocks)
        self.layers = layers or max(depth // 2, 1)
        if not 1 <= self.layers < depth:
            raise ValueError(f"layers={self.layers} but a draft of this target skips some of its {depth} layers: 1 to {depth - 1}")
        if length < 1:
            raise ValueError(f"length={length} but a chain has 1 token or more")
        self.num_nodes = length

    def start(self, state) -> None:
        """All there is to keep is in the target's cache."""

    def propose(self, state, budget: int) -> Draft:
        prefix = state.cache.prefix_length
        span = tuple(prefix + count - 1 for count in state.span)

        def expand(ids: Tensor, ancestors: Tensor, depth: int) -> Tensor:
            depths = torch.full((1, 1), depth, device=ids.device)
            placement = state.cache.behind(depths, ancestors, span=span, offset=depth)
            features = state.model.extend(state.rows(ids), placement, state.cache, layers=range(self.layers))
            return state.law(state.model.head(features), state.counts[:, None] + depths)

        return grow_chain(expand, state.root, state.uniforms(budget))

    def observe(self, state, verdict, target) -> None:
        """Nothing to learn."""
