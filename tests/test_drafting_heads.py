"""EAGLE, Medusa and Chimera heads: fast equals slow, exact in the engine however badly trained, save and load; the judge."""

import pytest
import test_speculative_laws as laws
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.decoding.accept import make_rule
from vistok.decoding.drafters import make_drafter
from vistok.decoding.heads import ChimeraHeads, EagleHead, JudgeHead, MedusaHeads
from vistok.decoding.heads.chimera import in_threes
from vistok.decoding.speculative import speculate

HEADS = {"eagle": EagleHead, "medusa": MedusaHeads, "chimera": ChimeraHeads}
SHAPES = {
    "chain": dict(length=3),
    "tree": dict(shape="tree", length=2, width=2),
    "beams": dict(shape="beams", length=3, width=2),
    "best": dict(shape="best", length=3, width=2, num_tokens=5),
}
GREEDY = SamplingConfig(temperature=0)


def make_target(kind="grid", factor=20.0):
    shape = dict(layout_kind="sequence", layout_shape=(12,)) if kind == "sequence" else dict(layout_shape=(4, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("gpt-tiny", codebook_size=12, num_classes=3, **shape)
    with torch.no_grad():
        model.head.weight.mul_(factor)
    return model.eval()


def make_head(name, target):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return HEADS[name].for_target(target).eval()


def condition(model, batch):
    return model.make_condition(batch, labels=[b % 3 for b in range(batch)])


@pytest.mark.parametrize("kind", ["grid", "sequence"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HEADS)
def test_greedy_tokens_are_those_of_the_plain_loop(name, shape, kind):
    target = make_target(kind)
    drafter = make_drafter(name, target, head=make_head(name, target), **SHAPES[shape])
    for batch, scale in ((1, 1.0), (3, 2.5)):
        options = dict(sampling=GREEDY, guidance_scale=scale)
        expected, _ = generate(target, condition(target, batch), generators=rng.image_generators(0, batch), **options)
        got, stats = speculate(
            target,
            condition(target, batch),
            drafter=drafter,
            rule=make_rule("standard"),
            generators=rng.image_generators(0, batch),
            **options,
        )
        assert torch.equal(got.ids, expected.ids) and stats.target_passes <= target.max_tokens


class Spying:
    """A rule that notes the draft laws it is shown."""

    def __init__(self, rule):
        self.rule, self.laws = rule, []
        self.exact, self.bound, self.needs_hidden = rule.exact, rule.bound, False

    def law(self, at):
        return None

    def __call__(self, at):
        self.laws.append(at)
        return self.rule(at)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", HEADS)
def test_laws_drafted_step_by_step_are_those_of_a_whole_sequence(name, scale):
    target = make_target()
    head, batch = make_head(name, target), 2
    rule = Spying(make_rule("standard"))
    drafter = make_drafter(name, target, head=head, length=1)
    with torch.no_grad():
        tokens, _ = speculate(
            target, condition(target, batch), drafter=drafter, rule=rule, generators=rng.image_generators(3, batch), guidance_scale=scale
        )
        rows = condition(target, batch) if scale == 1 else condition(target, batch).and_null()
        ids = tokens.ids if scale == 1 else tokens.ids.repeat(2, 1)
        features = target.features(ids[:, :-1], rows)
        embeddings = target.embedding(ids)
        if name == "eagle":
            logits = target.head(head(features, embeddings))
        elif name == "medusa":
            logits = head(features)[:, :, 0]
        else:
            trigrams = head.trigrams(target.embedding(in_threes(ids)))
            logits = head.logits(head.context(features, trigrams), trigrams, 0)
        if scale != 1:
            cond, uncond = logits.chunk(2)
            logits = uncond + scale * (cond - uncond)
        whole = logits.softmax(-1)  # row n is the law behind token n
    known = {tuple(law.tolist()) for law in whole.flatten(0, 1).mul(1e4).round().int()}
    drafted = [at.q[:, 0] for at in rule.laws if at.q is not None and at.q.ndim == 3]  # a chain is asked for at all depths at once
    first = drafted[0]
    torch.testing.assert_close(first, whole[:, 0], rtol=1e-3, atol=1e-5)
    gaps = torch.stack([(whole[b, :-1] - q[b]).abs().amax(1).min() for q in drafted for b in range(batch)])
    # rows that are finished draft on behind their end, where there is nothing to compare with
    assert known and float((gaps < 1e-4).float().mean()) > 0.8


@pytest.mark.parametrize("name", HEADS)
def test_an_image_does_not_depend_on_its_batch(name):
    target = make_target()
    options = dict(
        drafter=make_drafter(name, target, head=make_head(name, target), length=3), rule=make_rule("standard"), guidance_scale=2.0
    )
    many, _ = speculate(target, condition(target, 4), generators=rng.image_generators(0, 4), **options)
    one, _ = speculate(target, target.make_condition(1, labels=[2]), generators=[rng.image_generators(0, 4)[2]], **options)
    assert torch.equal(one.ids[0], many.ids[2])


@pytest.mark.parametrize("name", [*HEADS, "judge"])
def test_heads_come_back_from_disk_and_fit_their_target_alone(name, tmp_path):
    target = make_target()
    head = JudgeHead.for_target(target).eval() if name == "judge" else make_head(name, target)
    head.save_pretrained(tmp_path / "head")
    loaded = vistok.load(tmp_path / "head")
    assert type(loaded) is type(head)
    for key, value in head.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    if name != "judge":
        drafter = make_drafter(name, target, head=str(tmp_path / "head"), length=2)
        assert drafter.num_nodes == 2
        with pytest.raises(ValueError, match="layout|codebook_size|width"):
            make_drafter(name, vistok.create("gpt-tiny", width=32, num_heads=2, hidden=64), head=loaded)
        with pytest.raises(ValueError, match=type(head).__name__):
            make_drafter("medusa" if name != "medusa" else "eagle", target, head=loaded)


def test_more_levels_than_heads_are_refused():
    target = make_target()
    with pytest.raises(ValueError, match="length=9"):
        make_drafter("medusa", target, head=make_head("medusa", target), length=9)


def test_the_judge_reads_the_state_behind_each_draft():
    target = make_target()
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, features):
            seen.append(features)
            return torch.full(features.shape[:-1], 9.0)

    drafter = make_drafter("medusa", target, head=make_head("medusa", target), length=3)
    options = dict(drafter=drafter, generators=rng.image_generators(0, 1))
    tokens, stats = speculate(target, condition(target, 1), rule=make_rule("judge", head=Watching()), **options)
    # all drafts pass, so every draft is in the image, and what was shown are the target's own features there
    features = target.features(tokens.ids, condition(target, 1))[0].detach()
    shown = torch.stack([f.flatten(0, -2)[0] for f in seen])
    assert stats.accepted_per_step > 3
    assert all(float((features - f).abs().amax(1).min()) < 1e-4 for f in shown[:9])


def head_for(name, model):
    """A head with weights of its own: fresh ones say what the target says."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        head = HEADS[name].for_target(model).eval()
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


def drawn(name, shape, rule, scale, sampling=None):
    """40,000 images of three tokens and the law that the model gives them."""
    model = laws.tiny()
    drafter = make_drafter(
        name, model, head=head_for(name, model), **{**SHAPES[shape], "length": 2, "num_tokens": 4 if shape == "best" else 0}
    )
    condition = model.make_condition(laws.IMAGES, labels=torch.ones(laws.IMAGES, dtype=torch.long))
    uniforms = torch.rand(laws.IMAGES, 120, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampling = sampling or SamplingConfig()
    tokens, stats = speculate(
        model, condition, drafter=drafter, rule=rule, uniforms=uniforms, num_tokens=laws.N, num_draft_tokens=drafter.num_nodes,
        sampling=sampling, guidance_scale=scale,
    )  # fmt: skip
    assert sum(stats.accepted[1:]) > 0.02 * laws.IMAGES, "nothing was accepted, so nothing was tested"
    return tokens.ids, laws.joint_law(model, condition, sampling, scale), stats


def test_a_badly_trained_head_leaves_the_joint_law():
    ids, law, _ = drawn("eagle", "tree", make_rule("standard"), 2.0)
    assert abs(laws.surprise(ids, law)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("shape", "rule"), [*((shape, "standard") for shape in SHAPES), ("chain", "k_seq")])
def test_every_head_in_every_shape_leaves_the_joint_law(name, shape, rule, scale):
    ids, law, _ = drawn(name, shape, make_rule(rule), scale)
    assert abs(laws.surprise(ids, law)) < 5
    ids, law, _ = drawn(name, shape, make_rule(rule), scale, SamplingConfig(temperature=0.8, top_k=3))
    assert abs(laws.surprise(ids, law)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.05, 0.2])
@pytest.mark.parametrize("name", ["mixture", "lantern_budget"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rules_with_a_budget_keep_the_joint_law_within_it(shape, name, eps):
    options = (
        {"neighbours": torch.tensor([[1, 2, 3], [0, 2, 3], [1, 3, 4], [2, 4, 1], [3, 2, 1]]), "k": 3} if name == "lantern_budget" else {}
    )
    ids, law, stats = drawn("medusa", shape, make_rule(name, eps=eps, **options), 1.0)
    index = (ids * torch.tensor([laws.V**2, laws.V, 1])).sum(1)
    seen = torch.bincount(index, minlength=laws.V**laws.N).double() / len(ids)
    apart = 0.5 * float((seen - law).abs().sum())
    noise = 0.5 * float((2 * law * (1 - law) / (torch.pi * len(ids))).sqrt().sum())
    assert apart <= 1 - (1 - eps) ** (laws.N - 1) + 2 * noise  # the first token is always the plain loop's
    assert (stats.total_variation_spent or 0.0) / (len(ids) * (laws.N - 1)) <= eps + 1e-6
    if shape == "chain":
        assert apart > noise, "nothing was spent, so nothing was tested"


@pytest.mark.parametrize("name", HEADS)
def test_heads_draft_the_same_where_the_unconditional_rows_are_dropped(name):
    target = make_target()
    drafter, results = make_drafter(name, target, head=make_head(name, target), **SHAPES["tree"]), []
    for last in (1.0, 1.0 + 1e-12):  # the second rounds to no guidance, but keeps the rows to the end
        scales = [2.5] * 6 + [1.0] * 9 + [last]
        results.append(
            speculate(
                target,
                condition(target, 3),
                drafter=drafter,
                rule=make_rule("standard"),
                generators=rng.image_generators(0, 3),
                num_draft_tokens=drafter.num_nodes,
                guidance_scale=lambda step, scales=scales: scales[step],
            )
        )
    (dropped, few), (kept, many) = results
    assert torch.equal(dropped.ids, kept.ids) and few.accepted == many.accepted
