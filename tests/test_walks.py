"""Walking down a draft: one image in Python numbers decides what tensors over many images decide."""

import pytest
import torch

from vistok.decoding.accept import Position, make_rule, neighbour_table
from vistok.decoding.accept.rounds import decide_rows, verify
from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.sampling import sample
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.walk import walk, walk_chain
from vistok.decoding.walk_one import reject_in_turn, walk_one

V = 7
SHAPES = {
    "chain": [(0,), (0, 0), (0, 0, 0)],
    "tree": [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)],
}
RULES = {"standard": {}, "mixture": dict(eps=0.2), "lantern_budget": dict(eps=0.2), "cascade": dict(deferral="opt", alpha=0.5)}


def laws(*shape, seed=0):
    """Random laws, some with zeros, ties and all their mass on one token."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(*shape, V, generator=generator, dtype=torch.float64).pow(3)
    kind = torch.randint(8, shape, generator=generator)
    p[..., :3] = torch.where((kind == 1)[..., None], 0.0, p[..., :3])
    p = torch.where((kind == 2)[..., None], (p * 3).ceil(), p)
    p = torch.where((kind == 3)[..., None], torch.eye(V, dtype=torch.float64)[kind % V], p) + 0.0
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("drawn", ["with_replacement", "without_replacement"])
def test_rejections_in_numbers_leave_the_law_that_normed_residuals_leave(drawn):
    n, generator = 400, torch.Generator().manual_seed(1)
    p, q = laws(n), laws(n, seed=1)
    q[::9] = p[::9]
    candidates = sample(q[:, None].expand(-1, 4, -1), torch.rand(n, 4, generator=generator, dtype=torch.float64))
    candidates[::5, 2:], candidates[1::5, 3:] = -1, -1
    coins = torch.rand(n, 4, generator=generator, dtype=torch.float64)
    rejected = 0
    for i in range(n):
        at = Position(p[i : i + 1], candidates[i : i + 1], q[i : i + 1], drawn)
        expected, law = decide_rows(verify(at), coins[i : i + 1])
        found, rest = reject_in_turn(p[i], q[i], candidates[i].tolist(), coins[i].tolist(), replaces=drawn == "with_replacement")
        assert found == int(expected)
        if found < 0:
            rejected += 1
            torch.testing.assert_close(rest / rest.sum(), law[0], rtol=0, atol=1e-9)
    assert rejected > n / 20


def drafts(kind, drawn, generator):
    shape = TreeShape.from_template(TreeTemplate.from_choices(SHAPES[kind]))
    M = shape.num_tokens
    q = laws(1, M + 1, seed=int(torch.randint(2**31, (), generator=generator)))
    above = shape.parents[0]
    ids = sample(q[:, above], torch.rand(1, M, generator=generator, dtype=torch.float64))
    if drawn == "without_replacement":  # equal siblings are impossible: all but the first are absent
        for node in range(M):
            earlier = [other for other in range(node) if above[other] == above[node]]
            ids[0, node] = -1 if ids[0, node] in ids[0, earlier] else ids[0, node]
    if drawn == "deterministic":
        return Draft(ids, shape, drawn)
    return Draft.chain(ids, q[:, :M]) if kind == "chain" else Draft(ids, shape, drawn, q, torch.arange(M + 1)[None])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("drawn", ["with_replacement", "without_replacement", "deterministic"])
@pytest.mark.parametrize("name", RULES)
def test_one_image_is_walked_as_many_are(name, drawn, kind):
    more = dict(neighbours=neighbour_table(torch.arange(V)[:, None].float(), 3), k=2) if name == "lantern_budget" else {}
    rule, generator, depths = make_rule(name, **RULES[name], **more), torch.Generator().manual_seed(2), set()
    for i in range(40):
        draft = drafts(kind, drawn, generator)
        M, D = draft.shape.num_tokens, draft.shape.depth
        p = laws(1, M + 1, seed=1000 + i)
        if draft.q is not None:
            known = draft.q.shape[1]
            p = torch.cat([0.5 * p[:, :known] + 0.5 * draft.q, p[:, known:]], dim=1)  # or next to nothing is accepted
        coins, uniforms = (torch.rand(1, n, generator=generator, dtype=torch.float64) for n in (M, D + 1))
        options = dict(coins=coins, position_uniforms=uniforms, active=torch.tensor([i != 7]), room=torch.tensor([1 + i % 4]))
        slow = walk(draft, lambda node, p=p: p[[0], node], rule, **options)
        for fast in (
            walk_one(draft, lambda node, p=p: p[:, node], rule, **options),
            *([walk_chain(draft, p, rule, **options)] if kind == "chain" and i != 7 else []),
        ):
            assert torch.equal(fast.path, slow.path) and torch.equal(fast.emitted, slow.emitted)
            assert torch.equal(fast.accepted, slow.accepted) and torch.equal(fast.token, slow.token)
            torch.testing.assert_close(fast.spent.double(), slow.spent.double(), rtol=0, atol=1e-6)
        depths.add(int(slow.accepted))
    assert {0, 1} <= depths
