"""The speculative loop on real, tiny generators: greedy equality, laws, independence of rows, cache, overshoot."""

import copy

import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate, tuning
from vistok.decoding.accept import make_rule
from vistok.decoding.draft import TreeShape
from vistok.decoding.drafters import make_drafter
from vistok.decoding.growth import Growth
from vistok.decoding.speculative import speculate
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.tuning import CostTable, Memory, Pace
from vistok.decoding.uniforms import Uniforms
from vistok.layers.placement import PlacedCache

GREEDY = SamplingConfig(temperature=0)


def sharpened(model, factor=20.0):
    """Fresh weights have flat laws, which any drafter would fail at; larger logits make some drafts right and some wrong."""
    with torch.no_grad():
        model.head.weight.mul_(factor)
    return model.eval()


def make(kind="grid", **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "rar":
            model = vistok.create("rar-tiny", codebook_size=12, num_classes=3, **overrides)
            for block in model.blocks:  # the identity, as initialised, would not notice a broken cache
                torch.nn.init.normal_(block.modulation.weight, std=0.05)
            return sharpened(model)
        shape = dict(layout_kind="sequence", layout_shape=(12,)) if kind == "sequence" else dict(layout_shape=(4, 4))
        return sharpened(vistok.create("gpt-tiny", **{**shape, "codebook_size": 12, "num_classes": 3, **overrides}))


DRAFTERS = {
    "copy": dict(length=3),
    "copy left": dict(length=5, source="left"),
    "recycling": dict(length=3),
    "recycling wide": dict(length=2, width=3),
    "jacobi": dict(length=4),
    "jacobi left": dict(length=3, fill="left"),
    "skip": dict(length=3),
    "model": dict(length=3),
    "model tree": dict(shape="tree", length=3, width=2),
    "model beams": dict(shape="beams", length=3, width=3),
    "model best": dict(shape="best", length=3, width=3, num_tokens=7),
    "model auto": dict(shape="auto", length=3, num_tokens=8),
}


def drafter_for(case, model):
    options = dict(DRAFTERS[case])
    if case.startswith("model"):
        options["model"] = blurred(model)
    return make_drafter(case.split()[0], model, **options)


def blurred(model):
    """Another model that agrees with this one often, not always."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        other.head.weight.add_(torch.randn_like(other.head.weight) * 0.2 * other.head.weight.std())
    return other


def condition(model, batch):
    return model.make_condition(batch, labels=[b % 3 for b in range(batch)])


@pytest.mark.parametrize("kind", ["grid", "sequence", "rar"])
@pytest.mark.parametrize("case", DRAFTERS)
def test_greedy_tokens_are_those_of_the_plain_loop(kind, case):
    model = make(kind)
    for batch, scale in ((4, 2.5), (1, 2.5), (4, 1.0))[: 3 if kind == "grid" else 1]:
        options = dict(sampling=GREEDY, generators=rng.image_generators(0, batch), guidance_scale=scale)
        expected, plain = generate(model, condition(model, batch), **options)
        got, stats = run(model, case, batch, sampling=GREEDY, scale=scale)
        assert torch.equal(got.ids, expected.ids)
        assert stats.target_passes <= plain.target_passes


def run(model, case, batch=4, first=0, rule="standard", seed=0, scale=1.0, **options):
    """Images first .. first + batch - 1 of a seed."""
    drafter = drafter_for(case, model)
    options = {"sampling": SamplingConfig(temperature=0.9), "num_draft_tokens": drafter.num_nodes, **options}
    labels = [b % 3 for b in range(first, first + batch)]
    return speculate(
        model, model.make_condition(batch, labels=labels), drafter=drafter, rule=make_rule(rule),
        generators=rng.image_generators(seed, range(first, first + batch)), guidance_scale=scale, **options,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["copy", "recycling wide", "model best"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_drafts_that_are_not_drawn_leave_every_sampled_token_as_it_was(case, scale):
    model = make()
    plain, _ = generate(model, condition(model, 4), generators=rng.image_generators(0, 4), guidance_scale=scale,
                        sampling=SamplingConfig(temperature=0.9))  # fmt: skip
    tokens, stats = run(model, case, scale=scale)
    assert torch.equal(tokens.ids, plain.ids)
    assert sum(stats.accepted[1:]) > 0


@pytest.mark.parametrize("case", DRAFTERS)
def test_an_image_does_not_depend_on_its_batch(case):
    model = make()
    together, _ = run(model, case, scale=2.0)
    alone = [run(model, case, batch=1, first=i, scale=2.0)[0].ids for i in range(4)]
    assert torch.equal(together.ids, torch.cat(alone))


@pytest.mark.parametrize("case, accepted", [("model", 3), ("model tree", 3), ("model beams", 3)])
@pytest.mark.parametrize("kind", ["grid", "sequence", "rar"])
def test_a_drafter_that_is_the_target_is_always_right(kind, case, accepted):
    model = make(kind)
    drafter = make_drafter("model", model, model=model, **DRAFTERS[case])
    N = model.max_tokens
    for sampling in (GREEDY, SamplingConfig(top_k=5)) if case == "model" else (GREEDY,):
        _, stats = speculate(model, condition(model, 2), drafter=drafter, rule=make_rule("standard"), sampling=sampling,
                             num_draft_tokens=drafter.num_nodes, generators=rng.image_generators(0, 2), guidance_scale=2.0)  # fmt: skip
        passes = -(-(N - 1) // (accepted + 1))
        assert stats.target_passes == 1 + passes


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
def test_a_draft_beyond_the_last_token_is_cut_off(num_tokens):
    model = make()
    drafter = make_drafter("model", model, model=model, length=7)
    plain, _ = generate(model, condition(model, 3), generators=rng.image_generators(0, 3), num_tokens=num_tokens, sampling=GREEDY)
    tokens, stats = speculate(model, condition(model, 3), drafter=drafter, rule=make_rule("standard"), sampling=GREEDY,
                              num_draft_tokens=7, generators=rng.image_generators(0, 3), num_tokens=num_tokens)  # fmt: skip
    assert torch.equal(tokens.ids, plain.ids)
    assert stats.num_tokens == 3 * num_tokens
    assert stats.image_passes + sum(n * count for n, count in enumerate(stats.accepted)) == 3 * (num_tokens - 1)


def test_given_uniforms_repeat_a_run_and_too_few_are_an_error():
    model = make()
    uniforms = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    again = [
        speculate(model, condition(model, 2), drafter=drafter_for("jacobi", model), rule=make_rule("standard"), uniforms=uniforms)[0].ids
        for _ in range(2)
    ]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="are asked for"):
        speculate(model, condition(model, 2), drafter=drafter_for("jacobi", model), rule=make_rule("standard"), uniforms=uniforms[:, :20])


def test_what_cannot_be_drafted_is_said():
    target = make()
    with pytest.raises(ValueError, match="VAR does not predict one next token"):
        speculate(vistok.create("var-tiny").eval(), None, drafter=None, rule=None)
    with pytest.raises(ValueError, match="did you mean 'jacobi'"):
        make_drafter("jacoby", target)
    with pytest.raises(ValueError, match="did you mean 'length'"):
        make_drafter("jacobi", target, lenght=3)
    with pytest.raises(ValueError, match="needs the option 'model'"):
        make_drafter("model", target)
    with pytest.raises(ValueError, match="vocab_size=200"):
        make_drafter("model", target, model=vistok.create("gpt-tiny", layout_shape=(4, 4), num_classes=3))
    with pytest.raises(ValueError, match="num_draft_tokens=9"):
        run(target, "jacobi", num_draft_tokens=9)


def test_uniforms_of_a_row_are_uniform_and_its_own():
    keys = rng.randint(2**62, (), rng.image_generators(0, 200))
    numbers = Uniforms(keys).draw(1000)
    assert torch.equal(Uniforms(keys[3:4]).draw(1000), numbers[3:4])
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 5 * (2 * 99) ** 0.5
    rows = numbers - 0.5
    assert (rows[:, :-1] * rows[:, 1:]).mean().abs() < 5 / 12 / numbers.numel() ** 0.5
    assert (rows[:-1] * rows[1:]).mean().abs() < 5 / 12 / numbers.numel() ** 0.5


@pytest.mark.parametrize("kind", ["grid", "sequence", "rar"])
@torch.no_grad()
def test_a_path_that_was_kept_leaves_the_cache_as_if_it_had_been_read_in_order(kind):
    model = make(kind)
    ids = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(0))
    kv = model.new_cache(2, 14)
    model.features(ids[:, :0], condition(model, 2), cache=kv)
    cache = PlacedCache(kv)
    prefix, lengths = cache.prefix_length, torch.tensor([2, 4])  # ragged: 2 and 4 tokens are decided
    first = cache.behind(torch.arange(4)[None], torch.ones(1, 4, 4, dtype=torch.bool).tril(), span=(prefix, prefix))
    model.extend(ids[:, :4], first, cache)
    cache.lengths = prefix + lengths
    tree = TreeShape(torch.tensor([[0, 0, 2]]))  # root; two children, and one below the second
    tokens = torch.stack([ids[row, [n, 0, n + 1, n + 2]] for row, n in enumerate(lengths)])
    placement = cache.behind(tree.depths, tree.ancestors, span=(prefix + 2, prefix + 4))
    features = model.extend(tokens, placement, cache)
    expected = model.features(ids, condition(model, 2))
    for row, n in enumerate(lengths.tolist()):
        assert torch.allclose(features[row, [0, 2, 3]], expected[row, [n + 1, n + 2, n + 3]], atol=1e-4)
    cache.keep(torch.tensor([[0, 2, 3]] * 2), torch.tensor([2, 1]), is_chain=False)
    assert cache.lengths.tolist() == [prefix + 5, prefix + 6]
    chain = cache.behind(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.bool), span=(prefix + 5, prefix + 6))
    after = model.extend(torch.stack([ids[0, 5], ids[1, 6]])[:, None], chain, cache)
    assert torch.allclose(after[0, 0], expected[0, 6], atol=1e-4) and torch.allclose(after[1, 0], expected[1, 7], atol=1e-4)


def paced(times, accepts, *, most=4, num_tokens=64, can_shorten=True):
    """A Pace after a call whose step with m draft tokens takes times[m] and accepts `accepts` of them at most; and what the call cost."""
    plans = {n: TreeTemplate.chain(n) for n in range(1, most + 1)} if can_shorten else {most: None}
    pace, progress, seconds = Pace(plans, num_tokens, CostTable({1: 1.0}), only_shorter=True), 0, 0.0
    while progress < num_tokens and pace.budget:
        m = pace.budget
        accepted = min(accepts, m)
        progress, seconds = progress + accepted + 1, seconds + times[m]
        path = torch.tensor([[*range(accepted + 1), *[-1] * (m - accepted)]])
        pace.note(times[m], progress, path, torch.tensor([accepted + 1]))
    return pace, seconds + (num_tokens - progress)


@pytest.mark.parametrize("full", [1.1, 1.5, 4.0])
def test_drafting_that_gains_nothing_ends_before_it_costs_five_percent(full):
    pace, cost = paced([1, 1, 1, 1, full], 0)
    assert pace.budget == 0 and "plain decoding" in pace.decision
    assert cost <= 1.05 * 64 or full == 4.0 and cost <= 64 + 3  # one step is the least that can be tried


def test_a_chain_becomes_as_long_as_pays_and_a_tree_stays_whole():
    pace, cost = paced([1, 1.2, 1.4, 1.6, 1.8], 2)
    assert pace.budget == 2 and cost < 40 and "a chain of 2" in pace.decision
    pace, _ = paced([1, 1.2, 1.4, 1.6, 1.8], 2, can_shorten=False)
    assert pace.budget == 4 and "a tree of 4" in pace.decision
    assert pace.break_even == pytest.approx(1.8)


def simulated(costs, chances, *, num_tokens=576, calls=1, seed=0):
    """Paces of calls with the drafts of shape="auto", and each call's time over the plain loop's; the first call has all to find out.

    A pass over n tokens costs costs(n), a level of a draft 0.02 more, and the child of rank k is accepted with chances[k].
    """
    plans, generator, memory, found = Growth(shape="auto", length=4).plans, torch.Generator().manual_seed(seed), Memory(), []
    table = CostTable({1: costs(1)})

    def measure(n):
        table.known[n] = costs(n)
        return costs(n)

    for _ in range(calls):
        if not memory.should_try():
            found.append((None, 1.0))
            continue
        pace = Pace(plans, num_tokens, table, start=memory.best or 4, seen=memory.seen, measure=measure)
        progress = seconds = 0
        while progress < num_tokens and pace.budget:
            template, path = plans[pace.budget], [0]
            while True:
                children = [node for node, parent in enumerate(template.parents) if parent == path[-1]]
                rank = int(torch.multinomial(torch.tensor([*chances, 1 - sum(chances)]), 1, generator=generator))
                if rank >= len(children) or rank == len(chances):
                    break
                path.append(children[rank])
            took = costs(pace.budget + 1) + 0.02 * template.levels[-1]
            progress, seconds = progress + len(path), seconds + took
            padded = path + [-1] * (template.levels[-1] + 1 - len(path))
            pace.note(took, progress, torch.tensor([padded]), torch.tensor([len(path)]))
        memory.learn(pace)
        measured = sum(v for n, v in table.known.items() if n > 1) if not found else 0
        found.append((pace, (seconds + measured + max(num_tokens - progress, 0)) / num_tokens))
    return found


HALF = (0.5, 0.2, 0.1, 0.05)


def test_where_many_tokens_cost_no_more_than_one_a_tree_is_chosen():
    ((pace, cost),) = simulated(lambda n: 1 + 0.002 * n, HALF)
    assert pace.budget >= 12 and "a tree of" in pace.decision and cost < 0.55


def test_where_every_token_costs_a_short_chain_is_chosen_and_no_tree_is_tried():
    ((pace, cost),) = simulated(lambda n: 1 + 0.2 * (n - 1), HALF)
    assert pace.budget <= 3 and "a chain of" in pace.decision and cost < 0.95
    assert max(m for m in pace.plans if pace.seen.seconds(m) is not None) <= 4


@pytest.mark.parametrize("slope", [0.002, 0.2, 1.0])
@pytest.mark.parametrize("num_tokens", [64, 576])
def test_a_hopeless_drafter_is_left_and_costs_less_than_five_percent(slope, num_tokens):
    found = simulated(lambda n: 1 + slope * (n - 1), (0.0, 0.0), num_tokens=num_tokens, calls=8)
    assert "plain decoding" in found[0][0].decision and found[0][0].budget == 0
    assert all(cost <= 1.05 or slope == 1.0 and cost * num_tokens <= num_tokens + 5 for _, cost in found)
    assert sum(cost for _, cost in found) <= 8 * 1.02


def test_a_tree_that_disappoints_is_left_for_the_chain_that_paid():
    # each rank but the first is hopeless, which is only found out by trying a tree
    ((pace, cost),) = simulated(lambda n: 1 + 0.004 * n, (0.7, 0.0, 0.0))
    assert "a chain of 4" in pace.decision and cost < 0.6
    assert any(pace.seen.seconds(m) is not None for m in pace.plans if m > 4)


def test_the_next_call_starts_with_the_draft_that_paid():
    (first, _), (second, cost) = simulated(lambda n: 1 + 0.002 * n, HALF, num_tokens=256, calls=2)
    assert second.budget > 4 and cost < 0.5 and second.seen is first.seen


def test_after_a_loss_calls_stay_plain_ever_longer_until_drafting_pays():
    def calls_without_a_try(memory):
        waited = 0
        while not memory.should_try():
            assert "plain decoding from the start" in memory.decision
            waited += 1
        return waited

    memory = Memory()
    lost, won = paced([1, 1, 1, 1, 4.0], 0)[0], paced([1, 1.2, 1.4, 1.6, 1.8], 4)[0]
    waits = [calls_without_a_try(memory)]
    for ended in (lost, lost, lost, lost, won, won, lost):
        memory.learn(ended)
        waits.append(calls_without_a_try(memory))
    assert waits == [0, 4, 16, 64, 64, 0, 0, 4]
    assert memory.break_even == lost.break_even


@pytest.mark.parametrize("case", [case for case in DRAFTERS if case != "recycling"])
def test_unconditional_rows_are_dropped_once_guidance_has_ended(case):
    model, rows = make(), []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: rows.append(len(inputs[0])))

    def until_6(step):
        return 2.5 if step < 6 else 1.0

    def for_ever(step):  # the same tokens, with a last token's scale that keeps the unconditional rows
        return 2.5 if step < 6 else 1.0 if step < 15 else 1.0 + 1e-12

    first, _ = run(model, case, sampling=GREEDY, scale=until_6)
    dropped, rows[:] = rows[:], []
    second, _ = run(model, case, sampling=GREEDY, scale=for_ever)
    plain, _ = generate(model, condition(model, 4), generators=rng.image_generators(0, 4), sampling=GREEDY, guidance_scale=until_6)
    assert torch.equal(first.ids, plain.ids) and torch.equal(first.ids, second.ids)
    assert dropped[0] == 8 and dropped[-1] == 4 and sum(dropped) < sum(rows)


@pytest.mark.parametrize("case, option", [("model auto", None), ("recycling wide", None), ("model", "auto")])
def test_a_draft_that_is_left_open_is_chosen_and_the_stats_say_how(case, option):
    model = make()
    plain, _ = generate(model, condition(model, 4), generators=rng.image_generators(0, 4), sampling=GREEDY)
    for _ in range(3):  # the later calls begin with what the earlier ones found
        tokens, stats = run(model, case, sampling=GREEDY, num_draft_tokens=option)
        assert torch.equal(tokens.ids, plain.ids)
        assert any(word in stats.summary() for word in ("a chain of", "a tree of", "plain decoding", "too few steps"))
    if case != "model":
        with pytest.raises(ValueError, match="makes 1, 2"):
            run(model, case, num_draft_tokens=5)


def test_finding_the_length_changes_no_token_of_drafts_that_are_not_drawn():
    model = make()
    plain, _ = generate(model, condition(model, 4), generators=rng.image_generators(0, 4), sampling=SamplingConfig(temperature=0.9))
    tokens, stats = run(model, "copy", num_draft_tokens=None)
    assert torch.equal(tokens.ids, plain.ids)
    assert stats.decision and stats.break_even > 0


@pytest.mark.parametrize("case", ["copy", "model best"])
def test_a_call_after_a_loss_is_plain_from_its_first_token_and_another_drafter_is_tried(case):
    model = make()
    plain, _ = generate(model, condition(model, 4), generators=rng.image_generators(0, 4), sampling=SamplingConfig(temperature=0.9))
    run(model, case, num_draft_tokens=None)
    (memory,) = tuning._memories[model].values()  # one, that the drafter of the next call is known by too
    memory.learn(paced([1, 1, 1, 1, 4.0], 0)[0])
    tokens, stats = run(model, case, num_draft_tokens=None)
    assert torch.equal(tokens.ids, plain.ids)
    assert "from the start" in stats.decision and stats.accepted == (4 * 15,) and stats.target_passes == 16
    _, stats = run(model, "recycling", num_draft_tokens=None)
    assert "from the start" not in stats.decision
