"""xAR over any order: the quick sampler against the plain one, its randomness, training and files."""

import pytest
import torch

import vistok
from vistok.convert import convert, export
from vistok.convert.xar import from_official, to_official
from vistok.flow import classifier_free
from vistok.generators import FlowSampling, OrderConfig
from vistok.generators.xar_sampling import Sampler, time_index
from vistok.rng import image_generators

SQUARE = dict(layout_shape=(4, 4))
ORDERS = {
    "patch": OrderConfig(kind="patch", layout_shape=(2, 3)),
    "cell": OrderConfig(kind="cell", size=2, **SQUARE),
    "subsample": OrderConfig(kind="subsample", size=2, **SQUARE),
    "scale": OrderConfig(kind="scale", scales=((1, 1), (2, 2), (4, 4)), **SQUARE),
    "image": OrderConfig(kind="image", **SQUARE),
    "group": OrderConfig(kind="group", size=3, layout_kind="sequence", layout_shape=(8,)),
    "random": OrderConfig(kind="random", size=4, **SQUARE),
}
SOLVERS = {
    "euler": FlowSampling(num_steps=2, solver="euler"),
    "annealed": FlowSampling(num_steps=3, final_steps=2),
    "euler, noisy context": FlowSampling(num_steps=2, solver="euler", context_time=0.3),
    "annealed, noisy context": FlowSampling(num_steps=3, final_steps=2, context_time=0.1),
}


CAPTIONS = dict(text="hash", caption_tokens=3, caption_buckets=64)
SCALED = dict(value_mean=(1.0, -2.0, 0.5, 0.0), value_deviation=(2.0, 0.5, 1.0, 3.0))


