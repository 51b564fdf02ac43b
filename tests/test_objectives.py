"""Random, next and next-all prediction: who sees whom, what counts, and that the mixture is made of its parts."""

import pytest
import torch

import vistok
from vistok import rng
from vistok.generators import OrderConfig
from vistok.generators.objectives import (
    ObjectiveWeights,
    flow_errors,
    mean_error,
    mixed_loss,
    next_all_prediction,
    next_prediction,
    random_prediction,
)
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch
from vistok.training.tasks.objectives import MixedTask, MixedTaskConfig, MixedXARTask, MixedXARTaskConfig
from vistok.training.tasks.xar import XARTask, XARTaskConfig

N = 16


def make(**overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("gpt-tiny", **{"codebook_size": 20, "layout_shape": (4, 4), "num_classes": 3, "has_query": True, **overrides})


@pytest.fixture
def batch():
    ids = torch.randint(20, (4, N), generator=torch.Generator().manual_seed(0))
    return TokenBatch(ids=ids, labels=torch.tensor([0, 1, 2, -1]), captions=[""] * 4, indices=torch.arange(4), positions=torch.arange(4))


def rows(batch, chosen):
    index = torch.tensor(chosen)
    return TokenBatch(batch.ids[index], batch.labels[index], [""] * len(chosen), batch.indices[index], batch.positions[index])


def task_of(random, next, next_all, **config):
    weights = ObjectiveWeights(random=random, next=next, next_all=next_all)
    return MixedTask(make(), MixedTaskConfig(weights=weights, **config))


# the tables


def test_random_prediction_hides_a_share_of_whole_entities_and_shows_the_rest():
    entities = torch.arange(8) // 2
    counts = torch.tensor([8, 8, 4])
    made = random_prediction(torch.rand(3, 4, generator=torch.Generator().manual_seed(1)), counts, share=0.5, entities=entities)
    assert made.asked.sum(1).tolist() == [4, 4, 2]
    assert torch.equal(made.asked[:, ::2], made.asked[:, 1::2])
    assert not (made.asked & made.shown).any() and (made.asked | made.shown).sum(1).tolist() == counts.tolist()
    assert made.sees[0].all() and not made.sees[2, 0, 4:].any()
    assert random_prediction(torch.rand(1, 8), torch.tensor([8]), share=1e-6).asked.sum() == 1


def test_next_prediction_is_block_causal_over_entities():
    made = next_prediction(torch.tensor([6, 4]), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert made.sees[0, 0].tolist() == [True, True, False, False, False, False]
    assert made.sees[0, 3].tolist() == [True, True, True, True, False, False]
    assert made.asked[1].tolist() == [True] * 4 + [False] * 2 and not made.sees[1, 3, 4:].any()


def test_next_all_prediction_splits_everywhere_but_at_the_ends_and_equally_often():
    B = 600
    uniforms = torch.rand(B, generator=torch.Generator().manual_seed(0))
    made = next_all_prediction(uniforms, torch.full((B,), 5), num_entities=5)
    n = made.shown.sum(1)
    assert torch.equal(n + made.asked.sum(1), torch.full((B,), 5))
    found = torch.bincount(n, minlength=6)
    assert found[0] == 0 and found[5] == 0 and (found[1:5] > 110).all()
    row = int((n == 2).nonzero()[0, 0])
    assert made.sees[row].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    alone = next_all_prediction(torch.tensor([0.99]), torch.tensor([1]), num_entities=5)
    assert alone.asked[0].tolist() == [True, False, False, False, False]


def test_means_are_over_images_of_means_over_their_own_slots():
    asked = torch.tensor([[True, True, False], [False, True, False]])
    errors = torch.tensor([[1.0, 3.0, 99.0], [99.0, 6.0, 99.0]])
    assert mean_error(errors, asked) == (2 + 6) / 2


def test_the_mixture_is_the_weighted_sum_and_weights_must_be_weights():
    means = {"random": torch.tensor(1.0), "next": torch.tensor(10.0), "next_all": torch.tensor(100.0)}
    assert mixed_loss(means, ObjectiveWeights(random=0.5, next=1, next_all=2)) == 210.5
    with pytest.raises(ValueError, match="not all 0"):
        ObjectiveWeights(random=0, next=0, next_all=0)
    with pytest.raises(ValueError, match="0 or more"):
        ObjectiveWeights(random=-1)
    with pytest.raises(ValueError, match="share"):
        random_prediction(torch.rand(1, 4), torch.tensor([4]), share=0)


# the network


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"layout_kind": "sequence", "layout_shape": (N,)}])
@pytest.mark.parametrize("kind", ["random", "next_all"])
def test_a_prediction_reads_what_is_shown_and_nothing_that_is_asked(kind, overrides, batch):
    model = make(**overrides).eval()
    condition, counts = model.make_condition(4, labels=batch.labels), torch.full((4,), N)
    if kind == "random":
        made = random_prediction(torch.rand(4, N, generator=torch.Generator().manual_seed(0)), counts, share=0.5)
    else:
        made = next_all_prediction(torch.full((4,), 0.4), counts, num_entities=N)
    logits = lambda ids: model.predict(ids.masked_fill(~made.shown, -1), condition, sees=made.sees)  # noqa: E731
    before = logits(batch.ids)
    changed = torch.where(made.asked, (batch.ids + 1) % 20, batch.ids)
    assert torch.equal(logits(changed), before)
    for slot in made.shown[0].nonzero()[:, 0].tolist():
        other = batch.ids.clone()
        other[0, slot] = (other[0, slot] + 1) % 20
        moved = (logits(other)[0] - before[0]).abs().amax(-1) > 0
        assert torch.equal(moved, torch.ones(N, dtype=torch.bool) if kind == "random" else made.sees[0, :, slot]), slot
    unconditional = model.predict(batch.ids.masked_fill(~made.shown, -1), condition.null(), sees=made.sees)
    assert ((unconditional - before)[0].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_shown_slots_of_next_all_compute_what_next_token_prediction_computes(batch):
    """One cache of a prefix can serve both."""
    model = make().eval()
    seen, hook = {}, model.blocks[-1].register_forward_hook(lambda module, args, out: seen.setdefault(len(seen), out))
    condition = model.make_condition(4, labels=batch.labels)
    made = next_all_prediction(torch.full((4,), 0.5), torch.full((4,), N), num_entities=N)
    n = int(made.shown[0].sum())
    model.predict(batch.ids.masked_fill(~made.shown, -1), condition, sees=made.sees)
    model(batch.ids[:, :n], condition)
    hook.remove()
    assert torch.allclose(seen[0][:, : 1 + n], seen[1], atol=1e-5)


def test_a_model_without_a_query_says_so(batch):
    model = make(has_query=False)
    with pytest.raises(ValueError, match="has_query"):
        model.predict(batch.ids, model.make_condition(4), sees=torch.ones(4, N, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="next_all and random"):
        MixedTask(model)
    MixedTask(model, MixedTaskConfig(weights=ObjectiveWeights(random=0, next=1, next_all=0)))


# continuous tokens, in any order


def flow(kind, **order):
    """An XAR, clean slots and noise [3, S, 4], times [3, E] and the function of `flow_errors`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("xar-tiny", order=OrderConfig(kind=kind, layout_shape=(4, 4), **order))
    g = torch.Generator().manual_seed(1)
    slots, noise = torch.randn(2, 3, model.order.num_slots, 4, generator=g)
    times = torch.rand(3, model.order.num_entities, generator=g)
    condition = model.make_condition(3, labels=[0, 1, 2])
    velocity = lambda noisy, times, sees: model.predict(noisy, condition, times=times, sees=sees)  # noqa: E731
    return model, condition, slots, noise, times, velocity


@pytest.mark.parametrize("kind, order", [("cell", {"size": 2}), ("token", {}), ("scale", {"scales": ((1, 1), (2, 2), (4, 4))})])
def test_next_prediction_of_values_is_noisy_context_learning(kind, order):
    model, condition, slots, noise, times, velocity = flow(kind, **order)
    entities = model.order.entities
    made = next_prediction(torch.full((3,), len(entities)), entities)
    errors = flow_errors(velocity, slots, made, noise=noise, times=times, entities=entities)
    expected = model.denoising_loss(slots, condition, noise=noise, times=times)
    assert torch.allclose(mean_error(errors, made.asked), expected.mean(), atol=1e-6)


@pytest.mark.parametrize("name", ["random", "next_all"])
def test_values_that_are_asked_for_are_hidden_in_noise_and_shown_ones_are_clean(name):
    model, condition, slots, noise, times, velocity = flow("cell", size=2)
    entities, counts = model.order.entities, torch.full((3,), model.order.num_slots)
    if name == "random":
        made = random_prediction(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), counts, share=0.5, entities=entities)
    else:
        made = next_all_prediction(torch.full((3,), 0.5), counts, entities=entities)
    seen = []
    errors = flow_errors(
        lambda *given: seen.append(given) or velocity(*given), slots, made, noise=noise, times=torch.ones_like(times), entities=entities
    )
    noisy, at, _ = seen[0]
    assert torch.equal(noisy, torch.where(made.asked[..., None], noise, slots))
    assert torch.equal(at[:, entities] == 1, made.asked)
    loss = mean_error(errors, made.asked)
    loss.backward()
    assert loss.isfinite() and model.out.weight.grad.abs().sum() > 0
    # at t = 1 the clean value of an asked slot is in its own target alone
    slot = int(made.asked[0].nonzero()[0, 0])
    other = slots.clone()
    other[0, slot] += 1
    again = flow_errors(velocity, other, made, noise=noise, times=torch.ones_like(times), entities=entities)
    moved = (again != errors)[0]
    assert moved[slot] and moved.sum() == 1


# the task


def test_next_alone_is_the_plain_loss_bit_for_bit(batch):
    options = dict(dropout=0.2, token_dropout=0.1, label_smoothing=0.05)
    mixed = task_of(0, 1, 0, **options)
    plain = GeneratorTask(make(), GeneratorTaskConfig(**options))
    ours, logs = mixed(batch, rng.image_generators(0, 4), 0)
    theirs, expected = plain(batch, rng.image_generators(0, 4), 0)
    assert torch.equal(ours, theirs) and torch.equal(logs["cross_entropy"], expected["cross_entropy"])
    ours.backward()
    theirs.backward()
    for (name, a), b in zip(mixed.named_parameters(), plain.parameters()):
        assert name == "model.query" or torch.equal(a.grad, b.grad), name


def test_the_loss_is_made_of_the_logged_means(batch):
    task = task_of(0.5, 1, 2).train()
    loss, logs = task(batch, rng.image_generators(0, 4), 0)
    expected = 0.5 * logs["cross_entropy_random"] + logs["cross_entropy"] + 2 * logs["cross_entropy_next_all"]
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_an_image_does_not_depend_on_its_batch(batch):
    task = task_of(1, 1, 1)
    together = task(batch, rng.image_generators(0, 4), 0)[0]
    alone = [task(rows(batch, [i]), rng.image_generators(0, [i]), 0)[0] for i in range(4)]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-5)


def test_padding_is_neither_shown_nor_asked(batch):
    task = task_of(1, 1, 1)
    batch.ids[0, 9:] = -1
    loss, _ = task(batch, rng.image_generators(0, 4), 0)
    for prediction in task.predictions(batch.ids, rng.image_generators(0, 4)).values():
        assert not prediction.asked[0, 9:].any() and not prediction.shown[0, 9:].any()
    assert loss.isfinite()


def test_it_learns_all_three_tasks(batch):
    task = task_of(1, 1, 1, condition_dropout=0.0)
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    history = []
    for step in range(50):
        loss, logs = task(batch, rng.image_generators(step, 4), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value) for name, value in logs.items()})
    for name in ("cross_entropy", "cross_entropy_random", "cross_entropy_next_all"):
        assert sum(h[name] for h in history[-5:]) < 0.5 * sum(h[name] for h in history[:5]), name


def values_task(task_class, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("xar-tiny", order=OrderConfig(kind="cell", layout_shape=(4, 4), size=2))
    return task_class(model, config)


def value_batch(chosen=(0, 1, 2)):
    index, values = torch.tensor(chosen), torch.randn(3, N, 4, generator=torch.Generator().manual_seed(0))
    return TokenBatch(None, index, [""] * len(chosen), index, index, values=values[index])


def test_next_alone_is_xars_plain_loss_bit_for_bit():
    only_next = ObjectiveWeights(random=0, next=1, next_all=0)
    for options in (dict(dropout=0.2), dict(context="clean")):
        ours = values_task(MixedXARTask, MixedXARTaskConfig(weights=only_next, **options))
        plain = values_task(XARTask, XARTaskConfig(**options))
        loss, logs = ours(value_batch(), rng.image_generators(0, 3), 0)
        assert torch.equal(loss, plain(value_batch(), rng.image_generators(0, 3), 0)[0]) and list(logs) == ["error_next"]


def test_the_mixed_loss_of_values_is_made_of_its_parts_and_does_not_depend_on_the_batch():
    config = MixedXARTaskConfig(weights=ObjectiveWeights(random=0.5, next=1, next_all=2))
    task = values_task(MixedXARTask, config)
    together, logs = task(value_batch(), rng.image_generators(0, 3), 0)
    assert torch.allclose(together, 0.5 * logs["error_random"] + logs["error_next"] + 2 * logs["error_next_all"])
    alone = [task(value_batch([i]), rng.image_generators(0, [i]), 0)[0] for i in range(3)]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-5)
    together.backward()
    assert all(parameter.grad is not None for parameter in task.model.blocks[0].parameters())
