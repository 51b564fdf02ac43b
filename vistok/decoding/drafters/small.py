"""A smaller generator as the drafter: speculative decoding as first published.

Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, 2302.01318. The small model reads the same condition and is guided and warped as
the target is. Its cache holds what was decided; the token before the root is read again in every step, because the last token of a draft is
never shown to the drafter that drew it.

B images, R rows (2B under guidance), W nodes of a level, F nodes shown before.
"""

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.drafters.registry import register_drafter
from vistok.decoding.growth import Growth
from vistok.layers.placement import PlacedCache


@register_drafter("model")
class ModelDrafter:
    """Drafts by another next-token generator over the same codes and conditions.

    model: the generator, or where to load it from (`vistok.load`). The other options are those of `Growth`.
    Raises ValueError: the two do not share codes, positions or kinds of conditions.
    """

    def __init__(self, target, *, model, shape: str = "chain", length: int = 4, width: int = 1, num_tokens: int = 0):
        if isinstance(model, str):
            from vistok.registry import load

            model = load(model)
            model = getattr(model, "generator", model).to(target.device)
        if not hasattr(model, "extend"):
            raise ValueError(f"{type(model).__name__} does not predict one next token after another and cannot draft")
        pairs = {name: (getattr(model, name), getattr(target, name)) for name in ("vocab_size", "layout", "max_tokens")}
        pairs |= {name: (getattr(model.settings, name), getattr(target.settings, name)) for name in ("num_classes", "text")}
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(f"the drafter has {name}={ours!r}, the target {theirs!r}: they must be equal")
        self.model = model.eval()
        self.growth = Growth(shape=shape, length=length, width=width, num_tokens=num_tokens)
        self.num_nodes, self.plans = self.growth.num_nodes, self.growth.plans
        self._cache: PlacedCache | None = None
        self._rows: Tensor | None = None

    def start(self, state) -> None:
        # nodes are shown level by level; a level of "best" shows width nodes, kept or not
        margin = 2 + max(self.growth.length * self.growth.width, self.num_nodes)
        cache = self.model.new_cache(state.num_rows, state.num_tokens + margin)
        self.model.features(state.ids.new_empty(state.num_rows, 0), state.condition, cache=cache)
        self._cache = PlacedCache(cache)

    def propose(self, state, budget: int) -> Draft:
        state.follow_rows(self._cache)
        back = int(state.span[0] > 1)  # the token before the root, where there is one

        def expand(ids: Tensor, ancestors: Tensor, depth: int) -> Tensor:
            width, offset = ids.shape[1], ancestors.shape[2] - ids.shape[1]
            if not depth and back:
                before = state.ids.gather(1, state.counts[:, None] - 2)
                return self._laws(state, torch.cat([before, ids], dim=1), ancestors.new_ones(1, 2, 2).tril(), [0, 1], 0, back)[:, 1:]
            seen = torch.nn.functional.pad(ancestors, (back, 0), value=True)
            return self._laws(state, ids, seen, [back + depth] * width, back + offset if depth else 0, back)

        draft = self.growth.grow(expand, state, budget)
        self._rows = draft.rows
        return draft

    def _laws(self, state, ids: Tensor, seen: Tensor, depths: list[int], offset: int, back: int) -> Tensor:
        """q [B, W, V] behind nodes ids [B, W] that hang `depths` below the first slot of the step."""
        cache, prefix = self._cache, self._cache.prefix_length
        depths = torch.tensor([depths], device=ids.device)
        low, high = (prefix + count - 1 - back for count in state.span)
        placement = cache.behind(
            depths,
            state.rows(seen) if len(seen) > 1 else seen,
            lengths=state.rows(prefix + state.counts - 1 - back),
            span=(low, high),
            offset=offset,
        )
        features = self.model.extend(state.rows(ids), placement, cache)
        return state.law(self.model.head(features), state.counts[:, None] - back + depths)

    def observe(self, state, verdict, target) -> None:
        self._cache.lengths = state.rows(self._cache.prefix_length + state.counts - verdict.emitted - 1)  # where the old root stands
        numbers = self._rows.expand(state.num_images, -1).gather(1, verdict.path.clamp(min=0)).clamp(min=0)
        self._cache.keep(state.rows(numbers), state.rows(verdict.emitted - 1), is_chain=target.draft.shape.is_chain)
