"""Acceptance rules beyond their laws: decisions for many rows at once, neighbours, names and options, walks over chains and trees."""

import pytest
import torch

import vistok
from vistok.decoding.accept import (
    LatticeNeighbours,
    Position,
    accepts_greedily,
    code_clusters,
    decide,
    decide_rows,
    list_rules,
    make_rule,
    neighbour_table,
    token_neighbours,
    typical_paths,
    verify,
    walk_chain,
    walk_tree,
)
from vistok.decoding.accept.lantern import aggregation
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.zipar import zipar_passes
from vistok.quantizers import FSQ, FSQConfig

V = 6


def random_laws(*shape: int, seed: int = 0) -> torch.Tensor:
    laws = torch.rand(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3)
    return laws / laws.sum(-1, keepdim=True)


def every_rule() -> dict:
    near = neighbour_table(torch.randn(V, 3, generator=torch.Generator().manual_seed(0)), V - 1)
    tables = {"neighbours": near, "k": 3}
    needs = {
        "cluster": {"clusters": torch.arange(V) % 3},
        "gsd": {"embeddings": torch.randn(V, 2, generator=torch.Generator().manual_seed(0))},
        "judge": {"head": lambda hidden: hidden[..., 0]},
        **dict.fromkeys(("lantern", "lantern++", "lantern_budget"), tables),
    }
    return {name: make_rule(name, **needs.get(name, {})) for name in list_rules()}


@pytest.mark.parametrize("name", list_rules())
def test_many_rows_are_decided_as_each_alone(name):
    rule, n = every_rule()[name], 60
    generator = torch.Generator().manual_seed(1)
    p, q, hidden = random_laws(n), random_laws(n, seed=1), torch.randn(n, 3, 1, generator=generator)
    candidates, coins = torch.randint(V, (n, 3), generator=generator), torch.rand(n, 3, generator=generator)
    candidates[::5, 1:] = -1
    accepted, law = decide_rows(rule(Position(p, candidates, q, "with_replacement", hidden)), coins)
    for b in range(n):
        count = int((candidates[b] >= 0).sum())
        at = Position(p[b], candidates[b, :count], q[b], "with_replacement", hidden[b, :count])
        alone = decide(rule(at), iter(coins[b].tolist()))
        assert alone.accepted == accepted[b]
        if alone.accepted < 0:
            torch.testing.assert_close(alone.law, law[b])


@pytest.mark.parametrize("name", list_rules())
def test_a_position_without_candidates_draws_from_the_target(name):
    p = random_laws(4)
    accepted, law = decide_rows(every_rule()[name](Position(p, torch.empty(4, 0, dtype=torch.int64))), torch.empty(4, 0))
    expected = torch.eye(V, dtype=p.dtype)[p.argmax(1)] if name == "greedy" else p
    assert accepted.tolist() == [-1] * 4
    torch.testing.assert_close(law, expected)


def test_a_chain_is_the_tree_with_one_branch():
    p, q, tokens = random_laws(4), random_laws(3, seed=1), [0, 3, 1]

    def rule(law, nodes, parent):
        return verify(
            Position(law, torch.tensor([tokens[node - 1] for node in nodes], dtype=torch.int64), q[min(parent, 2)], "with_replacement")
        )

    for seed in range(20):
        uniforms = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        chain = walk_chain(p, torch.tensor(tokens), q, uniforms)
        tree = walk_tree([-1, 0, 1, 2], [0, *tokens], lambda node: p[node], rule, uniforms)
        assert (len(tree.path) - 1, tree.num_uniforms) == (chain.accepted, chain.num_uniforms)
        torch.testing.assert_close(tree.law, chain.law)


