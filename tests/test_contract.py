"""One suite for every small tokenizer preset: what a generator, the CLI or an evaluation may rely on."""

import pytest
import torch

import vistok
from vistok.protocols import ImageTokenizer

SMALL = [name for name in [*vistok.list_models("*-tiny"), "vae-small"] if isinstance(vistok.create(name), ImageTokenizer)]


@pytest.fixture(scope="module", params=SMALL)
def tokenizer(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create(request.param).eval()
        for parameter in model.parameters():  # zero-initialised parts would hide what they do
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def images(tokenizer):
    H, W = tokenizer.settings.image_size
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


def test_half_precision_gives_finite_images(tokenizer, images):
    half = type(tokenizer)(tokenizer.settings).eval()
    half.load_state_dict(tokenizer.state_dict())
    half.to(torch.bfloat16)
    tokens = half.encode(images[:1, :, :32, :32])  # small: convolutions in bfloat16 are slow on a CPU
    assert half.decode(tokens).isfinite().all()
