"""Trained heads as drafters: EAGLE, Medusa and Chimera, in any shape that drafts grow in.

EAGLE and Chimera keep a cache of their own, of decided tokens alone: what they wrote for drafts came from predicted features, so accepted
tokens are read again with the target's. Laws are guided and warped as the target's are; where the draft is not "best", tokens are drawn
from them, so every exact rule stays exact however badly a head was trained.

B images, R rows (2B under guidance), W nodes of a level, F nodes shown before, D width, K codebook size.
"""

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.drafters.registry import register_drafter
from vistok.decoding.growth import Growth
from vistok.decoding.heads.parts import check_fits
from vistok.layers.placement import PlacedCache


def open_head(head, target, kind: str):
    """A head, or the one behind a name, of class `kind`. Raises ValueError: it is of another kind or was made for another target."""
    if isinstance(head, str):
        from vistok.registry import load

        head = load(head)
    if type(head).__name__ != kind:
        raise ValueError(f"this drafter needs a {kind}, got a {type(head).__name__}")
    check_fits(head, target)
    return head.to(target.device).eval()


class CatchingUp:
    """Reads decided tokens into a cache of the head's own, once the target's features for them are known."""

    def __init__(self, cache: PlacedCache, state):
        self.cache = cache
        self._features, self._counts = state.features[:, None], state.counts.new_ones(state.num_images)  # of the root, the first token
        self._read, self._span = torch.zeros_like(state.counts), (0, 0)

    def observe(self, state, verdict, target) -> None:
        """The tokens that a verdict added, with the features that decided them."""
        self._features, self._counts = target.on_path(verdict), verdict.emitted

    def pending(self, state) -> tuple[Tensor, Tensor, object]:
        """Places n [B, T] of tokens not read yet, f_n [R, T, D], and where they go. What stands behind a row's own is overwritten."""
        state.follow_rows(self.cache)
        self._features = self._features[: state.num_rows]
        T = self._features.shape[1]
        steps = torch.arange(T, device=self._counts.device)
        seen = torch.ones(1, T, T, dtype=torch.bool, device=steps.device).tril()
        placement = self.cache.behind(steps[None], seen, lengths=state.rows(self._read), span=self._span)
        return self._read[:, None] + steps, self._features, placement

    def done(self, state, out: Tensor) -> Tensor:
        """[R, 1, D]: of what the head made of the pending tokens [R, T, D], the root's. The root is read from now on."""
        last = state.rows((self._counts - 1).clamp(min=0))
        self._read, self._span = state.counts, state.span
        self.cache.lengths = state.rows(state.counts)
        return out[torch.arange(len(out), device=out.device), last][:, None]


@register_drafter("eagle")
class EagleDrafter:
    """Drafts by an EAGLE head. head: the head, or where to load it from. The other options are those of `Growth`.

    Raises ValueError: the head is none of EAGLE's, or of a target of another shape.
    """

    def __init__(self, target, *, head, shape: str = "chain", length: int = 3, width: int = 1, num_tokens: int = 0):
        self.head = open_head(head, target, "EagleHead")
        self.growth = Growth(shape=shape, length=length, width=width, num_tokens=num_tokens)
        self.num_nodes, self.plans = self.growth.num_nodes, self.growth.plans
        self._past: CatchingUp | None = None

    def start(self, state) -> None:
        margin = 2 + self.num_nodes + self.growth.length * (1 + self.growth.width)
        self._past = CatchingUp(self.head.layer.new_cache(state.num_rows, state.num_tokens + margin), state)

    def propose(self, state, budget: int) -> Draft:
        model, head, cache = state.model, self.head, self._past.cache
        shown: list[Tensor] = []  # predicted features behind the nodes of each level, [R, W, D]

        def expand(ids: Tensor, ancestors: Tensor, depth: int) -> Tensor:
            if not depth:
                places, features, placement = self._past.pending(state)
                embeddings = model.embedding(state.rows(state.ids.gather(1, places.clamp(max=state.ids.shape[1] - 1))))
                out = self._past.done(state, head(features, embeddings, placement=placement, cache=cache))
            else:
                F = ancestors.shape[2] - ids.shape[1]
                above = (ancestors[..., :F] * torch.arange(1, F + 1, device=ids.device)).argmax(-1)  # the parent is the latest ancestor
                above = state.rows(above.expand(len(ids), -1))
                before = torch.cat(shown, dim=1)
                features = before.gather(1, above[..., None].expand(-1, -1, before.shape[2]))
                seen = ancestors[..., 1:]  # the root is among the decided
                placement = cache.behind(
                    torch.full((1, ids.shape[1]), depth - 1, device=ids.device),
                    state.rows(seen) if len(seen) > 1 else seen,
                    span=state.span,
                    offset=F - 1,
                )
                out = head(features, model.embedding(state.rows(ids)), placement=placement, cache=cache)
            shown.append(out)
            positions = state.counts[:, None] + depth
            return state.law(model.head(out), positions.expand(-1, ids.shape[1]))

        return self.growth.grow(expand, state, budget)

    def observe(self, state, verdict, target) -> None:
        self._past.observe(state, verdict, target)


