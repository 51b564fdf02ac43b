"""What an acceptance rule is: the candidates of one position in the order they are tried, each with its chance.

A rule is a generator of `Trial`s. It is resumed only where the trial before was rejected, so a residual is computed only when it is
needed; its last trial has index -1: nothing was accepted, the token is drawn from `law`. The same trials are used to decide (`decide`,
`decide_rows`, `walk_tree`), with one uniform a candidate, and to write down the law of the emitted token (`emitted_law`),
which is how every rule is tested.

Shapes: ... any leading dimensions (rows, depths, test cases), C candidates, V vocabulary, g drafts of a chain, D width.
p target law, q draft law, u uniform on [0, 1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Drawn = Literal["with_replacement", "without_replacement", "deterministic"]


class Position(NamedTuple):
    """All that a rule may look at: one position of the draft, in any number of rows at once."""

    p: Tensor
    """[..., V] target law, after guidance and warping."""
    candidates: Tensor
    """[..., C] int64, drafted tokens in the order of drawing; -1 for none, at the end."""
    q: Tensor | None = None
    """[..., V] law of the first draw; None where drawn is "deterministic": the candidates are the best of a tree or come from a table."""
    drawn: Drawn = "deterministic"
    """How the candidates came about: independent draws of q, draws without replacement, or no draws."""
    hidden: Tensor | None = None
    """[..., C, D] what the target knows of each candidate: its last hidden state there, normed as its output layer reads it."""


class Trial(NamedTuple):
    """One candidate of a position, given that those before were rejected."""

    index: int
    """Which candidate; -1 ends the list."""
    ratio: Tensor
    """[...]; it is accepted where u < ratio; 1 or more is certain."""
    law: Tensor
    """[..., V], the target law at this moment: what the token is drawn from if no more candidates are tried."""
    spent: Tensor | None = None
    """[...], of a first trial: total variation between the law that the position emits and p; None where it is 0 or not known."""


class Decision(NamedTuple):
    """How a position, a chain or a tree ended."""

    accepted: int
    """Index of the accepted candidate, -1 for none; of a chain the number of accepted tokens."""
    law: Tensor
    """[V] law the token is drawn from where none was accepted; of a chain the law of the token after the accepted ones."""
    num_uniforms: int
    """Uniforms used, one for each candidate that was tried."""


class TreeDecision(NamedTuple):
    """How the walk over a tree ended."""

    path: list[int]
    """Accepted nodes, the root first."""
    law: Tensor
    """[V] law of the token after the last accepted node."""
    num_uniforms: int
    """Uniforms used, one for each node that was tried."""


def chance(law: Tensor, tokens: Tensor) -> Tensor:
    """law(tokens) [...] of laws [..., V] and tokens [...]; 0 for the token -1."""
    return law.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] * (tokens >= 0)


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """Laws as `like` [..., V] with all mass on tokens [...]; none for the token -1."""
    return torch.zeros_like(like).scatter(-1, tokens.clamp(min=0)[..., None], (tokens >= 0).to(like.dtype)[..., None])


def leftover(p: Tensor, q: Tensor) -> Tensor:
    """norm([p - q]+) [..., V]. Where q covers p nothing can have been rejected, and p is returned: never a law outside its support."""
    return _normed((p - q).clamp_(min=0), p)


def _normed(rest: Tensor, otherwise: Tensor) -> Tensor:
    """A rest [..., V], which is overwritten, as a law; `otherwise` where nothing is left."""
    total = rest.sum(-1, keepdim=True)
    if total.device.type == "cpu" and total.numel() and total.amin().item() > 0:
        return rest.div_(total)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), otherwise)


def all_true(mask: Tensor) -> bool:
    """Whether all entries are known to be true; an accelerator is not asked, waiting for it costs more than the work that is saved."""
    return mask.device.type == "cpu" and bool(mask.all())


def _check_drawn(at: Position) -> None:
    if (at.q is None) != (at.drawn == "deterministic") and at.candidates.shape[-1]:
        raise ValueError(f"candidates drawn {at.drawn!r} {'need the' if at.q is None else 'have no'} draft law q")


def draws(at: Position) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The candidates one by one: index, tokens [...], and the law [..., V] each was drawn from, given those before it.

    q; without replacement q(x) 1[x not in earlier] / (1 - q(earlier)); 1 at the token where nothing was drawn. Where a token is absent or
    could not be drawn, that law is 0 and no rule accepts it or learns from it.
    Raises ValueError: q is missing, or given with deterministic candidates.
    """
    _check_drawn(at)
    rest, last = at.q, at.candidates.shape[-1] - 1
    for index, tokens in enumerate(at.candidates.unbind(-1)):
        if at.q is None:
            yield index, tokens, one_hot(tokens, at.p)
            continue
        can_be = chance(rest, tokens) > 0
        yield index, tokens, rest if all_true(can_be) else torch.where(can_be[..., None], rest, 0.0)
        if at.drawn == "without_replacement" and index < last:
            rest = rest.scatter(-1, tokens.clamp(min=0)[..., None], 0.0)  # after an absent token no other comes
            rest.div_(rest.sum(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).tiny))


