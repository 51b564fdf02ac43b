"""Growing a draft level by level: chains, fixed trees, stochastic beams and the best nodes, all rows at once.

A drafter gives `expand`: the laws behind nodes that it is shown, a level at a time. How many of its draws become children, and of which
nodes, is decided here, the same for every drafter.

    chain       x_d ~ q(. | x_<d)
    template    children of a node are successive draws without replacement       RSD-C: Jeon et al. 2024, 2402.14160; Sequoia, 2402.12374
    beams       the W largest perturbed log-probabilities of each level           RSD-S: 2402.14160, 3.2; Kool et al. 2019, 1903.06059
    best nodes  expand the best K of each level, keep the best M of all           EAGLE-2: Li et al. 2024, 2406.16858

Beams need no Gumbel number a token. Of a node's perturbed values, the largest is the node's own, psi, and belongs to a token drawn from q;
given the k-th largest psi_k, the next is a Gumbel number of what mass is left, mu_k = phi + log(1 - q(drawn)), cut off at psi_k:

    psi_(k+1) = mu_k - log(exp(mu_k - psi_k) - log u)

so W draws without replacement and W uniforms a node are enough.

B images, W nodes of a level, F nodes shown before, M draft tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.sampling import sample
from vistok.decoding.trees import TreeTemplate

Expand = Callable[[Tensor, Tensor, int], Tensor]
"""expand(ids [B, W], ancestors [1 or B, W, F + W] bool, depth) -> q [B, W, V]: laws behind W nodes of one depth. ancestors says which of
the F nodes shown before, and of these W, each descends from, itself included. The root is shown first, at depth 0."""


def draw_distinct(q: Tensor, uniforms: Tensor) -> Tensor:
    """Successive draws without replacement by one cumulative sum: tokens [..., k] of laws [..., V] and uniforms [..., k].

    A draw is placed on the mass that is left, then moved past the intervals of the tokens drawn before. -1 where nothing is left to draw.
    """
    cumulative = q.double().cumsum(-1)
    total = cumulative[..., -1]
    tokens: list[Tensor] = []
    starts, masses = [q.new_zeros((*q.shape[:-1], 0), dtype=torch.float64) for _ in range(2)]
    for u in uniforms.double().unbind(-1):
        left = total - masses.sum(-1)
        place = u * left
        for start, mass in zip(starts.unbind(-1), masses.unbind(-1)):  # ascending
            place = place + mass * (place >= start)
        place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, place[..., None], right=True)
        is_new = left > 1e-9 * total
        for earlier in tokens:  # the last digits of a place may touch an interval that it should have passed
            is_new = is_new & (earlier != token[..., 0])
        end = cumulative.gather(-1, token)
        start = torch.where(token > 0, cumulative.gather(-1, (token - 1).clamp(min=0)), 0.0)
        starts, order = torch.cat([starts, start], -1).sort(-1)
        masses = torch.cat([masses, (end - start) * is_new[..., None]], -1).gather(-1, order)
        tokens.append(torch.where(is_new, token[..., 0], -1))
    return torch.stack(tokens, -1)


def grow_chain(expand: Expand, root: Tensor, uniforms: Tensor) -> Draft:
    """A chain of M tokens drawn one after another. root: [B]. uniforms: [B, M]."""
    ids, laws = root[:, None], []
    for depth in range(uniforms.shape[1]):
        seen = torch.ones(1, 1, depth + 1, dtype=torch.bool, device=root.device)
        laws.append(expand(ids[:, -1:], seen, depth)[:, 0])
        ids = torch.cat([ids, sample(laws[-1], uniforms[:, depth])[:, None]], dim=1)
    return Draft.chain(ids[:, 1:], torch.stack(laws, dim=1))


def grow_template(expand: Expand, root: Tensor, template: TreeTemplate, uniforms: Tensor) -> Draft:
    """A fixed tree whose siblings are draws without replacement, in order. root: [B]. uniforms: [B, M]."""
    shape, device = TreeShape.from_template(template, root.device), root.device
    depths, parents = template.depths.tolist(), template.parents
    ids = torch.cat([root[:, None], torch.full_like(uniforms, -1, dtype=torch.int64)], dim=1)
    shown: list[int] = []
    laws, rows = [], torch.full((1, len(parents)), -1, device=device)
    for depth in range(max(depths)):
        level = [node for node in template.expanded if depths[node] == depth]
        rows[0, level] = torch.arange(len(shown), len(shown) + len(level), device=device)
        shown += level
        seen = template.mask[level][:, shown].to(device)[None]
        q = expand(ids[:, level].clamp(min=0), seen, depth)
        laws.append(q)
        kids = [[node for node, parent in enumerate(parents) if parent == above] for above in level]
        width = max(map(len, kids))
        slots = torch.tensor([[max(k - 1, 0) for k in (*group, *[1] * (width - len(group)))] for group in kids], device=device)
        tokens = draw_distinct(q, uniforms[:, slots])  # [B, W, width]; what a node has too many of is not used
        for row, group in enumerate(kids):
            ids[:, group] = tokens[:, row, : len(group)]
    return Draft(ids[:, 1:], shape, "without_replacement", torch.cat(laws, dim=1), rows)


def grow_beams(expand: Expand, root: Tensor, *, levels: int, width: int, uniforms: Tensor) -> Draft:
    """RSD-S: `levels` times W nodes, siblings in the order of their draws. root: [B]. uniforms: [B, levels, 2, W, W]."""
    B, device, W = len(root), root.device, width
    ids, parents, laws = [], [], []
    frontier, nodes = root[:, None], torch.zeros(B, 1, dtype=torch.int64, device=device)  # tokens and node numbers of a level
    phi = psi = torch.zeros(B, 1, dtype=torch.float64, device=device)
    seen = torch.ones(B, 1, 1, dtype=torch.bool, device=device)
    rows = torch.full((B, 1 + levels * W), -1, device=device)
    for level in range(levels):
        n = frontier.shape[1]
        q = expand(frontier.clamp(min=0), seen, level)  # [B, n, V]
        before = sum(law.shape[1] for law in laws)
        rows.scatter_(1, nodes, torch.arange(before, before + n, device=device).expand(B, -1))
        laws.append(q)
        tokens = draw_distinct(q, uniforms[:, level, 0, :n])  # [B, n, W]
        phi_new, psi_new = _race(q, tokens, phi, psi, uniforms[:, level, 1, :n])
        psi_new = psi_new.masked_fill((frontier < 0)[..., None], float("-inf"))
        best = psi_new.flatten(1).topk(W, dim=1)
        # siblings must be tried in the order of their draws, which falls with psi: topk's own order
        above, psi, phi = best.indices // W, best.values, phi_new.flatten(1).gather(1, best.indices)
        frontier = tokens.flatten(1).gather(1, best.indices).masked_fill(psi == float("-inf"), -1)
        ids.append(frontier)
        parents.append(nodes.gather(1, above))
        seen = torch.cat([seen.gather(1, above[..., None].expand(-1, -1, seen.shape[2])),
                          torch.eye(W, dtype=torch.bool, device=device).expand(B, -1, -1)], dim=2)  # fmt: skip
        nodes = torch.arange(1 + level * W, 1 + (level + 1) * W, device=device).expand(B, -1)
    return Draft(torch.cat(ids, 1), TreeShape(torch.cat(parents, 1)), "without_replacement", torch.cat(laws, 1), rows)


def _race(q: Tensor, tokens: Tensor, phi: Tensor, psi: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """phi and psi [B, n, W] of draws tokens [B, n, W] from laws [B, n, V] of nodes with phi, psi [B, n]; see the head of this file."""
    chance = q.double().gather(-1, tokens.clamp(min=0)) * (tokens >= 0)
    left = (1 - (chance.cumsum(-1) - chance)).clamp(min=0)  # mass before each draw
    values = [psi]
    for k in range(1, tokens.shape[-1]):
        mu = phi + left[..., k].log()
        values.append(mu - ((mu - values[-1]).exp() - uniforms[..., k].double().clamp(min=1e-300).log()).log())
    psi_new = torch.stack(values, -1).masked_fill(tokens < 0, float("-inf"))
    return phi[..., None] + chance.log(), psi_new


def grow_best(expand: Expand, root: Tensor, *, num_tokens: int, rounds: int, top_k: int) -> Draft:
    """EAGLE-2: the M most probable tokens of a tree that grows its best K nodes for some rounds; not drawn. root: [B].

    Raises ValueError: the grown tree has fewer than M nodes.
    """
    pool = top_k + rounds * top_k**2
    if not 1 <= num_tokens <= pool:
        raise ValueError(f"num_tokens={num_tokens} but {rounds} rounds of top_k={top_k} grow 1 to {pool} tokens")
    B, device = len(root), root.device
    seen = torch.ones(B, 1, 1, dtype=torch.bool, device=device)
    best = expand(root[:, None], seen, 0).log()[:, 0].topk(top_k)
    tokens, scores, parents = [best.indices], [best.values], [torch.full((B, top_k), -1, device=device)]
    frontier = torch.arange(top_k, device=device).expand(B, -1)  # numbers in the pool
    seen, made = seen.expand(-1, top_k, -1), top_k
    ids, frontier_scores = best.indices, best.values
    shown = torch.full((B, pool + 1), -1, device=device)  # the last column is the root's
    shown[:, -1] = 0
    for depth in range(1, rounds + 1):
        shown.scatter_(1, frontier, torch.arange(1 + (depth - 1) * top_k, 1 + depth * top_k, device=device).expand(B, -1))
        seen = torch.cat([seen, torch.eye(top_k, dtype=torch.bool, device=device).expand(B, -1, -1)], dim=2)
        best = expand(ids, seen, depth).log().topk(top_k, dim=-1)  # [B, K, K]
        grown = (frontier_scores[..., None] + best.values).flatten(1)
        tokens.append(best.indices.flatten(1))
        scores.append(grown)
        parents.append(frontier.repeat_interleave(top_k, dim=1))
        ahead = grown.topk(top_k, dim=1)
        seen = seen.gather(1, (ahead.indices // top_k)[..., None].expand(-1, -1, seen.shape[2]))
        frontier, frontier_scores = made + ahead.indices, ahead.values
        ids = tokens[-1].gather(1, ahead.indices)
        made += top_k**2
    all_scores = torch.cat(scores, 1)
    # of equal scores the first counts: a parent stands before its children and a path's score never rises, so it is kept with them
    kept = all_scores.sort(dim=1, descending=True, stable=True).indices[:, :num_tokens].sort(dim=1).values
    number = torch.zeros(B, pool + 1, dtype=torch.int64, device=device)
    number.scatter_(1, kept, torch.arange(1, num_tokens + 1, device=device).expand(B, -1))
    above = torch.cat(parents, 1).gather(1, kept)
    chosen = torch.cat(tokens, 1).gather(1, kept).masked_fill(all_scores.gather(1, kept) == float("-inf"), -1)
    rows = torch.cat([shown[:, -1:], shown.gather(1, kept)], dim=1)
    return Draft(chosen, TreeShape(number.gather(1, torch.where(above < 0, pool, above))), "deterministic", None, rows)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Which of the shapes above a drafter grows, and how large."""

    shape: str = "chain"
    """"chain"; "tree", a fixed one of draws without replacement (RSD-C); "beams" (RSD-S); "best" (EAGLE-2); "auto", a chain or a tree as
    large as pays, which `decoding.tuning` finds out."""
    length: int = 4
    """Levels: the longest path."""
    width: int = 1
    """Children of the root in a "tree", whose other nodes have one; beams; nodes that "best" expands a level."""
    num_tokens: int = 0
    """Tokens that "best" keeps; 0: length * width of them. Of the largest tree of "auto"; 0: 12 * length."""

    def __post_init__(self):
        if self.shape not in ("chain", "tree", "beams", "best", "auto"):
            raise ValueError(f"shape={self.shape!r} but drafts grow as chain, tree, beams, best or auto")
        if self.length < 1 or self.width < 1:
            raise ValueError(f"length={self.length} and width={self.width} must be at least 1")
        if self.shape in ("chain", "auto") and self.width != 1:
            raise ValueError(f"shape={self.shape!r} has width 1, not {self.width}; shape='tree', 'beams' or 'best' have more")

    @property
    def num_nodes(self) -> int:
        """M, of the largest draft."""
        if self.shape == "auto":
            return max(self.num_tokens or 12 * self.length, self.length)
        return self.num_tokens if self.shape == "best" and self.num_tokens else self.length * self.width

    @cached_property
    def plans(self) -> dict[int, TreeTemplate] | None:
        """Of "auto": the drafts there are to choose from, by their number of tokens; chains up to `length`, then trees. None of others."""
        if self.shape != "auto":
            return None
        chains, largest, sizes = {n: TreeTemplate.chain(n) for n in range(1, self.length + 1)}, self.num_nodes, []
        while largest > self.length:
            sizes, largest = [largest, *sizes], largest // 2
        return chains | {n: TreeTemplate.likely(n, self.length) for n in sizes}

    @property
    def template(self) -> TreeTemplate:
        """The "tree": `width` chains that part at the root."""
        return TreeTemplate.from_choices([(rank, *[0] * depth) for rank in range(self.width) for depth in range(self.length)])

    def grow(self, expand: Expand, state, budget: int) -> Draft:
        """The draft of one step. A chain may be cut to `budget` tokens, which of "auto" says the plan; the others are as large as they are.

        Raises ValueError: "auto" has no plan of that many tokens.
        """
        if self.plans is not None:
            if budget not in self.plans:
                raise ValueError(f"num_draft_tokens={budget} but this drafter makes {', '.join(map(str, self.plans))} tokens")
            if budget > self.length:
                return grow_template(expand, state.root, self.plans[budget], state.uniforms(budget))
        if self.shape in ("chain", "auto"):
            return grow_chain(expand, state.root, state.uniforms(budget))
        if self.shape == "tree":
            return grow_template(expand, state.root, self.template, state.uniforms(self.num_nodes))
        if self.shape == "beams":
            uniforms = state.uniforms(2 * self.length * self.width**2).unflatten(1, (self.length, 2, self.width, self.width))
            return grow_beams(expand, state.root, levels=self.length, width=self.width, uniforms=uniforms)
        return grow_best(expand, state.root, num_tokens=self.num_nodes, rounds=self.length - 1, top_k=self.width)
