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

from vistok.decoding.accept.rounds import Position, Trial, all_true, decide_rows
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
    M, device = shape.num_tokens, coins.device
    children = shape.children.expand(B, -1, -1)
    places = (children - 1).clamp(min=0)  # of children among the draft tokens
    below = draft.ids.gather(1, places.flatten(1)).view_as(children).masked_fill(children < 0, -1) if M else children
    rows = torch.arange(B, device=device)
    node, walking = torch.zeros(B, dtype=torch.int64, device=device), active
    path, token, spent = [node], node, torch.zeros(B, device=device)
    for depth in range(shape.depth + 1):
        p, uniform = law_of(node), position_uniforms[:, depth]
        if depth < shape.depth:
            kids, tokens = children[rows, node], below[rows, node]  # [B, C]
            near = None if hidden is None else hidden[rows[:, None], kids.clamp(min=0)]
            q = draft.law(node)
            q = None if q is None else torch.where(kids[:, :1] < 0, p, q)  # nothing was drawn behind a leaf
            at = Position(p, tokens, q, draft.drawn, near)
        else:
            kids = tokens = node.new_empty(B, 0)
            at = Position(p, tokens, hidden=None if hidden is None else hidden[:, :0])
        law = rule.law(at) if at.drawn == "deterministic" else None
        if law is not None:
            drawn = sample(law, uniform)
            after = torch.where(tokens == drawn[:, None], kids, M + 1)
            after = after.amin(1) if depth < shape.depth else torch.full_like(node, M + 1)  # the first child that is the token
            took = walking & (after <= M)
            loss = None if rule.exact else 0.5 * (law - p).abs().sum(1)
        else:
            noted: list[Tensor | None] = []
            chosen, law = decide_rows(_noting(rule(at), noted), coins.gather(1, places[rows, node]) if depth < shape.depth else p[:, :0])
            took = walking & (chosen >= 0)
            after = kids.gather(1, chosen.clamp(min=0)[:, None])[:, 0] if depth < shape.depth else node
            drawn, loss = token if all_true(took) else sample(law, uniform), noted[0]
        if loss is not None:
            spent = spent + loss * (walking & (depth < room))
        token = torch.where(walking, drawn, token)  # an image that goes on gets another one further down
        walking = took
        if depth == shape.depth or not bool(walking.any()):
            break
        path.append(torch.where(took, after, -1))
        node = path[-1].clamp(min=0)
    path = F.pad(torch.stack(path, 1), (0, shape.depth + 1 - len(path)), value=-1)
    accepted = (path >= 0).sum(1) - 1
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
