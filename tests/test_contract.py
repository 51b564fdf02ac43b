"""One suite for every tokenizer class of the registry: what a generator, the CLI or an evaluation may rely on.

Nothing is listed by hand but extra shapes: each registered tokenizer class is run through its smallest preset, and one without a small
preset fails the suite.
"""

import dataclasses

import pytest
import torch

import vistok
from vistok import registry
from vistok.metrics.evaluate import trained_image_size
from vistok.protocols import ImageTokenizer
from vistok.tokens import VisualTokens

TOKENIZERS = ("encode", "decode", "embed")
CLASSES = sorted(
    name
    for name, kind in registry._CLASSES.items()
    if kind.__module__.startswith("vistok.tokenizers") and all(hasattr(kind, method) for method in TOKENIZERS)
)
# shapes of a class that its smallest preset does not show
VARIANTS = {
    "titok-tiny, continuous": ("titok-tiny", {"quantizer": "vae"}),
    "seed-tiny, reverse head": ("seed-tiny", {"head": "reverse", "reverse_depth": 1}),
    "tokenflow-tiny, one scale": ("tokenflow-tiny", {"scales": (4,)}),
    "lavit-tiny, all patches computed": ("lavit-tiny", {"merger_eps": 1e-6}),
}


def _presets() -> dict[str, tuple[str, dict]]:
    """The tiny presets of tokenizers, and the small one of a class that has no tiny one."""
    found, classes = {}, set()
    for pattern in ("*-tiny", "*-small"):
        for name in vistok.list_models(pattern):
            with torch.device("meta"):
                model = vistok.create(name)
            if isinstance(model, ImageTokenizer) and (pattern == "*-tiny" or type(model) not in classes):
                found[name] = (name, {})
                classes.add(type(model))
    return found


SMALL = {**_presets(), **VARIANTS}


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        preset, overrides = SMALL[name]
        model = vistok.create(preset, **overrides).eval()
        for parameter in model.parameters():  # zero-initialised parts would hide what they do
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", CLASSES)
def test_every_registered_tokenizer_class_is_in_this_suite(name):
    kinds = {type(vistok.create(preset, **overrides)).__name__ for preset, overrides in SMALL.values()}
    assert name in kinds, f"{name} has no *-tiny or *-small preset, so nothing here runs it"


@pytest.fixture(scope="module", params=SMALL)
def tokenizer(request):
    return build(request.param)


@pytest.fixture(scope="module")
def images(tokenizer):
    H, W = trained_image_size(tokenizer)
    return torch.rand(4, 3, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(a, b, atol=0.0):
    """Tokens are equal: ids exactly, values within atol."""
    assert torch.equal(a.counts, b.counts) and a.layout == b.layout
    if a.ids is not None:
        assert torch.equal(a.ids, b.ids)
    else:
        torch.testing.assert_close(a.values, b.values, atol=atol, rtol=0)


def generators(numbers):
    return vistok.image_generators(0, numbers)


def test_its_sizes_agree_with_what_it_makes(tokenizer, images):
    chosen, tokens = tokenizer.encode(images), tokenizer.encode(images, num_tokens=tokenizer.max_tokens)
    assert 1 <= tokenizer.min_tokens <= tokenizer.max_tokens == tokenizer.layout.num_tokens == tokens.data.shape[1]
    assert tokens.layout == chosen.layout == tokenizer.layout and tokens.counts.tolist() == [tokenizer.max_tokens] * 4
    assert chosen.counts.min() >= tokenizer.min_tokens and chosen.counts.max() <= tokenizer.max_tokens  # its own choice, where it has one
    if tokenizer.codebook_size is None:
        assert tokens.values.shape[-1] == tokenizer.code_dim
    else:
        assert tokens.ids.min() >= 0 and tokens.ids.max() < tokenizer.codebook_size


def test_saving_and_loading_changes_no_bit(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert type(again) is type(tokenizer) and again.settings == tokenizer.settings and not again.training
    ours, theirs = tokenizer.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    same(tokenizer.encode(images), again.encode(images))
    tokens = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(tokens, generators=generators(4)), again.decode(tokens, generators=generators(4)))


def test_a_batch_gives_what_its_images_give_alone(tokenizer, images):
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens, generators=generators(4))
    for i in range(4):
        same(tokenizer.encode(images[i : i + 1]), tokens[i], atol=1e-5)
        torch.testing.assert_close(tokenizer.decode(tokens[i], generators=generators([i]))[0], decoded[i], atol=1e-4, rtol=0)