def test_siblings_with_one_token_are_each_tried_where_draws_repeat():
    # two draws of one level, then one draw below each: the law of two tokens, summed over all drafts and by fine steps over no uniform
    p, q = random_laws(1 + V)[:, :3], random_laws(1 + V, seed=1)[:, :3]
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    law = torch.zeros(3, 3, dtype=torch.float64)

    def rule(at_p, nodes, parent, tokens):
        drawn = torch.tensor([tokens[node] for node in nodes], dtype=torch.int64)
        return verify(Position(at_p, drawn, q[0 if parent == 0 else 1 + tokens[parent]], "with_replacement"))

    generator = torch.Generator().manual_seed(0)
    trials = 1500
    for _ in range(trials):
        first = torch.multinomial(q[0], 2, replacement=True, generator=generator).tolist()
        below = [int(torch.multinomial(q[1 + token], 1, generator=generator)) for token in first]
        tokens = [0, *first, *below]
        coins = torch.rand(4, generator=generator).tolist()
        walk = walk_tree(
            [-1, 0, 0, 1, 2], tokens, lambda n, t=tokens: p[0 if n == 0 else 1 + t[n]], lambda a, b, c, t=tokens: rule(a, b, c, t), coins,
            has_repeats=True,
        )  # fmt: skip
        path = [tokens[node] for node in walk.path[1:]]
        if not path:  # the rest of the law is known without drawing
            law += walk.law[:, None] * p[1:4]
        elif len(path) == 1:
            law[path[0]] += walk.law
        else:
            law[path[0], path[1]] += 1
    expected = p[0][:, None] * p[1:4] * trials
    chi_square = float(((law - expected) ** 2 / expected).sum())
    assert chi_square < 8 + 5 * 16**0.5  # less than independent draws would have: part of each law is known