@register_drafter("medusa")
class MedusaDrafter:
    """Drafts by Medusa heads, all levels from one feature. head: the heads, or where to load them from; length: 0 for all of them.

    Raises ValueError: the heads are none of Medusa's, too few, or of a target of another shape.
    """

    def __init__(self, target, *, head, shape: str = "chain", length: int = 0, width: int = 1, num_tokens: int = 0):
        self.head = open_head(head, target, "MedusaHeads")
        length = heads_used(length, self.head)
        self.growth = Growth(shape=shape, length=length, width=width, num_tokens=num_tokens)
        self.num_nodes, self.plans = self.growth.num_nodes, self.growth.plans

    def start(self, state) -> None:
        """Nothing is kept between steps."""

    def propose(self, state, budget: int) -> Draft:
        logits = self.head(state.features[:, None])[:, 0]  # [R, g, K]
        laws = state.law(logits, state.counts[:, None] + torch.arange(logits.shape[1], device=logits.device))
        return self.growth.grow(lambda ids, ancestors, depth: laws[:, depth, None].expand(-1, ids.shape[1], -1), state, budget)

    def observe(self, state, verdict, target) -> None:
        """Nothing to learn."""


@register_drafter("chimera")
class ChimeraDrafter:
    """Drafts by Chimera heads: one context a step, and the last three tokens at every node. Options as for Medusa."""

    def __init__(self, target, *, head, shape: str = "chain", length: int = 0, width: int = 1, num_tokens: int = 0):
        self.head = open_head(head, target, "ChimeraHeads")
        length = heads_used(length, self.head)
        self.growth = Growth(shape=shape, length=length, width=width, num_tokens=num_tokens)
        self.num_nodes, self.plans = self.growth.num_nodes, self.growth.plans
        self._past: CatchingUp | None = None

    def start(self, state) -> None:
        cache = self.head.layer.new_cache(state.num_rows, state.num_tokens + self.num_nodes + 2)
        self._past = CatchingUp(cache, state)

    def propose(self, state, budget: int) -> Draft:
        head, embed = self.head, state.model.embedding
        threes: list[Tensor] = []  # the last three tokens at the nodes of each level, [B, W, 3]
        context: list[Tensor] = []

        def expand(ids: Tensor, ancestors: Tensor, depth: int) -> Tensor:
            if not depth:
                places, features, placement = self._past.pending(state)
                three = (places[..., None] + torch.arange(-2, 1, device=ids.device)).clamp(0, state.ids.shape[1] - 1)
                three = state.ids.gather(1, three.flatten(1)).unflatten(1, (-1, 3))  # [B, T, 3]
                trigrams = head.trigrams(embed(state.rows(three)))
                context.append(self._past.done(state, head.context(features, trigrams, placement=placement, cache=self._past.cache)))
                root = (state.counts[:, None] + torch.arange(-3, 0, device=ids.device)).clamp(min=0)
                threes.append(state.ids.gather(1, root)[:, None])
            else:
                F = ancestors.shape[2] - ids.shape[1]
                above = (ancestors[..., :F] * torch.arange(1, F + 1, device=ids.device)).argmax(-1).expand(len(ids), -1)
                before = torch.cat(threes, dim=1).gather(1, above[..., None].expand(-1, -1, 3))
                threes.append(torch.cat([before[..., 1:], ids[..., None]], dim=-1))
            logits = head.logits(context[0], head.trigrams(embed(state.rows(threes[-1]))), depth)
            return state.law(logits, (state.counts[:, None] + depth).expand(-1, ids.shape[1]))

        return self.growth.grow(expand, state, budget)

    def observe(self, state, verdict, target) -> None:
        self._past.observe(state, verdict, target)


def heads_used(length: int, heads) -> int:
    """Levels of a draft: all heads where length is 0. Raises ValueError: there are not so many."""
    most = heads.settings.num_drafts
    if not 0 <= length <= most:
        raise ValueError(f"length={length} but there are {most} heads: 1 to {most}, or 0 for all")
    return length or most