def build(name="cell", **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("xar-tiny", order=ORDERS[name], **fields).eval()


def draws(model, B):
    """Noise of each entity and draw, as a table."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(model.order.num_entities, 4, B, max(model.order.lengths), model.code_dim, generator=generator)
    return lambda entity, number: table[entity, number, :, : model.order.lengths[entity]]


@torch.no_grad()
def plain_sample(model, condition, noise, sampling, scales):
    """Without a cache, tables or saved halves: every call runs all entities so far, with and without the class."""
    order, slots, r = model.order, None, sampling.context_time or 0.0
    shown = None
    for entity in range(order.num_entities):
        times = sampling.times(sampling.steps(entity, order.num_entities))
        x = noise(entity, 0)
        for step in range(len(times) - 1):
            both = x if shown is None else torch.cat([shown, x], dim=1)
            at = torch.tensor([[r] * entity + [times[step].item()]]).expand(len(x), -1)
            c, u = model(both, condition, times=at), model(both, condition.null(), times=at)
            v = classifier_free(c, u, scales(entity))[:, -x.shape[1] :]
            t, length = times[step].item(), (times[step] - times[step + 1]).item()
            if sampling.solver == "euler":
                x = x - length * v
                continue
            score = (-(1 - t) * v - x) / (t * t + (1 - t) * t)
            x = x - length * (v - t * score)
            if step + 2 < len(times):
                x = x + (2 * t) ** 0.5 * length**0.5 * noise(entity, step + 1)
        slots = x if slots is None else torch.cat([slots, x], dim=1)
        noisy = (1 - r) * x + r * noise(entity, 1 if sampling.solver == "euler" else len(times) - 1) if r else x
        shown = noisy if shown is None else torch.cat([shown, noisy], dim=1)
    return order.unpack(model.denormalise(slots))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ORDERS)
def test_the_quick_sampler_gives_what_the_plain_one_gives(name, solver):
    model, sampling = build(name), SOLVERS[solver]
    condition, noise = model.make_condition(3, labels=[1, 1, 5]), draws(model, 3)
    tokens = model.sample(condition, noise=noise, sampling=sampling, guidance_scale=3.0)
    expected = plain_sample(model, condition, noise, sampling, model.guidance_schedule(3.0))
    assert tokens.layout == model.layout
    torch.testing.assert_close(tokens.values, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_captions_and_statistics_pass_through_the_quick_sampler(scale, solver):
    model, sampling = build(**CAPTIONS, **SCALED, num_classes=0), SOLVERS[solver]
    condition, noise = model.make_condition(3, captions=["a red cat", "", "two dogs by the sea"]), draws(model, 3)
    tokens = model.sample(condition, noise=noise, sampling=sampling, guidance_scale=scale)
    expected = plain_sample(model, condition, noise, sampling, model.guidance_schedule(scale))
    torch.testing.assert_close(tokens.values, expected, atol=1e-4, rtol=0)
    other = model.sample(model.make_condition(3, captions=["a blue dog"] * 3), noise=noise, sampling=sampling, guidance_scale=scale)
    assert (other.values - tokens.values).abs().max() > 1e-3


@pytest.mark.parametrize("name", ORDERS)
def test_teacher_forcing_sees_what_sampling_sees(name):
    model = build(name, **CAPTIONS)
    order, condition = model.order, model.make_condition(2, labels=[0, 1], captions=["a cat", ""])
    S, E = order.num_slots, order.num_entities
    clean, noisy, times = torch.randn(2, S, 4), torch.randn(2, S, 4), torch.rand(2, E)
    with torch.no_grad():
        forced = model.forced(clean, noisy, condition, times=times)
        for entity in range(E):
            rows = order.entity(entity)
            seen = torch.cat([clean[:, : rows.start], noisy[:, rows]], dim=1)
            at = torch.cat([torch.zeros(2, entity), times[:, entity : entity + 1]], dim=1)
            torch.testing.assert_close(forced[:, rows], model(seen, condition, times=at)[:, rows], atol=1e-5, rtol=0)


def test_a_beginning_of_a_sequence_is_the_beginning_of_all_of_it():
    model, sampling = build("group"), FlowSampling(num_steps=2)
    condition, options = model.make_condition(2, labels=[0, 1]), dict(sampling=sampling, guidance_scale=2.0)
    whole = model.sample(condition, generators=image_generators(0, 2), **options)
    part = model.sample(condition, generators=image_generators(0, 2), num_slots=6, **options)
    assert part.counts.tolist() == [6, 6]
    torch.testing.assert_close(part.values, whole.values[:, :6], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="inside an entity"):
        model.sample(condition, generators=image_generators(0, 2), num_slots=5)
    with pytest.raises(ValueError, match="does not run in a sequence"):
        build("cell").sample(condition, generators=image_generators(0, 2), num_slots=4)
    with pytest.raises(ValueError, match="prefix holds 6"):
        model.sample(condition, generators=image_generators(0, 2), num_slots=3, prefix=torch.zeros(2, 6, 4))


@pytest.mark.parametrize("name", ["cell", "scale"])
def test_snapped_entities_are_what_later_entities_see(name):
    model, sampling, seen = build(name, **SCALED), FlowSampling(num_steps=2), []
    condition = model.make_condition(2, labels=[0, 1])
    options = dict(sampling=sampling, snap=torch.round)
    tokens = model.sample(condition, generators=image_generators(0, 2), on_step=lambda e, slots: seen.append(slots), **options)
    torch.testing.assert_close(tokens.values, tokens.values.round(), atol=1e-5, rtol=0)
    free = model.sample(condition, generators=image_generators(0, 2), sampling=sampling).values
    if name == "cell":
        again = model.sample(condition, generators=image_generators(0, 2), prefix=seen[0], **options)
        torch.testing.assert_close(again.values, tokens.values, atol=1e-5, rtol=0)
    else:  # averages of codes are no codes, so only the picture itself is snapped
        torch.testing.assert_close(tokens.values, free.round(), atol=1e-5, rtol=0)


def test_float64_stays_on_the_cpu_and_in_tables():
    """A device without float64 (MPS) can sample: only the grid of times and the table of rotations are made in it, on the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                assert out.ndim <= 1 and out.device.type == "cpu", function
            return out

    model = build()
    with Watch():
        model.sample(model.make_condition(2, labels=[0, 1]), generators=image_generators(0, 2), guidance_scale=2.0)
    with torch.device("meta"):
        assert FlowSampling().times(5).device.type == "cpu"
        assert vistok.create("xar-tiny").rope.device.type == "meta"


@pytest.mark.parametrize("scales", [(1, 2, 1, 3), (2, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1, 2)])
def test_any_guidance_schedule_gives_what_the_plain_sampler_gives(scales):
    model, sampling = build(), SOLVERS["euler"]
    condition, noise = model.make_condition(2, labels=[0, 3]), draws(model, 2)
    tokens = model.sample(condition, noise=noise, sampling=sampling, guidance_scale=lambda entity: scales[entity])
    expected = plain_sample(model, condition, noise, sampling, lambda entity: scales[entity])
    torch.testing.assert_close(tokens.values, expected, atol=1e-4, rtol=0)


def test_nothing_unconditional_runs_where_guidance_is_one():
    model, sampling = build(), FlowSampling(num_steps=5, solver="euler")
    condition = model.make_condition(2, labels=[0, 3])

    def rows(*scales):
        with torch.no_grad():
            sampler = Sampler(model, condition, None, draws(model, 2), sampling, lambda entity: scales[entity], None)
            sampler.run(None)
        return sampler.num_rows

    assert rows(1, 1, 1, 1) == 4 * 5 * 2
    assert rows(1, 2, 2, 2) == 4 * 5 * 4 - 5 * 2  # the reference runs both halves for the first entity too
    assert rows(2, 2, 1, 1) == (2 * 4 + 2 * 2) * 5
    assert rows(1, 1, 2, 1) == 4 * 5 * 2 + 2 + 5 * 2  # one row of context in the second entity, then the third


def test_modulations_are_computed_once_for_each_class_and_time():
    model, calls = build(), []
    hook = model.encoder_blocks[0].modulation.register_forward_hook(lambda module, args, out: calls.append(out.shape[:2]))
    sampling = FlowSampling(num_steps=6)
    model.sample(
        model.make_condition(4, labels=[1, 1, 2, 1]), noise=lambda e, k: torch.randn(4, 4, 4), sampling=sampling, guidance_scale=2.0
    )
    hook.remove()
    assert calls == [(3, 7)]  # two classes and the null class; six times and that of the context


def test_keys_and_values_live_in_one_piece_of_memory_and_are_never_joined():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket == torch.ops.aten.cat:
                assert all(part.ndim < 4 for part in args[0])  # keys and values are [B, h, T, d]
            return function(*args, **(kwargs or {}))

    model = build()
    with torch.no_grad():
        sampler = Sampler(model, model.make_condition(2, labels=[0, 3]), image_generators(0, 2), None, FlowSampling(num_steps=2), 2.0)
        keys, values = sampler.cache.keys, sampler.cache.values
        with Watch():
            sampler.run(None)
    assert sampler.cache.keys is keys and sampler.cache.values is values and keys.shape[3] == 16
    assert sampler.cache.length == 12  # what the last entity leaves is needed by nobody
    assert keys[:, :, :, :12].abs().sum(-1).min() > 0


def test_an_image_does_not_depend_on_its_batch():
    model, sampling = build(), FlowSampling(num_steps=2)
    options = dict(sampling=sampling, guidance_scale=2.0)
    together = model.sample(model.make_condition(3, labels=[0, 1, 2]), generators=image_generators(0, 3), **options)
    alone = model.sample(model.make_condition(1, labels=[2]), generators=image_generators(0, [2]), **options)
    torch.testing.assert_close(alone.values[0], together.values[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("context_time", [0.0, 0.2])
@pytest.mark.parametrize("name", ["cell", "scale", "group"])
def test_a_saved_prefix_is_continued_as_if_never_interrupted(name, context_time):
    model = build(name, **CAPTIONS, **SCALED, context_time=context_time)
    condition, order, seen = model.make_condition(2, labels=[0, 1], captions=["a cat", ""]), model.order, []
    options = dict(sampling=FlowSampling(num_steps=2), guidance_scale=2.0)
    whole = model.sample(condition, generators=image_generators(0, 2), on_step=lambda e, slots: seen.append((e, slots)), **options)
    assert [entity for entity, _ in seen] == list(range(order.num_entities)) and torch.equal(order.unpack(seen[-1][1]), whole.values)
    assert [slots.shape[1] for _, slots in seen] == list(order.ends)
    for _, prefix in seen:
        rest = model.sample(condition, generators=image_generators(0, 2), prefix=prefix, **options)
        torch.testing.assert_close(rest.values, whole.values, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="inside an entity"):
        model.sample(condition, generators=image_generators(0, 2), prefix=torch.zeros(2, 2, 4), **options)


def test_a_later_entity_does_not_change_the_velocity_of_an_earlier_one():
    model = build()
    slots, times, condition = torch.randn(2, 16, 4), torch.rand(2, 4), model.make_condition(2)
    with torch.no_grad():
        whole = model(slots, condition, times=times)
        part = model(slots[:, :8], condition, times=times[:, :2])
        torch.testing.assert_close(whole[:, :8], part, atol=1e-5, rtol=0)
        changed = torch.cat([slots[:, :4] + 1, slots[:, 4:]], dim=1)
        assert (model(changed, condition, times=times)[:, 4:] - whole[:, 4:]).abs().max() > 1e-4


def test_it_learns_and_the_loss_is_each_images_own():
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    clean, noise = torch.randn(4, 16, 4), torch.randn(4, 16, 4)
    times, condition = torch.rand(4, 4), model.make_condition(4, labels=[0, 1, 2, 3])
    first = model.denoising_loss(clean, condition, noise=noise, times=times)
    assert first.shape == (4,)
    alone = model.denoising_loss(clean[2:3], condition[2:3], noise=noise[2:3], times=times[2:3])
    torch.testing.assert_close(alone[0], first[2])
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.denoising_loss(clean, condition, noise=noise, times=times).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first.mean().item()


def test_the_embedded_time_is_truncated_in_float32():
    grid = FlowSampling(num_steps=5).times(5)
    assert time_index(grid[:-1]).tolist() == [1000, 760, 520, 280, 40]  # a product in float64 would give 279
    assert time_index(torch.tensor([0.9999, 1.0, 0.0])).tolist() == [999, 1000, 0]


def test_half_precision_gives_finite_values_in_float32():
    model = build().to(torch.bfloat16)
    options = dict(generators=image_generators(0, 2), sampling=FlowSampling(num_steps=3), guidance_scale=2.0)
    values = model.sample(model.make_condition(2, labels=[0, 1]), **options).values
    assert values.dtype == torch.float32 and values.isfinite().all()


def test_later_entities_take_fewer_steps_with_annealing():
    annealed = FlowSampling(num_steps=50, final_steps=15)
    assert [annealed.steps(entity, 4) for entity in range(4)] == [50, 38, 26, 15]
    assert FlowSampling(num_steps=1).times(1).tolist() == [1.0, 0.0] and FlowSampling(num_steps=1).steps(3, 4) == 1


@pytest.mark.parametrize("name, millions", [("xar-b", 172.64), ("xar-l", 608.40), ("xar-h", 1186.0)])
def test_the_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = vistok.create(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["cell", "scale"])
def test_saving_and_loading_changes_no_bit(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.settings == model.settings
    slots, times = torch.randn(1, model.order.num_slots, 4), torch.rand(1, model.order.num_entities)
    with torch.no_grad():
        assert torch.equal(again(slots, again.make_condition(1), times=times), model(slots, model.make_condition(1), times=times))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "not neither"),
        (dict(generators=image_generators(0, 1)), "1 generators for 2"),
        (dict(generators=image_generators(0, 2), guidance_scale=0.5), "at least 1"),
        (dict(generators=image_generators(0, 2), guidance_scale=float("nan")), "at least 1"),
        (dict(generators=image_generators(0, 2), prefix=torch.zeros(2, 4, 3)), "prefix must be"),
    ],
)
def test_a_run_that_cannot_be_says_why(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.sample(model.make_condition(2), **options)


def test_the_models_own_context_time_is_used_where_none_is_asked_for():
    model, plain = build(context_time=0.2), build()
    condition = model.make_condition(1, labels=[1])

    def draw(model, **asked):
        return model.sample(condition, generators=image_generators(0, 1), sampling=FlowSampling(num_steps=2, **asked)).values

    assert torch.equal(draw(model), draw(plain, context_time=0.2)) and torch.equal(draw(model, context_time=0.0), draw(plain))
    assert not torch.equal(draw(model), draw(plain))


def test_wrong_numbers_are_refused():
    model = build()
    with pytest.raises(ValueError, match="entities, but there are times for 3"):
        model(torch.zeros(1, 16, 4), model.make_condition(1), times=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="inside an entity"):
        model(torch.zeros(1, 6, 4), model.make_condition(1), times=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="labels must be"):
        model.make_condition(1, labels=[9])
    with pytest.raises(ValueError, match="captions"):
        model.make_condition(1, captions=["a cat"])
    for fields in (dict(num_steps=0), dict(final_steps=0), dict(last_time=1.0), dict(solver="magic"), dict(context_time=1.0)):
        with pytest.raises(ValueError):
            FlowSampling(**fields)
    for fields in (dict(width=30), dict(num_classes=2, classes=("a",)), dict(code_dim=0), dict(context_time=-0.1)):
        with pytest.raises(ValueError):
            vistok.create("xar-tiny", **fields)


def test_official_files_of_every_wrapping_are_read_and_misfits_named(tmp_path):
    model = build()
    to_official(model, tmp_path)
    state = torch.load(tmp_path / "xar.pth", weights_only=True)
    averaged = {key: value + 1 if key == "pred.bias" else value for key, value in state.items()}
    torch.save({"model": state, "model_ema": averaged, "epoch": 3, "scaler": {}}, tmp_path / "train.pth")
    torch.testing.assert_close(from_official(tmp_path / "train.pth").out.bias, model.out.bias + 1)
    assert torch.equal(from_official(tmp_path / "train.pth", ema=False).out.bias, model.out.bias)
    bare = {f"module.{key}": value for key, value in state.items() if key != "mask" and ".rope." not in key}
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="num_heads"):
        from_official(tmp_path / "bare.pth")
    assert from_official(tmp_path / "bare.pth", num_heads=2).settings == model.settings
    torch.save({**state, "mask": torch.zeros_like(state["mask"]), "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match="unexpected extra"):
        from_official(tmp_path / "extra.pth", order=ORDERS["cell"])
    torch.save({**state, "mask": torch.zeros_like(state["mask"])}, tmp_path / "mask.pth")
    with pytest.raises(ValueError, match="mask do not hold"):
        from_official(tmp_path / "mask.pth", order=ORDERS["cell"])
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no xAR checkpoint"):
        from_official(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="square cells"):
        to_official(build("scale"), tmp_path)


def test_converting_and_exporting_by_name(tmp_path):
    to_official(build(), tmp_path / "theirs")
    convert("xar", tmp_path / "theirs", tmp_path / "ours")
    export("xar", tmp_path / "ours", tmp_path / "back")
    a, b = (torch.load(tmp_path / folder / "xar.pth", weights_only=True) for folder in ("theirs", "back"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
