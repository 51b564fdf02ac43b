import pytest
import torch

import vistok
from vistok.tokenizers import FSQ2DConfig, VAEConfig
from vistok.tokens import TokenLayout, VisualTokens


def images(B=2, H=64, W=64):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def fsq2d():
    return vistok.create("fsq2d-tiny").eval()


@pytest.fixture(scope="module")
def vae():
    return vistok.create("vae-small").eval()


def test_fsq2d_makes_one_id_a_grid_cell_and_decodes_them(fsq2d):
    tokens = fsq2d.encode(images())
    assert tokens.ids.shape == (2, 64) and tokens.layout == TokenLayout("grid", (8, 8)) == fsq2d.layout
    out = fsq2d.decode(tokens)
    assert out.shape == (2, 3, 64, 64) and out.abs().max() <= 1


@pytest.mark.parametrize("name", ["fsq2d", "vae"])
def test_a_grid_tokenizer_takes_other_sizes_and_shapes(name, request):
    tokenizer = request.getfixturevalue(name)
    tokens = tokenizer.encode(images(1, 32, 96))
    assert tokens.layout.shape == (4, 12) and tokenizer.decode(tokens).shape == (1, 3, 32, 96)


@pytest.mark.parametrize("name", ["fsq2d", "vae"])
def test_a_grid_has_no_shorter_form(name, request):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.encode(images(), num_tokens=64).counts.tolist() == [64, 64]
    with pytest.raises(ValueError, match="exactly 64 tokens"):
        tokenizer.encode(images(), num_tokens=16)


def test_fsq2d_refuses_short_rows_strange_ids_and_values(fsq2d):
    tokens = fsq2d.encode(images())
    with pytest.raises(ValueError, match="exactly 64"):
        fsq2d.decode(tokens.truncate(10))
    with pytest.raises(ValueError, match=r"\[0, 200\)"):
        fsq2d.decode(VisualTokens.from_ids(torch.full((1, 64), 200), fsq2d.layout))
    with pytest.raises(ValueError, match="continuous"):
        fsq2d.decode(VisualTokens.from_values(torch.zeros(1, 64, 3), fsq2d.layout))


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(3, 64, 64), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 1, 64, 64), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating"),
        (torch.zeros(1, 3, 60, 64), "multiple of 8"),
        ("cat.png", "str"),
    ],
)
def test_images_of_the_wrong_kind_are_refused_with_the_reason(fsq2d, vae, bad, message):
    for tokenizer in (fsq2d, vae):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(bad)


def test_fsq2d_trains_every_parameter(fsq2d):
    model = vistok.create("fsq2d-tiny")
    out = model(images())
    sum(out.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert out.reconstruction.shape == (2, 3, 64, 64) and set(out.losses) == {"l1", "mse"}


def test_a_vae_gives_its_mode_unless_generators_sample_it(vae):
    mode = vae.encode(images()).values
    assert torch.equal(mode, vae.encode(images()).values)
    sample = vae.encode(images(), generators=vistok.image_generators(0, 2)).values
    assert torch.equal(sample, vae.encode(images(), generators=vistok.image_generators(0, 2)).values)
    assert not torch.equal(sample, mode)
    one = vae.encode(images()[1:], generators=vistok.image_generators(0, [1])).values
    torch.testing.assert_close(one, sample[1:], atol=1e-5, rtol=1e-4)


def test_a_vae_scales_its_latents_and_undoes_it():
    plain, scaled = (vistok.create("vae-small", scaling_factor=s).eval() for s in (1.0, 0.5))
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled.encode(images()).values, 0.5 * plain.encode(images()).values)
    torch.testing.assert_close(scaled.decode(scaled.encode(images())), plain.decode(plain.encode(images())), atol=1e-5, rtol=1e-4)


def test_a_vae_has_no_codebook_and_decodes_no_ids(vae):
    assert vae.codebook_size is None
    with pytest.raises(ValueError, match="no codebook"):
        vae.embed(torch.zeros(1))
    with pytest.raises(ValueError, match="hold ids"):
        vae.decode(VisualTokens.from_ids(torch.zeros(1, 64), TokenLayout("grid", (8, 8))))


def test_shapes_that_cannot_be_built_are_refused():
    for config, options in ((VAEConfig, {"norm_groups": 7}), (VAEConfig, {"scaling_factor": 0.0}), (FSQ2DConfig, {"channels": (12,)}),
                            (FSQ2DConfig, {"image_size": (60, 64)})):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            config(**options)
