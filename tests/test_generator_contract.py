"""One suite for every generator of the registry: drawing is reproducible, goes on from what the callback saw, and shows what it has.

A registered generator without a pipeline here fails the suite.
"""

import pytest
import torch

import vistok
from vistok import registry
from vistok.pipelines import TokenImagePipeline

CLASSES = sorted(name for name, kind in registry._CLASSES.items() if kind.__module__.startswith("vistok.generators"))
KNOWN = dict(num_classes=3, classes=("Cats", "Dogs", "Flowers"))
ORDER = vistok.generators.OrderConfig


def of_ids(preset, **shape):
    return lambda tokenizer: vistok.create(preset, codebook_size=tokenizer.codebook_size, layout_shape=tokenizer.layout.shape, **shape)


def xar(order):
    def build(tokenizer):
        return vistok.create("xar-tiny", order=ORDER.parse(order, tokenizer.layout), code_dim=tokenizer.code_dim, text="hash", **KNOWN)

    return build


def of_scales(tokenizer):
    return vistok.create("var-tiny", codes=tokenizer.settings.codes, **KNOWN).read_codes_of(tokenizer)


def t2i(tokenizer):
    rows = dict(vocab_size=108, image_token_start=44, pad_token=39, codebook_size=64)  # 39 words, padding, 3 classes, start
    return vistok.create("tokenflow-t2i-tiny", text="hash", caption_tokens=3, **rows, **KNOWN).read_codes_of(tokenizer)


# name -> (tokenizer, its overrides, generator of it, what a call takes besides)
PIPELINES = {
    "GPT": ("fsq2d-tiny", dict(image_size=(32, 32)), of_ids("gpt-tiny", text="hash", **KNOWN), {}),
    "GPT, first tokens decode": ("flextok-tiny", {}, of_ids("gpt-tiny", layout_kind="sequence", **KNOWN), {}),
    "RAR": ("fsq2d-tiny", dict(image_size=(32, 32)), of_ids("rar-tiny", layout_kind="grid", **KNOWN), {}),
    "VAR": ("var-vqvae-tiny", {}, of_scales, {}),
    "MaskGIT": ("titok-tiny", {}, of_ids("maskgit-tiny", **KNOWN), {}),
    "MaskGIT, as many steps as tokens": ("titok-tiny", {}, of_ids("maskgit-tiny", **KNOWN), dict(num_steps=16)),
    "TokenFlowT2I": ("tokenflow-tiny", {}, t2i, {}),
    "TokenFlowT2I, one pass": ("tokenflow-tiny", {}, t2i, dict(num_steps=1)),
    "XAR": ("vae-small", dict(image_size=(32, 32)), xar("cell-2"), dict(num_steps=2)),
    "XAR, snapped": ("fsq2d-tiny", dict(image_size=(32, 32)), xar("subsample-2"), dict(num_steps=2, solver="euler")),
    "XAR, scales": ("fsq2d-tiny", dict(image_size=(32, 32)), xar("scale"), dict(num_steps=2, final_steps=1)),
}


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    """A pipeline with weights large enough that its images differ, and the options of its calls."""
    preset, overrides, generator_of, options = PIPELINES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = vistok.create(preset, **overrides).eval()
        generator = generator_of(tokenizer).eval()
        for module in generator.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and module.weight.requires_grad:
                torch.nn.init.normal_(module.weight, std=0.2)
        for parameter in tokenizer.parameters():  # zero-initialised parts would not show what is decoded
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    pipe = TokenImagePipeline(generator, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(labels=["Cats", "Dogs", 2], guidance_scale=2.0, output_type="pt", **options)


def assert_same(a, b):
    """Equal ids; values and pixels up to the rounding of another batch."""
    if a.tokens.ids is not None:
        assert torch.equal(a.tokens.ids, b.tokens.ids)
    else:
        torch.testing.assert_close(a.tokens.values, b.tokens.values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_every_registered_generator_is_in_this_suite(name):
    assert name in PIPELINES, f"no pipeline here draws from {name}"


def test_an_image_is_a_function_of_its_seed_number_and_condition(case):
    pipe, options = case
    whole = pipe(**options, seed=1)
    assert_same(whole, pipe(**options, seed=1))
    assert not torch.equal(whole.tokens.data, pipe(**options, seed=2).tokens.data)
    assert not torch.equal(whole.tokens.data[0], whole.tokens.data[1])


def test_an_image_does_not_depend_on_its_batch(case):
    pipe, options = case
    whole = pipe(**options, seed=1)
    assert_same(whole, pipe(**options, seed=1, batch_size=2))
    alone = pipe(**{**options, "labels": ["Dogs"]}, generators=vistok.image_generators(1, [1]))
    torch.testing.assert_close(alone.images, whole.images[1:2], atol=1e-3, rtol=0)


def test_what_the_callback_saw_is_continued_as_if_never_interrupted(case):
    pipe, options = case
    states = []
    whole = pipe(**options, seed=1, callback_on_step_end=lambda p, step, data: states.append(data.clone()))
    assert len(states) > 1
    seen = []
    for state in states[: -1 : -(-len(states) // 4)]:
        seen.clear()
        again = pipe(**options, seed=1, prefix=state, callback_on_step_end=lambda p, step, data: seen.append(data.clone()))
        assert_same(again, whole)
        assert again.stats.target_passes <= whole.stats.target_passes and again.stats.num_tokens <= whole.stats.num_tokens
        known = state != getattr(pipe.generator, "mask_id", -1)
        assert all(torch.equal(data[:, : state.shape[1]][known], state[known]) for data in seen if data.shape[1] >= state.shape[1])


def test_another_seed_varies_what_a_prefix_leaves_open_and_nothing_else(case):
    pipe, options = case
    states = []
    whole = pipe(**options, seed=1, callback_on_step_end=lambda p, step, data: states.append(data.clone()))
    middle = states[(len(states) - 1) // 2]
    seen = []
    other = pipe(**options, seed=2, prefix=middle, callback_on_step_end=lambda p, step, data: seen.append(data.clone()))
    known = middle != getattr(pipe.generator, "mask_id", -1)
    assert torch.equal(seen[-1][:, : middle.shape[1]][known], middle[known])
    assert not torch.equal(other.tokens.data, whole.tokens.data)


def test_everything_the_callback_sees_can_be_shown_and_the_last_is_the_image(case):
    pipe, options = case
    shown = []
    whole = pipe(**options, seed=1, callback_on_step_end=lambda p, step, data: shown.append(p.partial_images(data, output_type="pt")))
    assert all(images.shape == whole.images.shape and images.isfinite().all() for images in shown)
    difference = (shown[-1] - whole.images).abs().max()
    assert difference < 1e-3 or "FlexTok" in type(pipe.tokenizer).__name__  # whose decoder starts at noise of its own
    assert not torch.equal(shown[0], shown[-1])