def quotient(mass: Tensor, q: Tensor) -> Tensor:
    """mass / q, and 0 where q is 0: what cannot be drawn is not accepted."""
    return torch.where(q > 0, mass / q.clamp(min=torch.finfo(q.dtype).tiny), 0.0)


def end(law: Tensor) -> Trial:
    """The last trial: no candidate is left, the token is drawn from law [..., V]."""
    return Trial(-1, torch.ones_like(law[..., 0]), law)


def decide(trials: Iterable[Trial], uniforms: Iterator[float]) -> Decision:
    """Run the trials of one position: one uniform a candidate, in order, until one is accepted."""
    used = 0
    for trial in trials:
        if trial.index < 0:
            break
        used += 1
        if next(uniforms) < float(trial.ratio):
            break
    return Decision(trial.index, trial.law, used)


def decide_rows(trials: Iterable[Trial], uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Run the trials of many positions at once. uniforms: [..., C], one a candidate, used or not.

    Returns the accepted candidate [...], -1 for none, and the law [..., V] of the token where none was.
    """
    if uniforms.device.type == "cpu" and uniforms.shape[:-1].numel() == 1:  # one row: numbers are quicker than tensors of one number
        decision = decide(trials, iter(uniforms.flatten().tolist()))
        return torch.full(uniforms.shape[:-1], decision.accepted), decision.law
    accepted = torch.full(uniforms.shape[:-1], -1, device=uniforms.device)
    for trial in trials:
        if trial.index < 0:
            return accepted, trial.law
        takes = (accepted < 0) & (uniforms[..., trial.index] < trial.ratio)
        accepted = torch.where(takes, trial.index, accepted)
        if all_true(accepted >= 0):
            return accepted, trial.law
    raise ValueError("the rule ended without a trial of index -1")


def verify(at: Position, law: Tensor | None = None) -> Iterator[Trial]:
    """Recursive rejection: accept x_k with r(x_k)/q_k(x_k), else go on with r = norm([r - q_k]+). Exact for `law`, p by default.

    A candidate of draft law 0 is not one of the draft's and is passed over.
    q_k is q / z_k: r is 0 at every rejected token, so that q need not be emptied there, and a rejection costs one number a row.
    Source: arXiv 2402.14160, algorithm 2; with one candidate 2211.17192, algorithm 1.
    """
    _check_drawn(at)
    r = at.p if law is None else law
    spent = None if law is None else 0.5 * (law - at.p).abs().sum(-1)
    if at.q is None or not at.candidates.shape[-1]:
        for index, x in enumerate(at.candidates.unbind(-1)):
            yield Trial(index, chance(r, x), r, spent)
            r = leftover(r, one_hot(x, r))
    else:
        x, z, can_be = _shares(at)
        weights = torch.where(can_be, z / at.q.gather(-1, x), 0.0).clamp_(max=torch.finfo(r.dtype).max).to(r.dtype)
        minus = torch.where(can_be, -1 / z, 0.0).to(r.dtype)
        for index, (token, weight, less) in enumerate(zip(x.split(1, -1), weights.split(1, -1), minus.split(1, -1))):
            yield Trial(index, (r.gather(-1, token) * weight)[..., 0], r, spent)  # r(x) / q_k(x)
            r = _normed(torch.addcmul(r, at.q, less).clamp_(min=0), r)
    yield Trial(-1, torch.ones_like(r[..., 0]), r, spent)


def _shares(at: Position) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates drawn from q, all [..., C]: tokens, 0 for an absent one; z_k float64, what is left of q's mass before the k-th draw;
    and which of them q could have drawn then."""
    x = at.candidates.clamp(min=0)
    q = at.q.gather(-1, x).double()
    can_be = (at.candidates >= 0) & (q > 0)
    if at.drawn == "with_replacement" or x.shape[-1] == 1:
        return x, torch.ones_like(q), can_be
    can_be = can_be & ~(x[..., :, None] == x[..., None, :]).tril(-1).any(-1)
    mass = torch.where(can_be, q, 0.0)
    total = at.q.sum(-1, keepdim=True, dtype=torch.float64)
    # the difference of two sums may round to less than the token's own mass, which is left before it is drawn
    return x, torch.maximum(total - (mass.cumsum(-1) - mass), mass).clamp_(min=torch.finfo(torch.float64).tiny), can_be


def emitted_law(trials: Iterable[Trial], candidates: Tensor) -> Tensor:
    """Law [..., V] of the token that a position emits, given its candidates [..., C]; averaged over their draws it is the rule's law."""
    law = reached = None
    for trial in trials:
        if law is None:
            law, reached = torch.zeros_like(trial.law), torch.ones_like(trial.law[..., 0])
        if trial.index < 0:
            return law + reached[..., None] * trial.law
        accepted = reached * trial.ratio.clamp(max=1)
        law = law.scatter_add(-1, candidates[..., trial.index, None].clamp(min=0), accepted[..., None])
        reached = reached - accepted
    raise ValueError("the rule ended without a trial of index -1")


def walk_chain(laws: Tensor, tokens: Tensor, draft_laws: Tensor | None, uniforms: Iterable[float]) -> Decision:
    """The standard rule along one chain, step by step: speculative sampling as published, beside which the batched walk is tested.

    laws: [g + 1, V]. tokens: [g]. draft_laws: [g, V], or None for a draft that was not drawn (q is 1 at its token).
    uniforms: one for each token that is tried. Returns how many were accepted and the law of the next token.
    Source: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1.
    """
    source, used = iter(uniforms), 0
    for i, token in enumerate(tokens.tolist()):
        p = laws[i]
        q = torch.zeros_like(p).index_fill(0, tokens[i : i + 1].long(), 1.0) if draft_laws is None else draft_laws[i]
        used += 1
        # without a division, so that q = 0 needs no case: such a token is not drawn
        if not next(source) * float(q[token]) < float(p[token]):
            return Decision(i, leftover(p, q), used)
    return Decision(len(tokens), laws[len(tokens)], used)


def walk_tree(
    parents: Sequence[int],
    tokens: Sequence[int],
    law_of: Callable[[int], Tensor],
    rule: Callable[[Tensor, list[int], int], Iterable[Trial]],
    uniforms: Iterable[float],
    *,
    has_repeats: bool = False,
) -> TreeDecision:
    """Descend from the root, at each node to the child that the rule accepts, until it accepts none.

    parents, tokens: of each node, parents before children, -1 for the root 0. Children are tried in the order of their ids; the children of
    all siblings with the accepted token come next. law_of: node -> p [V], asked for visited nodes only.
    rule: (p [V], child nodes, their parent) -> trials. uniforms: one for each node that is tried.
    has_repeats: each of several siblings with one token is tried, as draws with replacement must be; otherwise the first alone.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    source, used, group, last = iter(uniforms), 0, [0], 0
    while True:
        nodes = [child for node in group for child in children[node]]
        by_token: dict[int, list[int]] = {}
        for child in nodes:
            by_token.setdefault(tokens[child], []).append(child)
        tried = nodes if has_repeats else [same[0] for same in by_token.values()]
        decision = decide(rule(law_of(group[0]), tried, group[0]), source)
        used += decision.num_uniforms
        if decision.accepted < 0:
            return TreeDecision(_path(parents, last), decision.law, used)
        group = by_token[tokens[tried[decision.accepted]]]
        last = group[0]


def _path(parents: Sequence[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
