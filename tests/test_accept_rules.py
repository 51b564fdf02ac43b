"""The law that each acceptance rule emits at one position, summed over every draft and every outcome; no sampling."""

import itertools

import pytest
import torch

from vistok.decoding.accept import (
    accepts_greedily,
    decide,
    emitted_law,
    greedy,
    k_seq,
    lantern,
    lantern_budget,
    mixture,
    neighbour_table,
    recursive_rejection,
    standard,
    typical_paths,
    walk_chain,
    walk_tree,
)
from vistok.decoding.accept.exact import draft_law
from vistok.decoding.accept.lantern import move_mass
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.zipar import zipar_passes

V = 5


def laws(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random pair (p, q), adversarial by turns: zeros in either, equal, disjoint, one-hot."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, V, generator=generator, dtype=torch.float64).pow(3)
    kind = seed % 6
    if kind == 1:
        p[:2] = 0
    if kind == 2:
        q[2:4] = 0
    if kind == 3:
        q = p.clone()
    if kind == 4:
        p[:2], q[2:] = 0, 0
    if kind == 5:
        q = torch.zeros(V, dtype=torch.float64)
        q[seed % V] = 1
    return p / p.sum(), q / q.sum()


def law_of(rule, q: torch.Tensor, k: int, drawn: str) -> torch.Tensor:
    """Emitted law averaged over the draws of k candidates."""
    total = torch.zeros(V, dtype=torch.float64)
    for draws in itertools.product(range(V), repeat=k):
        chance = 1.0
        for i, token in enumerate(draws):
            chance *= float(draft_law(q, draws[:i], drawn)[token])
        if chance > 0:
            total += chance * emitted_law(rule(list(draws)), draws)
    return total


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return 0.5 * float((a - b).abs().sum())


def table(k: int, seed: int = 0) -> torch.Tensor:
    return neighbour_table(torch.randn(V, 3, generator=torch.Generator().manual_seed(seed)), k)


@pytest.mark.parametrize("seed", range(24))
def test_exact_rules_emit_the_target_law(seed):
    p, q = laws(seed)
    rules = {
        "standard": law_of(lambda c: standard(p, c[0], q), q, 1, "with_replacement"),
        "with": law_of(lambda c: recursive_rejection(p, c, q, drawn="with_replacement"), q, 2, "with_replacement"),
        "k_seq": law_of(lambda c: k_seq(p, c, q), q, 2, "with_replacement"),
    }
    if int((q > 0).sum()) >= 2:  # without replacement there must be two tokens to draw
        rules["without"] = law_of(lambda c: recursive_rejection(p, c, q, drawn="without_replacement"), q, 2, "without_replacement")
    for candidates in ([], [0], [3, 1], [4, 0, 2, 1, 3]):
        rules[str(candidates)] = emitted_law(recursive_rejection(p, candidates, None, drawn="deterministic"), candidates)
    for name, law in rules.items():
        torch.testing.assert_close(law, p, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
def test_rules_with_a_budget_stay_within_it(seed, eps):
    p, q = laws(seed)
    mixed = law_of(lambda c: mixture(p, c[0], q, eps=eps), q, 1, "with_replacement")
    assert distance(mixed, p) == pytest.approx(min(eps, distance(p, q)), abs=1e-9)
    for candidates in ([0], [3, 1], [4, 0, 2]):
        target = move_mass(p, candidates, table(3), k=3, eps=eps)
        law = emitted_law(lantern_budget(p, candidates, table(3), k=3, eps=eps), candidates)
        assert distance(law, p) <= eps + 1e-9
        torch.testing.assert_close(law, target, rtol=0, atol=1e-9)
        assert all(target[token] >= p[token] - 1e-12 for token in candidates)


def test_the_bound_of_lantern_does_not_bound_its_loss():
    groups, k = 16, 15
    n = groups * (k + 1)
    p = torch.full((n,), 1 / n, dtype=torch.float64)
    q = torch.zeros(n, dtype=torch.float64)
    q[:: k + 1] = 1 / groups
    members = torch.arange(n).view(groups, k + 1)
    neighbours = torch.stack([members[i // (k + 1)][members[i // (k + 1)] != i] for i in range(n)])
    law, delta = torch.zeros(n, dtype=torch.float64), k / n + 1e-12
    for token in range(0, n, k + 1):
        law += q[token] * emitted_law(lantern(p, [token], q, neighbours, k=k, delta=delta), [token])
    assert delta < 0.06
    assert distance(law, p) == pytest.approx(k / (k + 1), abs=1e-9)
    budgeted = emitted_law(lantern_budget(p, [0], neighbours, k=k, eps=delta), [0])
    assert distance(budgeted, p) <= delta + 1e-9


@pytest.mark.parametrize("bound", [{"delta": 0.0}, {"multiple": 1.0}])
def test_lantern_without_a_bound_to_spend_is_exact(bound):
    p, q = laws(6)
    law = law_of(lambda c: lantern(p, c, q, table(3), k=3, **bound), q, 2, "without_replacement")
    torch.testing.assert_close(law, p, rtol=0, atol=1e-9)


def test_lantern_accepts_more_than_the_exact_rule_and_takes_one_bound_only():
    p, _ = laws(0)
    exact = next(iter(recursive_rejection(p, [2], None, drawn="deterministic"))).ratio
    assert next(iter(lantern(p, [2], None, table(3), k=3, multiple=50.0, drawn="deterministic"))).ratio > exact
    with pytest.raises(ValueError, match="delta"):
        list(lantern(p, [2], None, table(3), k=3, drawn="deterministic"))


def test_the_neighbour_table_lists_other_codes_by_distance_even_where_codes_repeat():
    codebook = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert neighbour_table(codebook, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    repeated = neighbour_table(torch.zeros(6, 2), 3)
    assert repeated.shape == (6, 3) and not (repeated == torch.arange(6)[:, None]).any()
    with pytest.raises(ValueError, match="k=4"):
        neighbour_table(codebook, 4)


def test_greedy_keeps_the_best_token_only():
    p, _ = laws(0)
    best = int(p.argmax())
    assert decide(greedy(p, [best]), iter([0.99])).accepted == 0
    assert emitted_law(greedy(p, [(best + 1) % V]), [(best + 1) % V]).argmax() == best
    assert accepts_greedily(p.log(), best, None) and not accepts_greedily(p.log(), (best + 1) % V, None)


def test_a_chain_is_the_tree_with_one_branch():
    p, q = torch.stack([laws(6 * i)[0] for i in range(4)]), torch.stack([laws(6 * i + 12)[1] for i in range(3)])
    tokens = [0, 3, 1]

    def rule(law, nodes, parent):
        return recursive_rejection(law, [tokens[node - 1] for node in nodes], q[min(parent, 2)], drawn="with_replacement")

    for seed in range(20):
        uniforms = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        chain = walk_chain(p, torch.tensor(tokens), q, uniforms)
        tree = walk_tree([-1, 0, 1, 2], [0, *tokens], lambda node: p[node], rule, uniforms)
        assert (len(tree.path) - 1, tree.num_uniforms) == (chain.accepted, chain.num_uniforms)
        torch.testing.assert_close(tree.law, chain.law)


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
