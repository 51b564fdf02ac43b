"""Verification: descend the tree of a draft, at each node to the child that the rule accepts, in all rows at once.

Candidates that were not drawn need no rejection to be verified exactly: draw y ~ p by the position's own uniform and take the candidate
that is y. That accepts with p(candidates), as recursive rejection does, and emits the very tokens that the plain loop would draw.

B images, M draft tokens, D depth, C children, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.accept.rounds import Position, Trial, decide_rows
from vistok.decoding.draft import Draft
from vistok.decoding.sampling import sample


@dataclass(frozen=True)
class Verdict:
    """What became of a draft.

    path: [B, D + 1] int64, the accepted nodes from the root 0 on; -1 behind them. accepted: [B], how many without the root.
    token: [B], the token after them. emitted: [B], tokens that the images grew by: accepted + 1, less what overshoots, 0 for a finished
    image. spent: [B] float, total variation to the target law, summed over the image's positions of this step; 0 for an exact rule.
    """

    path: Tensor
    accepted: Tensor
    token: Tensor
    emitted: Tensor
    spent: Tensor


def walk(
    draft: Draft,
    law_of: Callable[[Tensor], Tensor],
    rule,
    *,
    coins: Tensor,
    position_uniforms: Tensor,
    active: Tensor,
    room: Tensor,
    hidden: Tensor | None = None,
) -> Verdict:
    """Run the rule from the root down; the laws of nodes that no image visits are not computed.

    law_of: nodes [B] -> p [B, V], guided and warped. coins: [B, M], one a draft token.
    position_uniforms: [B, D + 1], of the position after each depth: they draw the final token, and couple draws that were not random.
    active: [B] bool, images that still grow. room: [B], tokens that still fit. hidden: [B, M + 1, D] features of all nodes, where the rule
    reads them.
    """
    B, shape = len(coins), draft.shape
    device, children = coins.device, shape.children.expand(B, -1, -1)
    rows = torch.arange(B, device=device)
    node, walking = torch.zeros(B, dtype=torch.int64, device=device), active
    path = torch.full((B, shape.depth + 1), -1, dtype=torch.int64, device=device)
    path[:, 0] = 0
    accepted, token, spent = torch.zeros_like(node), torch.zeros_like(node), torch.zeros(B, device=device)
    for depth in range(shape.depth + 1):
        kids = children[rows, node] if depth < shape.depth else children.new_empty(B, 0)  # [B, C]
        tokens = torch.where(kids > 0, draft.ids.gather(1, (kids - 1).clamp(min=0)), -1) if kids.shape[1] else kids
        p, uniform = law_of(node), position_uniforms[:, depth]
        near = None if hidden is None else hidden[rows[:, None], kids.clamp(min=0)]
        at = Position(p, tokens, draft.law(node), draft.drawn, near) if kids.shape[1] else Position(p, tokens, hidden=near)
        law = rule.law(at) if at.drawn == "deterministic" else None
        if law is not None:
            drawn = sample(law, uniform)
            hits = tokens == drawn[:, None]
            chosen = torch.where(hits.any(1), hits.long().argmax(1), -1) if kids.shape[1] else torch.full_like(node, -1)
            loss = None if rule.exact else 0.5 * (law - p).abs().sum(1)
        else:
            noted: list[Tensor | None] = []
            chosen, law = decide_rows(_noting(rule(at), noted), coins.gather(1, (kids - 1).clamp(min=0)))
            drawn, loss = sample(law, uniform), noted[0]
        if loss is not None:
            spent = spent + loss * (walking & (depth < room))
        took = walking & (chosen >= 0)
        token = torch.where(walking & ~took, drawn, token)
        walking = took
        if depth == shape.depth or not bool(walking.any()):
            break
        node = torch.where(took, kids.gather(1, chosen.clamp(min=0)[:, None])[:, 0], node)
        path[:, depth + 1] = torch.where(took, node, -1)
        accepted = accepted + took.long()
    emitted = torch.where(active, torch.minimum(accepted + 1, room), 0)
    return Verdict(path, accepted, token, emitted, spent)


def walk_chain(
    draft: Draft,
    p: Tensor,
    rule,
    *,
    coins: Tensor,
    position_uniforms: Tensor,
    active: Tensor,
    room: Tensor,
    hidden: Tensor | None = None,
) -> Verdict:
    """`walk` over a chain, all depths at once: the same verdict in fewer operations, for the laws of every depth.

    p: [B, M + 1, V], guided and warped; the rest as in `walk`.
    """
    B, M = draft.ids.shape
    rows, steps = torch.arange(B, device=coins.device), torch.arange(M + 1, device=coins.device)
    near = None if hidden is None else hidden[:, 1:, None]
    law = rule.law(Position(p, F.pad(draft.ids, (0, 1), value=-1)[..., None])) if draft.drawn == "deterministic" else None
    if law is not None:
        drawn = sample(law, position_uniforms)  # [B, M + 1]
        accepted = (drawn[:, :M] == draft.ids).long().cumprod(1).sum(1)
        token, loss = drawn[rows, accepted], None if rule.exact else 0.5 * (law - p).abs().sum(-1)
    else:
        at = Position(p[:, :M], draft.ids[..., None], draft.q, draft.drawn, near)
        first = next(iter(rule(at)))
        accepted = ((coins < first.ratio) & (draft.ids >= 0)).long().cumprod(1).sum(1)
        stop, here = accepted.clamp(max=M - 1), p[rows, accepted]
        is_leaf = accepted == M
        last = Position(
            here,
            torch.where(is_leaf, -1, draft.ids[rows, stop])[:, None],
            None if draft.q is None else torch.where(is_leaf[:, None], here, draft.q[rows, stop]),  # nothing was drawn there
            draft.drawn,
            None if near is None else near[rows, stop],
        )
        _, law = decide_rows(rule(last), torch.full((B, 1), float("inf"), device=p.device))
        token, loss = sample(law, position_uniforms[rows, accepted]), None if first.spent is None else F.pad(first.spent, (0, 1))
    path = torch.where(steps <= accepted[:, None], steps, -1)
    emitted = torch.where(active, torch.minimum(accepted + 1, room), 0)
    spent = p.new_zeros(B)
    if loss is not None:
        spent = (loss * (steps < emitted[:, None])).sum(1)
    return Verdict(path, accepted, token, emitted, spent)


def _noting(trials: Iterable[Trial], noted: list[Tensor | None]) -> Iterator[Trial]:
    """The trials as they are; what the first says of the position's loss is noted."""
    for trial in trials:
        noted.append(trial.spent)
        yield trial
