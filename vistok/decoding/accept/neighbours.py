"""Which tokens are near a token, in the metric in which its tokenizer looks codes up.

    table     the k nearest other codes of every code, [V, k], a block of distances at a time
    lattice   FSQ and LFQ: codes are the points of a box, so the neighbours of all of them are the same list of steps, without
              those that leave the box; a corner has the fewest points around it, and so says how far the list must go

V codes, d channels, k neighbours, M steps of the list.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor

from vistok.quantizers import FSQ, LFQ, VQ
from vistok.quantizers.lookup import nearest_codes

REMEMBERED = 1 << 20  # neighbours that a lattice remembers, 8 MB; it searches anew for each token where there would be more


def neighbour_table(codebook: Tensor, k: int, *, metric: Literal["euclidean", "cosine"] = "euclidean") -> Tensor:
    """The k nearest other tokens of each token, nearest first: [V, k] int32.

    codebook: [V, d]. metric: that of the tokenizer's own lookup; LlamaGen's is "cosine", though LANTERN's published tables are "euclidean".
    Memory: a block of scores at a time, never V x V. Raises ValueError: k is not in [1, V - 1].
    """
    _check(k, len(codebook))
    return _without_itself(nearest_codes(codebook, codebook, metric=metric, k=k + 1))


def _check(k: int, V: int) -> None:
    if not 1 <= k < V:
        raise ValueError(f"k={k} neighbours but {V} codes have 1 to {V - 1} others")


def _without_itself(nearest: Tensor) -> Tensor:
    """[V, k] int32 from the k + 1 codes [V, k + 1] nearest to each code, itself among them unless it has many equals."""
    V = len(nearest)
    is_other = nearest != torch.arange(V, device=nearest.device)[:, None]
    is_other[:, -1] &= ~is_other.all(1)  # a code with k + 1 equals may not find itself: drop the last then
    return nearest[is_other].view(V, -1).int()


class LatticeNeighbours:
    """Neighbours of the codes of an FSQ or LFQ, without a table of distances. `nearest` is its one method."""

    def __init__(self, levels: tuple[int, ...], k: int, *, spacing: tuple[float, ...] | None = None):
        """levels: of each channel, the first fastest in the id. k: the most neighbours asked for. spacing: between levels; 1 by default."""
        self.codebook_size = V = int(torch.tensor(levels).prod())
        _check(k, V)
        self.k, self.levels = k, torch.tensor(levels)
        self.basis = torch.cat([torch.ones(1, dtype=torch.int64), self.levels.cumprod(0)[:-1]])
        self.spacing = torch.ones(len(levels)) if spacing is None else torch.tensor(spacing)
        corner = torch.arange(V)[:, None] // self.basis % self.levels  # steps from the corner 0 to every code
        length = (corner * self.spacing).square().sum(1)
        reach = length.kthvalue(k + 1).values * (1 + 1e-5)  # itself and k others
        signs = torch.tensor(list(itertools.product((1, -1), repeat=len(levels))))
        steps = (corner[length <= reach][:, None] * signs).flatten(0, 1).unique(dim=0)
        steps = steps[steps.any(1)]
        self.steps = steps[(steps * self.spacing).square().sum(1).argsort(stable=True)]  # [M, d]
        self._found: Tensor | None = None

    def nearest(self, tokens: Tensor, k: int) -> Tensor:
        """The k nearest other tokens [..., k] int64 of tokens [...], nearest first."""
        if k > self.k:
            raise ValueError(f"k={k} neighbours, but this lattice was prepared for {self.k}")
        if self.codebook_size * self.k > REMEMBERED:
            return self._search(tokens, k)
        if self._found is None or self._found.device != tokens.device:
            self._found = self._search(torch.arange(self.codebook_size, device=tokens.device), self.k)
        return self._found[tokens, :k]

    def _search(self, tokens: Tensor, k: int) -> Tensor:
        steps, levels, basis = (part.to(tokens.device) for part in (self.steps, self.levels, self.basis))
        digits = (tokens[..., None] // basis % levels)[..., None, :] + steps  # [..., M, d]
        is_inside = ((digits >= 0) & (digits < levels)).all(-1)
        # the first k inside, in order: their places in the list are the k smallest
        place = torch.where(is_inside, torch.arange(len(steps), device=tokens.device), len(steps)).topk(k, largest=False).values
        return (digits * basis).sum(-1).gather(-1, place)


Neighbours = Tensor | LatticeNeighbours
"""A table [V, >= k], or a lattice."""


def nearest_tokens(neighbours: Neighbours, tokens: Tensor, k: int) -> Tensor:
    """The k nearest other tokens [..., k] int64 of tokens [...]; fewer where a table is narrower. The token -1 counts as 0."""
    tokens = tokens.clamp(min=0)
    return neighbours[tokens, :k].long() if isinstance(neighbours, Tensor) else neighbours.nearest(tokens, k)


def quantizer_of(tokenizer) -> FSQ | LFQ | VQ:
    """The quantizer inside a tokenizer. Raises ValueError: it has none whose codes have distances."""
    quantizer = getattr(tokenizer, "quantizer", None)
    quantizer = getattr(quantizer, "quantizer", quantizer)  # several scales or groups share one
    if not isinstance(quantizer, (FSQ, LFQ, VQ)):
        raise ValueError(f"{type(tokenizer).__name__} has no codebook to find neighbours in")
    return quantizer


def token_neighbours(tokenizer, k: int) -> Neighbours:
    """Neighbours of a tokenizer's tokens in its own lookup metric: a lattice for FSQ and LFQ, a table of k columns for a codebook."""
    quantizer = quantizer_of(tokenizer)
    _check(k, quantizer.codebook_size)
    if isinstance(quantizer, FSQ):
        return LatticeNeighbours(tuple(quantizer.levels), k, spacing=tuple(1 / (level // 2) for level in quantizer.levels))
    if isinstance(quantizer, LFQ):
        return LatticeNeighbours((2,) * quantizer.code_dim, k)
    return _without_itself(quantizer.nearest(quantizer.vectors(), k=k + 1))


def code_clusters(tokenizer, num_clusters: int, *, rounds: int = 20) -> Tensor:
    """Cluster of each token, [V] int64: k-means of the codes, started at codes far from each other, so the same every time.

    Raises ValueError: there are not 1 to V clusters.
    """
    quantizer = quantizer_of(tokenizer)
    V = quantizer.codebook_size
    if not 1 <= num_clusters <= V:
        raise ValueError(f"{num_clusters} clusters of {V} codes; there can be 1 to {V}")
    codes = quantizer.decode(torch.arange(V)).float()
    chosen, distance = [0], (codes - codes[0]).square().sum(1)
    for _ in range(num_clusters - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (codes - codes[chosen[-1]]).square().sum(1))
    centres = codes[chosen]
    for _ in range(rounds):
        nearest = nearest_codes(codes, centres)
        counts = torch.bincount(nearest, minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, nearest, codes)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return nearest_codes(codes, centres)