def test_the_order_of_a_batch_does_not_matter(tokenizer, images):
    order = torch.tensor([2, 0, 3, 1])
    tokens = tokenizer.encode(images)
    same(tokenizer.encode(images[order]), tokens[order], atol=1e-6)
    moved = tokenizer.decode(tokens[order], generators=generators(order.tolist()))
    torch.testing.assert_close(moved, tokenizer.decode(tokens, generators=generators(4))[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_spoilt_image_leaves_its_neighbours_alone(tokenizer, images, bad):
    spoilt = images.clone()
    spoilt[1] = bad
    tokens, expected = tokenizer.encode(spoilt), tokenizer.encode(images)
    others = torch.tensor([0, 2, 3])
    same(tokens[others], expected[others], atol=1e-6)
    if tokens.ids is not None:
        ids = tokens.ids[tokens.mask]
        assert ids.min() >= 0 and ids.max() < tokenizer.codebook_size


def test_decoded_images_are_finite_and_in_range(tokenizer, images):
    out = tokenizer.decode(tokenizer.encode(images))
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.isfinite().all() and out.min() >= -1 and out.max() <= 1


def test_encoding_and_decoding_are_deterministic_and_leave_the_global_generator_alone(tokenizer, images):
    state = torch.get_rng_state()
    tokens = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode(tokens))
    same(tokens, tokenizer.encode(images))
    assert torch.equal(state, torch.get_rng_state()) and not tokens.data.requires_grad


def test_embedding_gives_code_vectors_for_ids_of_any_shape(tokenizer):
    if tokenizer.codebook_size is None:
        with pytest.raises(ValueError, match="no codebook"):
            tokenizer.embed(torch.zeros(2, dtype=torch.int64))
        return
    ids = torch.arange(6).view(1, 2, 3)
    assert tokenizer.embed(ids).shape == (1, 2, 3, tokenizer.code_dim)
    with pytest.raises(ValueError, match="ids must be"):
        tokenizer.embed(torch.tensor([tokenizer.codebook_size]))


def test_half_precision_runs_and_keeps_the_codes_exact(tokenizer, images):
    half = type(tokenizer)(tokenizer.settings).eval()
    half.load_state_dict(tokenizer.state_dict())
    half.to(torch.bfloat16)
    tokens = half.encode(images[:2])
    assert half.decode(tokens).isfinite().all() and tokens.data.isfinite().all()
    same(tokens, half.encode(images[:2]))
    if tokenizer.codebook_size is not None:
        assert tokens.ids[tokens.mask].min() >= 0 and tokens.ids.max() < tokenizer.codebook_size
        # a codebook rounded to half precision would give other ids to the same vectors
        assert torch.equal(half.embed(tokens.ids.clamp(min=0)).float(), tokenizer.embed(tokens.ids.clamp(min=0)).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_another_float_type_are_taken_as_they_are(tokenizer, images, dtype):
    rounded = images.to(dtype)
    same(tokenizer.encode(rounded), tokenizer.encode(rounded.float()), atol=1e-6)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda images: (images * 127).to(torch.uint8), "floating point"),
        (lambda images: images[:, :1], r"\[B, 3, H, W\]"),
        (lambda images: images[0], r"\[B, 3, H, W\]"),
        (lambda images: images.numpy(), r"\[B, 3, H, W\]"),
    ],
    ids=["integers", "one channel", "no batch", "an array"],
)
def test_what_is_no_batch_of_images_is_refused_in_words(tokenizer, images, spoil, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(spoil(images))


@pytest.mark.parametrize("number", [0, -1, 10**6])
def test_a_number_of_tokens_it_cannot_make_is_refused_and_named(tokenizer, images, number):
    with pytest.raises(ValueError, match=str(number)):
        tokenizer.encode(images, num_tokens=number)


def test_tokens_it_cannot_decode_are_refused(tokenizer, images):
    tokens = tokenizer.encode(images)
    if tokenizer.codebook_size is None:
        with pytest.raises(ValueError):
            tokenizer.decode(VisualTokens.from_ids(torch.zeros(1, tokenizer.max_tokens, dtype=torch.int64), tokenizer.layout))
        return
    beyond = torch.full_like(tokens.ids, tokenizer.codebook_size)
    with pytest.raises(ValueError, match=str(tokenizer.codebook_size)):
        tokenizer.decode(VisualTokens.from_ids(beyond, tokens.layout, tokens.counts))
    values = torch.zeros(*tokens.ids.shape, tokenizer.code_dim)
    with pytest.raises(ValueError, match="continuous values"):
        tokenizer.decode(VisualTokens.from_values(values, tokens.layout, tokens.counts))


def test_its_config_is_plain_data_and_frozen(tokenizer):
    settings = tokenizer.settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, None)
    assert (
        type(tokenizer).from_config({key: value for key, value in tokenizer.config.items() if not key.startswith("_")}).settings == settings
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_tokens_there_and_nearly_the_same_ones(tokenizer, images):
    model = type(tokenizer)(tokenizer.settings).eval()
    model.load_state_dict(tokenizer.state_dict())
    tokens, expected = model.to("cuda").encode(images.to("cuda")), tokenizer.encode(images)
    assert tokens.data.device.type == "cuda" and model.decode(tokens).isfinite().all()
    if tokens.ids is not None:
        assert (tokens.ids.cpu() == expected.ids).float().mean() > 0.9  # a GPU rounds otherwise, which can tip a tie
