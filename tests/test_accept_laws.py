"""The law that each acceptance rule emits at one position, summed over every draft and every outcome of every trial; no sampling.

Thousands of pairs (p, q) at once, adversarial ones among them: zeros, ties, disjoint supports, one-hot laws, equal laws.
"""

import itertools

import pytest
import torch
from torch import Tensor

from vistok.decoding.accept import LatticeNeighbours, Position, emitted_law, make_rule, neighbour_table
from vistok.decoding.accept.clusters import cluster_law
from vistok.decoding.accept.lantern import carry_mass, move_mass
from vistok.decoding.accept.relaxed import cascade_law, distance, least_typical

V, CASES = 5, 3000
DETERMINISTIC = ([0], [3, 1], [4, 0, 2], [4, 0, 2, 1, 3], [2, 1, -1, -1])


def laws(n: int = CASES, width: int = V) -> tuple[Tensor, Tensor]:
    """n pairs of laws [n, V] in float64; every eighth of them of one adversarial kind."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, n, width, generator=generator, dtype=torch.float64).pow(3).clamp(min=1e-4)
    kind = torch.arange(n) % 8
    p[kind == 1, :2] = 0
    q[kind == 2, 2:4] = 0
    q[kind == 3] = p[kind == 3]
    p[kind == 4, :2], q[(kind == 4).nonzero()[:, 0], 2:] = 0, 0
    for number, law in ((5, q), (6, p)):
        rows = (kind == number).nonzero()[:, 0]
        law[rows] = torch.eye(width, dtype=torch.float64)[rows % width]
    p[kind == 7], q[kind == 7] = (p[kind == 7] * 3).ceil(), (q[kind == 7] * 2).ceil()  # ties
    return p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)


P, Q = laws()


def drawn_law(rule, p: Tensor, q: Tensor, count: int, drawn: str = "with_replacement", hidden: Tensor | None = None) -> Tensor:
    """Emitted law [n, V], averaged over all V^count drafts by the chance of each. hidden: [V, D], a state of each token."""
    n, width = p.shape
    drafts = torch.tensor(list(itertools.product(range(width), repeat=count)))  # [V^count, count]
    chances, left = torch.ones(n, len(drafts), dtype=torch.float64), torch.ones(n, len(drafts), dtype=torch.float64)
    for i in range(count):
        is_new = ~(drafts[:, :i] == drafts[:, i : i + 1]).any(1)
        if drawn == "without_replacement":
            chances = chances * torch.where(is_new & (left > 1e-12), q[:, drafts[:, i]] / left.clamp(min=1e-12), 0.0)
            left = left - q[:, drafts[:, i]]
        else:
            chances = chances * q[:, drafts[:, i]]
    candidates = drafts.expand(n, -1, -1)
    p, q = (law[:, None].expand(n, len(drafts), width) for law in (p, q))
    at = Position(p, candidates, q, drawn, None if hidden is None else hidden[candidates])
    return (chances[..., None] * emitted_law(rule(at), candidates)).sum(1)


def fixed_law(rule, p: Tensor, candidates: list[int]) -> Tensor:
    tokens = torch.tensor(candidates).expand(len(p), -1)
    return emitted_law(rule(Position(p, tokens)), tokens)


def table(k: int) -> Tensor:
    return neighbour_table(torch.randn(V, 3, generator=torch.Generator().manual_seed(0)), k)


def is_law(law: Tensor) -> bool:
    return bool((law >= -1e-12).all()) and bool((law.sum(-1) - 1).abs().max() < 1e-9)


@pytest.mark.parametrize(
    ("name", "drawn"), [("standard", "with_replacement"), ("standard", "without_replacement"), ("k_seq", "with_replacement")]
)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_exact_rules_emit_the_target_law(name, drawn, count):
    can_draw = (Q > 0).sum(1) >= count if drawn == "without_replacement" else torch.ones(len(Q), dtype=torch.bool)
    p, q = P[can_draw], Q[can_draw]
    torch.testing.assert_close(drawn_law(make_rule(name), p, q, count, drawn), p, rtol=0, atol=1e-9)


@pytest.mark.parametrize("candidates", DETERMINISTIC)
def test_candidates_that_were_not_drawn_leave_the_law_as_it_is(candidates):
    torch.testing.assert_close(fixed_law(make_rule("standard"), P, candidates), P, rtol=0, atol=1e-9)
    first = next(iter(make_rule("standard")(Position(P, torch.tensor(candidates).expand(len(P), -1)))))
    torch.testing.assert_close(first.ratio, P[:, candidates[0]], rtol=0, atol=1e-12)


def acceptance(rule, p: Tensor, q: Tensor) -> Tensor:
    """Chance [n] that one draft token is accepted."""
    tokens = torch.arange(V)[:, None].expand(len(p), V, 1)
    at = Position(p[:, None].expand(-1, V, -1), tokens, q[:, None].expand(-1, V, -1), "with_replacement")
    return (q * next(iter(rule(at))).ratio.clamp(max=1)).sum(1)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["mixture", "lantern_budget"])
def test_rules_with_a_budget_spend_it_and_no_more(name, count, eps):
    options = {"neighbours": table(3), "k": 3} if name == "lantern_budget" else {}
    rule = make_rule(name, eps=eps, **options)
    law = drawn_law(rule, P, Q, count)
    spent = distance(law, P)
    assert rule.bound == eps and not rule.exact and is_law(law)
    torch.testing.assert_close(spent, distance(P, Q).clamp(max=eps), rtol=0, atol=1e-9)
    said = next(iter(rule(Position(P, torch.zeros(len(P), 1, dtype=torch.int64), Q, "with_replacement")))).spent
    torch.testing.assert_close(said, spent, rtol=0, atol=1e-9)
    # the most that any rule can have for that loss
    torch.testing.assert_close(acceptance(rule, P, Q), 1 - (distance(P, Q) - eps).clamp(min=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("candidates", DETERMINISTIC)
def test_a_budget_moved_to_candidates_stays_within_eps_and_robs_none(candidates, eps):
    rule = make_rule("lantern_budget", neighbours=table(3), k=3, eps=eps)
    law = fixed_law(rule, P, candidates)
    present = [token for token in candidates if token >= 0]
    assert is_law(law) and bool((distance(law, P) <= eps + 1e-9).all())
    torch.testing.assert_close(law, move_mass(P, torch.tensor(candidates).expand(len(P), -1), table(3), k=3, eps=eps), rtol=0, atol=1e-9)
    assert bool((law[:, present] >= P[:, present] - 1e-12).all())
    gained = (law - P)[:, present].sum(1)
    torch.testing.assert_close(gained, distance(law, P), rtol=0, atol=1e-9)  # all that was moved went to the candidates


def test_a_budget_goes_to_near_tokens_first():
    line = torch.arange(V)[:, None].float()
    p, q = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5]]).double(), torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]).double()
    near = carry_mass(p, q, neighbour_table(line, 1), k=1, eps=0.3)
    torch.testing.assert_close(near, torch.tensor([[0.3, 0.2, 0.0, 0.0, 0.5]]).double())
    torch.testing.assert_close(carry_mass(p, q, LatticeNeighbours((V,), 3), k=1, eps=0.3), near)
    shared = carry_mass(p, q, neighbour_table(line, 4), k=4, eps=0.3)
    torch.testing.assert_close(shared, torch.tensor([[0.3, 0.35, 0.0, 0.0, 0.35]]).double())
    # two tokens want what a third can give: each gets its share, and no more is given than there is
    p, q = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]]).double(), torch.tensor([[0.2, 0.0, 0.6, 0.2, 0.0]]).double()
    asked = carry_mass(p, q, torch.tensor([[1], [0], [1], [4], [3]]), k=1, eps=0.4)
    torch.testing.assert_close(asked, torch.tensor([[0.4 * 0.2 / 0.6, 0.0, 0.4 * 0.4 / 0.6, 0.6, 0.0]]).double())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("deferral", ["chow", "diff", "opt", "token"])
def test_cascades_emit_the_law_of_their_paper(deferral, alpha):
    rule = make_rule("cascade", deferral=deferral, alpha=alpha)
    for count in (1, 2):
        torch.testing.assert_close(drawn_law(rule, P, Q, count), cascade_law(P, Q, deferral=deferral, alpha=alpha), rtol=0, atol=1e-9)
    for p, q in zip(P[:200].tolist(), Q[:200].tolist()):  # row by row, as the table of the paper is written
        apart = sum(abs(a - b) for a, b in zip(p, q)) / 2
        least = {"chow": 1 - alpha, "diff": max(p) - alpha, "opt": max(p) - alpha * apart, "token": 2.0}[deferral]
        if abs(max(q) - least) < 1e-9:
            continue  # rounding decides
        expected = p if max(q) < least else q
        if deferral == "token":
            is_good = [a >= (1 - alpha) * max(p) for a in p]
            bad = sum(b for b, good in zip(q, is_good) if not good)
            expected = [b * good + a * bad for a, b, good in zip(p, q, is_good)]
        law = cascade_law(torch.tensor(p).double(), torch.tensor(q).double(), deferral=deferral, alpha=alpha)
        torch.testing.assert_close(law, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cluster_verification_is_exact_between_clusters_and_loses_the_stated_amount_inside(count):
    clusters = torch.tensor([0, 1, 0, 2, 1])
    law = drawn_law(make_rule("cluster", clusters=clusters), P, Q, count)
    assert is_law(law)
    torch.testing.assert_close(cluster_law(law, clusters), cluster_law(P, clusters), rtol=0, atol=1e-9)
    if count == 1:
        loss = torch.zeros(len(P), dtype=torch.float64)
        for c in range(3):
            p, q = P[:, clusters == c], Q[:, clusters == c]
            inside = distance(p / p.sum(1, keepdim=True).clamp(min=1e-300), q / q.sum(1, keepdim=True).clamp(min=1e-300))
            loss += torch.minimum(p.sum(1), q.sum(1)) * inside
        torch.testing.assert_close(distance(law, P), loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(drawn_law(make_rule("cluster", clusters=torch.arange(V)), P, Q, count), P, rtol=0, atol=1e-9)


def test_the_judge_loses_what_it_lets_pass():
    states = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])[:, None]
    rule = make_rule("judge", head=lambda hidden: 9 * hidden[..., 0])
    law = drawn_law(rule, P, Q, 1, hidden=states)
    torch.testing.assert_close(distance(law, P), (Q - P).clamp(min=0)[:, states[:, 0] > 0].sum(1), rtol=0, atol=1e-9)
    severe = make_rule("judge", head=lambda hidden: hidden[..., 0] - 99)
    torch.testing.assert_close(drawn_law(severe, P, Q, 2, hidden=states), P, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="hidden"):
        drawn_law(rule, P, Q, 1)


def test_typical_acceptance_loses_at_most_what_it_accepts_and_takes_no_improbable_token():
    rule = make_rule("typical", threshold=0.2, alpha=0.5)
    law, taken = drawn_law(rule, P, Q, 1), P > least_typical(P, threshold=0.2, alpha=0.5)[:, None]
    accepted = (Q * taken).sum(1)
    torch.testing.assert_close(law, Q * taken + (1 - accepted[:, None]) * P, rtol=0, atol=1e-9)
    assert bool((distance(law, P) <= accepted + 1e-9).all())


def test_greedy_emits_the_most_probable_token():
    best = torch.eye(V, dtype=torch.float64)[P.argmax(1)]
    torch.testing.assert_close(drawn_law(make_rule("greedy"), P, Q, 2), best, rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn_law(make_rule("standard"), best, Q, 2), best, rtol=0, atol=1e-9)  # temperature 0


@pytest.mark.parametrize("count", [1, 2])
def test_gsd_is_exact_where_groups_hold_one_token_and_unbounded_where_they_are_wide(count):
    apart, same = torch.eye(V) * 10, torch.zeros(V, 1)
    torch.testing.assert_close(drawn_law(make_rule("gsd", embeddings=apart), P, Q, count), P, rtol=0, atol=1e-9)
    torch.testing.assert_close(drawn_law(make_rule("gsd", embeddings=same, window=0), P, Q, count), P, rtol=0, atol=1e-9)
    wide = make_rule("gsd", embeddings=same)
    assert is_law(drawn_law(wide, P, Q, count))
    p, q = torch.full((1, V), 1 / V).double(), torch.eye(V)[:1].double()
    torch.testing.assert_close(drawn_law(wide, p, q, 1), q)  # a group of all tokens accepts every draft


def test_gsd_counts_the_tokens_that_its_paper_counts():
    p = torch.tensor([0.30, 0.05, 0.25, 0.22, 0.18]).double()
    q = torch.tensor([0.10, 0.60, 0.10, 0.10, 0.10]).double()
    embeddings = torch.tensor([[0.0], [0.1], [0.2], [5.0], [0.3]])
    ratio = [
        float(next(iter(make_rule("gsd", embeddings=embeddings, window=w)(Position(p, torch.tensor([2]), q, "with_replacement")))).ratio)
        for w in (1, 2, 7)
    ]
    # by p: tokens 0, 2, 3, 4, 1. One before: 0. Two before, one behind: 0, and 3, which is far. All: 0 and 4; 1 is 0.2 less probable
    assert ratio == pytest.approx([0.55 / 0.2, 0.55 / 0.2, 0.73 / 0.3])


@pytest.mark.parametrize(("name", "bound"), [("lantern", {"delta": 0.0}), ("lantern++", {"multiple": 1.0})])
@pytest.mark.parametrize(("count", "drawn"), [(1, "with_replacement"), (2, "with_replacement"), (2, "without_replacement")])
def test_lantern_without_a_bound_to_spend_is_exact(name, bound, count, drawn):
    rows = (Q > 0).sum(1) >= count
    p, q = P[rows].clamp(min=1e-9), Q[rows]  # a neighbour of probability 0 costs nothing and is always lent
    p = p / p.sum(1, keepdim=True)
    law = drawn_law(make_rule(name, neighbours=table(3), k=3, **bound), p, q, count, drawn)
    torch.testing.assert_close(law, p, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"delta": 0.1}, {"delta": 0.4}, {"multiple": 2.0}])
@pytest.mark.parametrize("residual", ["corrected", "reference"])
def test_lantern_emits_a_law_and_accepts_as_its_definition_says(options, residual):
    near = table(3)
    rule = make_rule("lantern" if "delta" in options else "lantern++", neighbours=near, k=3, residual=residual, **options)
    for count, drawn in ((1, "with_replacement"), (2, "without_replacement")):
        rows = (Q > 0).sum(1) >= count
        assert is_law(drawn_law(rule, P[rows], Q[rows], count, drawn))
    assert is_law(fixed_law(rule, P, [3, 1]))
    for p, q in zip(P[:200], Q[:200]):  # the definition, token by token
        for x in range(V):
            limit = options["delta"] if "delta" in options else (options["multiple"] - 1) * float(p[x])
            mass, lent = float(p[x]), 0.0
            for y in near[x].tolist():
                lent += float(p[y])
                if lent > limit:
                    break
                mass = float(p[x]) + lent
            ratio = float(next(iter(rule(Position(p, torch.tensor([x]), q, "with_replacement")))).ratio)
            if abs(lent - limit) > 1e-9:
                assert ratio == pytest.approx(mass / float(q[x]) if q[x] > 0 else 0.0, rel=1e-9)


def test_the_bound_of_lantern_does_not_bound_its_loss():
    groups, k = 16, 15
    n = groups * (k + 1)
    p = torch.full((n,), 1 / n, dtype=torch.float64)
    q = torch.zeros(n, dtype=torch.float64)
    q[:: k + 1] = 1 / groups
    members = torch.arange(n).view(groups, k + 1)
    neighbours = torch.stack([members[i // (k + 1)][members[i // (k + 1)] != i] for i in range(n)])
    delta = k / n + 1e-12
    tokens = torch.arange(0, n, k + 1)[:, None]
    at = Position(p.expand(groups, n), tokens, q.expand(groups, n), "with_replacement")
    law = emitted_law(make_rule("lantern", neighbours=neighbours, k=k, delta=delta)(at), tokens).mean(0)
    assert delta < 0.06
    assert float(distance(law, p)) == pytest.approx(k / (k + 1), abs=1e-9)
    budgeted = emitted_law(make_rule("lantern_budget", neighbours=neighbours, k=k, eps=delta)(at), tokens).mean(0)
    assert float(distance(budgeted, p)) == pytest.approx(delta, abs=1e-9)
