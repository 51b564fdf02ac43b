"""What an acceptance rule is: the candidates of one position in the order they are tried, each with its chance.

A rule is a generator of `Trial`s. It is resumed only where the trial before was rejected, so a residual is computed only when it is
needed; its last trial has index -1: nothing was accepted, the token is drawn from `law`. The same trials are used to decide (`decide`),
with one uniform a candidate, and to write down the law of the emitted token (`emitted_law`), which is how every rule is tested.

V vocabulary; p target law, q draft law, u uniform on [0, 1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Trial(NamedTuple):
    """One candidate of a position, given that those before were rejected."""

    index: int
    """Which candidate; -1 ends the list."""
    ratio: float
    """It is accepted where u < ratio; 1 or more is certain."""
    law: Tensor
    """[V], the target law at this moment: what the token is drawn from if no more candidates are tried."""


class Decision(NamedTuple):
    """How a position, a chain or a tree ended."""

    accepted: int
    """Index of the accepted candidate, -1 for none; of a chain or tree the number of accepted tokens."""
    law: Tensor
    """[V] law the token is drawn from where none was accepted; of a chain or tree the law of the token after the accepted ones."""
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


Rule = Callable[[Tensor, list[int], int], Iterable[Trial]]
"""rule(p [V], nodes, parent): the trials of the children `nodes` of the accepted node `parent`."""


def decide(trials: Iterable[Trial], uniforms: Iterator[float]) -> Decision:
    """Run the trials of one position: one uniform a candidate, in order, until one is accepted."""
    used = 0
    for trial in trials:
        if trial.index < 0:
            break
        used += 1
        if next(uniforms) < trial.ratio:
            break
    return Decision(trial.index, trial.law, used)


def emitted_law(trials: Iterable[Trial], candidates: Sequence[int]) -> Tensor:
    """Law [V] of the token that a position emits, given its candidates; averaged over their draws it is the law of the rule."""
    law, reached = None, 1.0
    for trial in trials:
        law = torch.zeros_like(trial.law) if law is None else law
        if trial.index < 0:
            return law + reached * trial.law
        accepted = min(1.0, trial.ratio)
        law[candidates[trial.index]] += reached * accepted
        reached *= 1 - accepted
    raise ValueError("the rule ended without a trial of index -1")


def leftover(p: Tensor, q: Tensor) -> Tensor:
    """norm([p - q]+) [V]. Where q covers p nothing can have been rejected, and p is returned: never a law outside its support."""
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    return rest / total if total > 0 else p


def walk_chain(laws: Tensor, tokens: Tensor, draft_laws: Tensor | None, uniforms: Iterable[float]) -> Decision:
    """Accept the first tokens of a draft one after another: speculative sampling of a sequence.

    laws: [g + 1, V], p after 0 to g draft tokens. tokens: [g]. draft_laws: [g, V], or None for a draft that was not drawn (q is 1 at its
    token).
    uniforms: one for each token that is tried.
    Returns how many were accepted and the law of the next token: the residual, or the last law where all were.
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
    parents: Sequence[int], tokens: Sequence[int], law_of: Callable[[int], Tensor], rule: Rule, uniforms: Iterable[float]
) -> TreeDecision:
    """Descend from the root, at each node to the child that the rule accepts, until it accepts none.

    parents, tokens: of each node, parents before children, -1 for the root 0. Children are tried in the order of their ids; of children
    with the same token the first counts, and the children of all of them are its children.
    law_of: node -> p [V], asked for visited nodes only. uniforms: one for each node that is tried.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    source, used, group, last = iter(uniforms), 0, [0], 0
    while True:
        by_token: dict[int, list[int]] = {}
        for node in group:
            for child in children[node]:
                by_token.setdefault(tokens[child], []).append(child)
        candidates = list(by_token.values())
        decision = decide(rule(law_of(group[0]), [same[0] for same in candidates], group[0]), source)
        used += decision.num_uniforms
        if decision.accepted < 0:
            return TreeDecision(_path(parents, last), decision.law, used)
        group = candidates[decision.accepted]
        last = group[0]


def _path(parents: Sequence[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