def test_the_lattice_has_the_neighbours_of_the_table():
    levels, k = (5, 4, 3), 12
    codes = FSQ(FSQConfig(levels=levels)).decode(torch.arange(60))
    spacing = tuple(1 / (level // 2) for level in levels)
    lattice, table = LatticeNeighbours(levels, k, spacing=spacing), neighbour_table(codes, k)
    tokens = torch.arange(60)
    near = lattice.nearest(tokens, k)

    def distances(of):
        return (codes[of.long()] - codes[:, None]).norm(dim=-1)

    torch.testing.assert_close(distances(near), distances(table), rtol=0, atol=1e-5)  # of equals, either may come first
    assert not (near == tokens[:, None]).any() and all(len(set(row)) == k for row in near.tolist())
    assert torch.equal(near[:, :5], lattice._search(tokens, k)[:, :5])  # remembered and searched anew
    with pytest.raises(ValueError, match="k=13"):
        lattice.nearest(tokens, 13)
    with pytest.raises(ValueError, match="k=60"):
        LatticeNeighbours(levels, 60)


@pytest.mark.parametrize("preset", ["fsq2d-tiny", "vqgan-tiny"])
def test_neighbours_come_from_the_tokenizers_own_lookup(preset):
    tokenizer = vistok.create(preset)
    near = token_neighbours(tokenizer, 4)
    if isinstance(near, torch.Tensor):
        unit = torch.nn.functional.normalize(tokenizer.quantizer.vectors(), dim=1)
        expected = (unit @ unit.t() - 2 * torch.eye(len(unit))).topk(4).values
        torch.testing.assert_close((unit[near.long()] * unit[:, None]).sum(-1), expected, rtol=0, atol=1e-5)
    else:
        steps = tokenizer.embed(near.nearest(torch.arange(20), 4)) - tokenizer.embed(torch.arange(20))[:, None]
        gaps = torch.cdist(tokenizer.embed(torch.arange(20)), tokenizer.embed(torch.arange(tokenizer.codebook_size)))
        torch.testing.assert_close(steps.norm(dim=-1), gaps.sort(1).values[:, 1:5], rtol=0, atol=1e-5)
    clusters = code_clusters(tokenizer, 7)
    assert clusters.unique().tolist() == list(range(7)) and torch.equal(clusters, code_clusters(tokenizer, 7))


def test_the_neighbour_table_lists_other_codes_by_distance_even_where_codes_repeat():
    codebook = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert neighbour_table(codebook, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    repeated = neighbour_table(torch.zeros(6, 2), 3)
    assert repeated.shape == (6, 3) and not (repeated == torch.arange(6)[:, None]).any()
    with pytest.raises(ValueError, match="k=4"):
        neighbour_table(codebook, 4)


def test_rules_are_made_by_name_and_say_what_is_wrong():
    tokenizer, target = vistok.create("fsq2d-tiny"), vistok.create("gpt-tiny")
    rule = make_rule("lantern_budget", tokenizer=tokenizer, eps=0.2)
    assert (rule.bound, rule.exact, str(rule)) == (0.2, False, "lantern_budget(k=10, eps=0.2)")
    assert make_rule("standard").exact and make_rule("lantern", tokenizer=tokenizer).bound is None
    assert make_rule("gsd", target=target).options["embeddings"] is not None
    assert make_rule("cluster", tokenizer=tokenizer, clusters=9).options["clusters"].max() == 8
    assert make_rule("judge", head=lambda h: h[..., 0]).needs_hidden
    for name, options, message in (
        ("lantern_bugdet", {}, "did you mean 'lantern_budget'"),
        ("mixture", {"epsilon": 0.1}, "no option 'epsilon'"),
        ("mixture", {"eps": 1.5}, "eps=1.5"),
        ("lantern", {}, "needs the tokenizer"),
        ("lantern", {"tokenizer": tokenizer, "k": 10**6}, "k=1000000"),
        ("gsd", {}, "needs the target"),
        ("judge", {}, "'head'"),
        ("cluster", {"tokenizer": tokenizer, "clusters": 10**6}, "1000000 clusters"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rule(name, **options)


def test_rules_refuse_what_they_cannot_judge():
    p, one = random_laws(1)[0], torch.tensor([2])
    with pytest.raises(ValueError, match="delta"):
        list(aggregation(Position(p, one), neighbours=neighbour_table(torch.eye(V), 3), k=3))
    with pytest.raises(ValueError, match="draft law q"):
        list(verify(Position(p, one, None, "with_replacement")))
    with pytest.raises(ValueError, match="independent draws"):
        list(make_rule("k_seq")(Position(p, one)))
    with pytest.raises(ValueError, match="deferral='both'"):
        list(make_rule("cascade", deferral="both")(Position(p, one, p, "with_replacement")))


def test_greedy_lantern_accepts_a_token_that_its_neighbours_raise_to_the_top():
    logits = torch.tensor([0.30, 0.29, 0.25, 0.16, 1e-9, 1e-9]).log()
    near = torch.tensor([[1, 2], [3, 2], [1, 3], [1, 2], [0, 1], [0, 1]])
    assert accepts_greedily(logits, 0, None) and not accepts_greedily(logits, 1, None)
    assert accepts_greedily(logits, 1, near, k=2, delta=0.2) and not accepts_greedily(logits, 1, near, k=2, delta=0.1)


def test_typical_acceptance_takes_probable_drafts_and_no_padding():
    logits = torch.zeros(2, 3, V)
    logits[..., 1] = 9.0
    options = {"temperature": 1.0, "threshold": 0.3, "alpha": 0.3}
    assert typical_paths(logits, torch.tensor([[0, 1, -1], [0, 1, 1]]), **options) == (1, 2)
    assert typical_paths(logits, torch.tensor([[0, 2, 1], [0, -1, -1]]), **options) == (0, 0)


def test_a_template_names_the_missing_parent():
    with pytest.raises(ValueError, match=r"no parent"):
        TreeTemplate.from_choices([[0], [1, 0]])


@pytest.mark.parametrize(("size", "window"), [(24, 16), (24, 8), (24, 4)])
def test_zipar_predicts_each_token_once_in_the_stated_number_of_passes(size, window):
    passes = zipar_passes(size, size, window)
    assert sorted(feed.target for feeds in passes for feed in feeds if feed.target is not None) == list(range(size, size * size))
    assert len(passes) + size == 2 * size + (size - 2) * window
    assert len(zipar_passes(6, 4, 6)) == 18  # a window of a whole row is raster order


def test_the_exact_rules_are_those_whose_laws_are_tested_as_exact():
    assert sorted(rule.name for rule in every_rule().values() if rule.exact) == ["k_seq", "standard"]
