"""What a drafter proposes: tokens in the shape of a tree, with the laws they were drawn from. A chain is a tree of one branch.

Node 0 is the root, the last decided token; draft token i is node i + 1. Parents come before children.

B images, M draft tokens, D depth, C most children of a node, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.accept.rounds import Drawn
from vistok.decoding.trees import TreeTemplate


class TreeShape:
    """Who descends from whom, and what verifying needs to know of it.

    parents: [1 or B, M] int64, the node each draft token hangs from (0: the root); one row where all images share it.
    """

    def __init__(self, parents: Tensor):
        self.parents = parents
        if parents.shape[1] and bool((parents > torch.arange(parents.shape[1], device=parents.device)).any()):
            raise ValueError("a draft token must come after its parent")

    @classmethod
    def chain(cls, length: int, device: torch.device | str = "cpu") -> "TreeShape":
        """Each token hangs from the one before."""
        return _chain(length, torch.device(device))

    @classmethod
    def from_template(cls, template: TreeTemplate, device: torch.device | str = "cpu") -> "TreeShape":
        """A tree that never changes."""
        return cls(torch.tensor([template.parents[1:]], dtype=torch.int64, device=device))

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.parents.shape[1]

    @cached_property
    def is_chain(self) -> bool:
        return len(self.parents) == 1 and bool((self.parents[0] == torch.arange(self.num_tokens, device=self.parents.device)).all())

    @cached_property
    def ancestors(self) -> Tensor:
        """[1 or B, M + 1, M + 1] bool: node i sees node j, its ancestor or itself."""
        rows, M = self.parents.shape
        seen = torch.eye(M + 1, dtype=torch.bool, device=self.parents.device).repeat(rows, 1, 1)
        if self.is_chain:
            return torch.ones_like(seen).tril()
        above = F.pad(self.parents, (1, 0))  # the root is its own
        node = above
        for _ in range(M):
            seen.scatter_(2, node[..., None], True)
            if not bool(node.any()):
                break
            node = above.gather(1, node)
        return seen

    @cached_property
    def depths(self) -> Tensor:
        """[1 or B, M + 1] int64: of each node; 0 for the root."""
        return self.ancestors.sum(2) - 1

    @cached_property
    def depth(self) -> int:
        """D: the longest path."""
        return int(self.depths.max())

    @cached_property
    def ranks(self) -> Tensor:
        """[1 or B, M] int64: how many earlier siblings a draft token has."""
        same = self.parents[:, :, None] == self.parents[:, None, :]
        return same.tril(-1).sum(2)

    @cached_property
    def children(self) -> Tensor:
        """[1 or B, M + 1, C] int64: nodes that hang from each node, in the order they are tried; -1 where there are no more."""
        rows, M = self.parents.shape
        C = int(self.ranks.max()) + 1 if M else 0
        table = self.parents.new_full((rows, (M + 1) * C), -1)
        nodes = torch.arange(1, M + 1, device=self.parents.device).expand(rows, M)
        return table.scatter_(1, self.parents * C + self.ranks, nodes).view(rows, M + 1, C)

    @cached_property
    def child_lists(self) -> list[list[int]]:
        """Nodes that hang from each node of the first image, in the order they are tried."""
        found: list[list[int]] = [[] for _ in range(self.num_tokens + 1)]
        for node, parent in enumerate(self.parents[0].tolist(), 1):
            found[parent].append(node)
        return found


@lru_cache(maxsize=64)
def _chain(length: int, device: torch.device) -> TreeShape:
    return TreeShape(torch.arange(length, device=device)[None])


@dataclass(frozen=True)
class Draft:
    """Tokens for one verification pass.

    ids: [B, M] int64; -1 where an image has no token for that node. shape: how they hang together.
    drawn: how the children of a node came about, see `recursive_rejection`; "with_replacement" also says of a chain that it was drawn.
    q: [B, E, V] laws, none where drawn is "deterministic". rows: [1 or B, M + 1] int64, which of the E laws the children of a node were
    drawn from: the node's number among those the drafter was shown; -1 for a node that it was not.
    """

    ids: Tensor
    shape: TreeShape
    drawn: Drawn
    q: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self):
        if (self.q is None) != (self.drawn == "deterministic"):
            raise ValueError(f"a draft drawn {self.drawn!r} {'needs' if self.q is None else 'has no'} laws q")
        if self.ids.shape[1] != self.shape.num_tokens:
            raise ValueError(f"{self.ids.shape[1]} draft tokens but the tree has {self.shape.num_tokens}")

    @classmethod
    def chain(cls, ids: Tensor, q: Tensor | None = None) -> "Draft":
        """A chain of tokens ids [B, M] and the laws q [B, M, V] that they were drawn from; None: they were not drawn."""
        shape = TreeShape.chain(ids.shape[1], ids.device)
        if q is None:
            return cls(ids, shape, "deterministic")
        rows = torch.arange(ids.shape[1] + 1, device=ids.device)
        rows[-1] = -1
        return cls(ids, shape, "with_replacement", q, rows[None])

    def law(self, nodes: Tensor) -> Tensor | None:
        """[B, V] law of the first child of nodes [B]; meaningless for a node without children."""
        if self.q is None:
            return None
        rows = self.rows.expand(len(nodes), -1).gather(1, nodes[:, None]).clamp(min=0)
        return self.q[torch.arange(len(nodes), device=nodes.device), rows[:, 0]]

    def law_row(self, node: int) -> Tensor:
        """[1, V] law of the first child of a node of one image; a view."""
        return self.q[:, int(self.rows[0, node])]
