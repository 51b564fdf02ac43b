"""Decoding without a drafter that is quicker than a token a pass: overlapping rows, and layers that later tokens skip."""

import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.decoding.adaptive_rows import recheck
from vistok.decoding.exits import exit_layers, generate_exits
from vistok.decoding.rows import generate_rows
from vistok.decoding.sampling import sample


def make(kind="gpt", **overrides):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        name, shape = ("rar-tiny", {}) if kind == "rar" else ("gpt-tiny", dict(depth=4, layout_shape=(4, 5)))
        model = vistok.create(name, codebook_size=12, num_classes=3, **{**shape, **overrides}).eval()
        model.head.weight.mul_(20)
        for block in model.blocks if kind == "rar" else ():
            torch.nn.init.normal_(block.modulation.weight, std=0.05)
    return model


def call(model, batch=3, scale=2.0):
    return dict(
        condition=model.make_condition(batch, labels=list(range(batch))),
        generators=rng.image_generators(0, batch),
        guidance_scale=scale,
        sampling=SamplingConfig(temperature=0.9),
    )


@pytest.mark.parametrize("kind", ["gpt", "rar"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_rows_that_do_not_overlap_are_the_plain_loop(kind, scale):
    model = make(kind)
    plain, _ = generate(model, **call(model, scale=scale))
    rows, _ = generate_rows(model, window=model.layout.shape[1], **call(model, scale=scale))
    assert torch.equal(rows.ids, plain.ids)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_overlapping_rows_take_the_passes_of_the_paper_and_differ_behind_the_first_overlap(window):
    model = make()
    h, w = model.layout.shape
    plain, _ = generate(model, **call(model))
    tokens, stats = generate_rows(model, window=window, **call(model))
    assert stats.target_passes == 2 * w + (h - 2) * window
    assert (tokens.ids >= 0).all() and tokens.ids.shape == plain.ids.shape
    # the first row is sequential, and so is the second, which starts behind it
    assert torch.equal(tokens.ids[:, : 2 * w], plain.ids[:, : 2 * w])
    assert not torch.equal(tokens.ids, plain.ids)
    alone = [generate_rows(model, window=window, **{**call(model), "generators": rng.image_generators(0, [1]),
                           "condition": model.make_condition(1, labels=[1])})[0].ids]  # fmt: skip
    assert torch.equal(alone[0][0], tokens.ids[1])


@pytest.mark.parametrize("kind", ["gpt", "rar"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_adaptive_window_of_a_whole_row_is_the_plain_loop(kind, scale):
    model = make(kind)
    plain, _ = generate(model, **call(model, scale=scale))
    rows, stats = generate_rows(model, window=model.layout.shape[1], window_adapts=True, **call(model, scale=scale))
    assert torch.equal(rows.ids, plain.ids) and stats.target_passes == plain.ids.shape[1]


@pytest.mark.parametrize("kind", ["gpt", "rar"])
@pytest.mark.parametrize("window", [1, 2])
def test_an_adaptive_window_waits_for_each_image_alone(kind, window):
    model = make(kind)
    (h, w), batch = model.layout.shape, 4
    more = dict(window=window, window_adapts=True)
    args = call(model) | dict(generators=rng.image_generators(0, batch), condition=model.make_condition(batch, labels=[0, 1, 2, 0]))
    tokens, stats = generate_rows(model, **more, **args)
    assert (tokens.ids >= 0).all()
    fixed = 2 * w + (h - 2) * window - 1  # a row that adapts starts at least a pass later, and at the latest below a whole row
    least, most = fixed + (h - 2) * (w > window), h * w - 1
    paces, total = set(), 0
    for i in range(batch):
        alone, cost = generate_rows(
            model, **more, **(args | dict(generators=rng.image_generators(0, [i]), condition=model.make_condition(1, labels=[i % 3])))
        )
        assert torch.equal(alone.ids[0], tokens.ids[i])
        assert least <= cost.image_passes <= most and cost.image_passes == cost.target_passes - 1
        paces.add(cost.image_passes)
        total += cost.image_passes
    assert total == stats.image_passes and stats.target_passes == 1 + max(paces)
    assert kind == "rar" or len(paces) > 1


def test_a_guess_that_was_checked_has_the_law_it_was_checked_against():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.rand(2, 500, 5, generator=generator, dtype=torch.float64).pow(3)
    old[::7, :2], new[::5, 3:], new[::11] = 0, 0, old[::11]
    old, new = old / old.sum(1, keepdim=True), new / new.sum(1, keepdim=True)
    excess = (new - old).clamp(min=0)
    rest = torch.where(excess.sum(1, keepdim=True) > 0, excess / excess.sum(1, keepdim=True).clamp(min=1e-300), new)
    law, u = torch.zeros_like(new), torch.rand(500, generator=generator, dtype=torch.float64)
    for x in range(5):
        guess, can_be = torch.full((500,), x), old[:, x] > 0
        chance = (new[:, x] / old[:, x].clamp(min=1e-300)).clamp(max=1)
        kept, after = recheck(guess, old, new, chance - 1e-9, u)
        assert bool(kept[can_be & (chance > 1e-9)].all()) and torch.equal(after[kept], guess[kept])
        kept, after = recheck(guess, old, new, chance + 1e-9, u)
        kept = kept | (chance == 1)
        assert not kept[can_be & (chance < 1)].any() and torch.equal(after[can_be & ~kept], sample(rest, u)[can_be & ~kept])
        law += old[:, x, None] * (chance[:, None] * torch.eye(5, dtype=torch.float64)[x] + (1 - chance[:, None]) * rest)
    torch.testing.assert_close(law, new, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt", "rar"])
@pytest.mark.parametrize("way", ["rows", "adaptive rows", "exits"])
def test_unconditional_rows_are_dropped_once_no_guided_token_is_left(kind, way):
    model, rows = make(kind), []
    N = model.max_tokens
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: rows.append(len(inputs[0])))

    def decoded(until, last):
        def scale(step):
            return 2.0 if step < until else last if step == N - 1 else 1.0

        rows.clear()
        if way == "exits":
            return generate_exits(model, least=0, **call(model, scale=scale))[0].ids, list(rows)
        return generate_rows(model, window=2, window_adapts="adaptive" in way, **call(model, scale=scale))[0].ids, list(rows)

    dropped, fewer = decoded(7, 1.0)
    kept, all_rows = decoded(7, 1.0 + 1e-12)  # the same tokens, with a last token's scale that keeps the unconditional rows
    assert torch.equal(dropped, kept)
    assert fewer[0] == 6 and fewer[-1] == 3 and set(all_rows) == {6} and len(fewer) == len(all_rows)


def test_what_has_no_rows_is_refused():
    model = make(layout_kind="sequence", layout_shape=(12,))
    with pytest.raises(ValueError, match="only a whole grid"):
        generate_rows(model, window=2, **call(model))
    with pytest.raises(ValueError, match="window=6"):
        generate_rows(make(), window=6, **call(make()))


@pytest.mark.parametrize("kind", ["gpt", "rar"])
def test_a_schedule_that_skips_nothing_is_the_plain_loop(kind):
    model = make(kind)
    depth = len(model.blocks)
    plain, _ = generate(model, **call(model))
    tokens, _ = generate_exits(model, warmup=1, least=depth - 1, **call(model))
    assert torch.equal(tokens.ids, plain.ids)
    if kind == "gpt":  # the layers of a fresh RAR say too little to change a token
        fewer, _ = generate_exits(model, warmup=1, least=0, **call(model))
        assert torch.equal(fewer.ids[:, :1], plain.ids[:, :1]) and not torch.equal(fewer.ids, plain.ids)


def test_later_tokens_run_layers_that_all_earlier_ones_ran():
    layers = exit_layers(12, 16, warmup=2, most=10, least=3)
    assert layers[0] == tuple(range(12)) and layers[-1] == (0, 1, 9, 10, 11)
    assert all(set(later) <= set(earlier) for earlier, later in zip(layers, layers[1:]))
    for wrong in (dict(warmup=3, most=10, least=3), dict(warmup=1, most=3, least=4), dict(warmup=0, most=2, least=0)):
        with pytest.raises(ValueError, match="do not fit 12 layers"):
            exit_layers(12, 16, **wrong)
