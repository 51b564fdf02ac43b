"""Decoding without a drafter that is quicker than a token a pass: overlapping rows, and layers that later tokens skip."""

import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.decoding.exits import exit_layers, generate_exits
from vistok.decoding.rows import generate_rows


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
