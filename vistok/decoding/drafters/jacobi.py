"""Speculative Jacobi decoding: the target's own guesses at later positions, drawn in the pass before, are the next draft.

Teng et al. 2024, arXiv 2410.01699. After a pass over the root and a window of drafts x_j:

    keep x_j while u < p_j(x_j) / q_j(x_j), else draw from norm([p_j - q_j]+)            the standard rule
    every later draft is drawn anew, y_j ~ p_j, and q_j := p_j
    the window is filled up at its end

Nothing is trained. Exact at any batch: each image moves on by what it accepted itself, and a draft that was not verified is drawn anew from
the law recorded as its q. (The published code moves all images on by the least of them and so verifies some tokens twice, which is not.)

B images, M tokens of the window, V vocabulary.
"""

import torch
from torch import Tensor

from vistok.decoding.draft import Draft
from vistok.decoding.drafters.registry import register_drafter
from vistok.decoding.sampling import sample


@register_drafter("jacobi")
class JacobiDrafter:
    """A window of `length` drafts. fill: its new tokens are "random" (q is uniform), or copies of the token to the "left" or "above" (q is
    1 at the copy)."""

    def __init__(self, target, *, length: int = 4, fill: str = "random"):
        if length < 1:
            raise ValueError(f"length={length} but a window has 1 token or more")
        if fill not in ("random", "left", "above"):
            raise ValueError(f"fill={fill!r} but a window is filled up with random, left or above")
        if fill == "above" and target.layout.kind != "grid":
            raise ValueError("only tokens on a grid have tokens above them; use fill='left' or 'random'")
        self.num_nodes, self.fill, self.vocab_size = length, fill, target.vocab_size
        self.width = target.layout.shape[1] if fill == "above" else 1
        self._ids: Tensor | None = None
        self._q: Tensor | None = None

    def start(self, state) -> None:
        self._ids = None

    def propose(self, state, budget: int) -> Draft:
        if self._ids is None:
            nothing = state.ids.new_zeros(state.num_images)
            self._fill_up(state, state.ids.new_zeros(state.num_images, budget), None, nothing, state.uniforms(budget))
        self._ids, self._q = self._ids[:, :budget], self._q[:, :budget]
        return Draft.chain(self._ids, self._q)

    def observe(self, state, verdict, target) -> None:
        M = self._ids.shape[1]
        uniforms = state.uniforms(2 * M)
        behind = verdict.emitted[:, None] + torch.arange(M, device=state.ids.device)  # the node whose law decides each place of the window
        laws = target.law(behind.clamp(max=M))
        self._fill_up(state, sample(laws, uniforms[:, :M]), laws, (M + 1 - verdict.emitted).clamp(0, M), uniforms[:, M:])

    def _fill_up(self, state, ids: Tensor, laws: Tensor | None, known: Tensor, uniforms: Tensor) -> None:
        """Keep the first `known` [B] of ids [B, M] and their laws [B, M, V]; fill what follows."""
        B, M = ids.shape
        places = torch.arange(M, device=ids.device).expand(B, M)
        is_new = places >= known[:, None]
        if self.fill == "random":
            new = (uniforms * self.vocab_size).long()
            q = torch.full((), 1 / self.vocab_size, device=ids.device).expand(B, M, self.vocab_size)
        else:
            last = torch.where(known > 0, ids.gather(1, (known - 1).clamp(min=0)[:, None])[:, 0], state.root)
            new = last[:, None].expand(B, M)
            above = state.counts[:, None] + places - self.width
            decided = (above >= 0) & (above < state.counts[:, None]) & (self.fill == "above")
            new = torch.where(decided, state.ids.gather(1, above.clamp(0, state.ids.shape[1] - 1)), new)
            q = torch.zeros(B, M, self.vocab_size, device=ids.device).scatter_(2, new[..., None], 1.0)
        self._ids = torch.where(is_new, new, ids)
        self._q = q if laws is None else torch.where(is_new[..., None], q, laws)
