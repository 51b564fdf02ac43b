"""Draft trees: masks, positions and paths of a template that never changes.

A template lists the ranks of the children on the way from the root: [[0], [1], [0, 0]] is two children, the first of which has one child
itself. Nodes are numbered by depth and then by ranks; node 0 is the root, the last decided token. Source: Medusa, arXiv 2401.10774,
section 2.1.2 (the mask) and EAGLE, 2401.15077 (laws of a level).

n nodes without the root, P leaves, D depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

import torch
from torch import Tensor


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """[n + 1, n + 1] bool: node i sees node j, its ancestor or itself. parents: of each node, before it; -1 for the root."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def leaf_paths(parents: Sequence[int], *, is_sorted: bool = True) -> Tensor:
    """[P, D + 1] int64: the nodes from the root to each leaf, -1 behind the leaf.

    is_sorted: by the nodes on the way, a longer path before its equal; otherwise by the number of the leaf.
    """
    inner, paths = set(parents), []
    for leaf in range(len(parents)):
        if leaf not in inner:
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            paths.append(path[::-1])
    if is_sorted:
        paths.sort()
    longest = max(map(len, paths))
    return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])


@dataclass(frozen=True)
class TreeTemplate:
    """A fixed draft tree and what verifying it needs."""

    parents: tuple[int, ...]
    """Of each node; -1 for the root, which comes first. Parents come before children and depths never fall."""
    ranks: tuple[int, ...]
    """Which of its parent's draws a node is, from 0; -1 for the root."""

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> "TreeTemplate":
        """Raises ValueError: a path is empty, negative, named twice, or its parent is missing."""
        paths = sorted((tuple(path) for path in choices), key=lambda path: (len(path), path))
        numbers: dict[tuple[int, ...], int] = {(): 0}
        for path in paths:
            if not path or min(path) < 0 or path in numbers:
                raise ValueError(f"tree path {list(path)} must hold ranks from 0 on and be named once")
            if path[:-1] not in numbers:
                raise ValueError(f"tree path {list(path)} has no parent: add {list(path[:-1])} to the choices")
            numbers[path] = len(numbers)
        return cls((-1, *(numbers[path[:-1]] for path in paths)), (-1, *(path[-1] for path in paths)))

    @classmethod
    def likely(cls, num_tokens: int, depth: int) -> "TreeTemplate":
        """The nodes most worth verifying where each next sibling, and each next level, is half as likely as the one before.

        A greedy choice of Sequoia's (arXiv 2402.12374, section 3.1) for such a drafter. Raises ValueError: no such tree.
        """
        if num_tokens < 1 or depth < 1:
            raise ValueError(f"num_tokens={num_tokens} and depth={depth} must be at least 1")
        chosen, waiting = [], [(1, (0,))]
        while len(chosen) < num_tokens:
            cost, path = heappop(waiting)
            chosen.append(path)
            heappush(waiting, (cost + 1, (*path[:-1], path[-1] + 1)))
            if len(path) < depth:
                heappush(waiting, (cost + 1, (*path, 0)))
        return cls.from_choices(chosen)

    @classmethod
    def chain(cls, length: int) -> "TreeTemplate":
        """Each token behind the one before."""
        return cls(tuple(range(-1, length)), (-1, *[0] * length))

    @cached_property
    def mask(self) -> Tensor:
        """[n + 1, n + 1] bool: who sees whom."""
        return ancestor_mask(self.parents)

    @cached_property
    def depths(self) -> Tensor:
        """[n + 1] int64: position of each node after the root's."""
        return self.mask.sum(1) - 1

    @property
    def num_tokens(self) -> int:
        """n, without the root."""
        return len(self.parents) - 1

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """The depths as Python numbers."""
        return tuple(self.depths.tolist())

    @cached_property
    def paths(self) -> Tensor:
        """[P, D + 1] int64: nodes from the root to each leaf, sorted, -1 behind the leaf."""
        return leaf_paths(self.parents)

    @cached_property
    def expanded(self) -> tuple[int, ...]:
        """Nodes that have children, in order: the drafter is asked for the law after each of them."""
        return tuple(sorted(set(self.parents) - {-1}))

    @cached_property
    def level_rows(self) -> tuple[int, ...]:
        """Of each node the row of its parent among the expanded nodes of the parent's depth; -1 for the root."""
        depths, seen, row_of = self.depths.tolist(), {}, {}
        for node in self.expanded:
            row_of[node] = seen.get(depths[node], 0)
            seen[depths[node]] = row_of[node] + 1
        return tuple(-1 if parent < 0 else row_of[parent] for parent in self.parents)

    @cached_property
    def level_bounds(self) -> Tensor:
        """[D + 1] int64: level d, from 1, holds the nodes from bounds[d - 1] up to bounds[d]."""
        return torch.bincount(self.depths).cumsum(0)

    def token_slots(self, width: int) -> Tensor:
        """[n + 1] int64: where a node's token is in [root, all draws], where every expanded node makes `width` draws.

        Raises ValueError: a rank is not below width.
        """
        if max(self.ranks) >= width:
            raise ValueError(f"the tree asks for rank {max(self.ranks)} but a node makes {width} draws")
        order = {node: row for row, node in enumerate(self.expanded)}
        return torch.tensor([0, *(1 + width * order[p] + rank for p, rank in zip(self.parents[1:], self.ranks[1:]))])

    def earlier_siblings(self, node: int) -> list[int]:
        """Nodes of the same parent that are tried before the node."""
        return [other for other in range(1, node) if self.parents[other] == self.parents[node]] if node else []
