import argparse
import pickle

import pytest
import torch

import vistok
from vistok.convert.llamagen import from_official, official_state, to_official
from vistok.generators import GPT
from vistok.tokenizers import VQGAN, VQGANConfig
from vistok.tokens import TokenLayout, VisualTokens
from vistok.training.recipes import Sources, get_recipe
from vistok.training.tasks.image_losses import ImageLossConfig
from vistok.training.tasks.perceptual import PerceptualTask

TINY_GPT = dict(condition_attention="uniform", layout_shape=(4, 4), num_classes=3)


def images(B=2, H=64, W=64):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Batch:
    def __init__(self, count):
        self.images = images(count, 32, 32)


def make(name="vqgan-tiny", **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create(name, **overrides).eval()


@pytest.fixture(scope="module")
def vqgan():
    return make()


@pytest.fixture(scope="module")
def gpt():
    return make("gpt-tiny", **TINY_GPT)


def test_it_makes_one_id_a_grid_cell_and_decodes_them(vqgan):
    tokens = vqgan.encode(images())
    assert tokens.ids.shape == (2, 64) and tokens.layout == TokenLayout("grid", (8, 8)) == vqgan.layout
    out = vqgan.decode(tokens)
    assert out.shape == (2, 3, 64, 64) and out.abs().max() <= 1
    assert vqgan.encode(images(1, 32, 96)).layout.shape == (4, 12)


@torch.no_grad()
def test_codes_are_unit_vectors_and_each_id_is_the_code_of_largest_cosine(vqgan):
    vectors, ids = vqgan.vectors(images()).flatten(0, 2), vqgan.encode(images()).ids.flatten()
    codes = vqgan.embed(torch.arange(256))
    assert torch.allclose(codes.norm(dim=1), torch.ones(256), atol=1e-5)
    assert torch.equal((vectors @ codes.T).argmax(1), ids)
    scaled = make()
    scaled.load_state_dict(vqgan.state_dict())
    scaled.quantizer.codebook.mul_(torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) + 0.5)
    assert torch.equal(scaled.encode(images()).ids, vqgan.encode(images()).ids)


def test_what_it_cannot_decode_or_encode_is_refused_with_the_reason(vqgan):
    tokens = vqgan.encode(images())
    with pytest.raises(ValueError, match="exactly 64"):
        vqgan.decode(tokens.truncate(10))
    with pytest.raises(ValueError, match="exactly 64"):
        vqgan.encode(images(), num_tokens=10)
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        vqgan.decode(VisualTokens.from_ids(torch.full((1, 64), 256), vqgan.layout))
    with pytest.raises(ValueError, match="continuous"):
        vqgan.decode(VisualTokens.from_values(torch.zeros(1, 64, 8), vqgan.layout))
    with pytest.raises(ValueError, match="multiple of 8"):
        vqgan.encode(images(1, 60, 64))
    for name, value in {"multipliers": (), "blocks": 0, "image_size": (60, 64), "norm_groups": 7}.items():
        with pytest.raises(ValueError, match="multipliers" if name == "norm_groups" else name):
            VQGANConfig(**{name: value})


def test_every_parameter_trains_with_entropy_revival_and_a_discriminator():
    model = make(image_size=(32, 32), entropy_weight=0.1, revive_after=2)
    task = PerceptualTask(model, ImageLossConfig(gan_weight=0.5, gan_start=1)).train()
    first, logs = task(Batch(2), None, 0)
    assert set(logs) == {"mse", "commitment", "codebook", "entropy", "gan", "judge", "codes"} and logs["codes"].sum() == 32
    later, _ = task(Batch(2), None, 1)
    assert later != first  # the GAN counts from step 1 on
    later.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


def test_the_recipes_build_what_they_say():
    task = get_recipe("vqgan-tiny", "tokenizer").build(Sources(image_size=64))
    assert isinstance(task.model, VQGAN) and task.model.settings.image_size == (64, 64)
    assert get_recipe("vqgan-imagenet256", "tokenizer").train.batch_size == 128
    assert get_recipe("gpt-imagenet256", "generator").train.batch_size == 256


def test_the_presets_have_the_published_sizes():
    with torch.device("meta"):
        models = {name: vistok.create(name) for name in ("vq-16", "vq-8", "gpt-l", "gpt-xl", "gpt-3b", "gpt-xl-t2i")}
    millions = {name: round(sum(p.numel() for p in model.parameters()) / 1e6) for name, model in models.items()}
    assert millions == {"vq-16": 72, "vq-8": 70, "gpt-l": 343, "gpt-xl": 775, "gpt-3b": 3097, "gpt-xl-t2i": 778}
    assert models["vq-16"].max_tokens == 256 and models["vq-8"].max_tokens == 1024


# official checkpoints


def wrapped(state, kind):
    """A state dict as published files hold it."""
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    return {
        "flat (FSDP)": state,
        "DDP": {"model": {f"module.{key}": value for key, value in state.items()}, "steps": 7, "args": argparse.Namespace(lr=1e-4)},
        "DeepSpeed": {"module": state, "ds_version": "0.9"},
        "averaged": {"ema": state, "model": other, "optimizer": {"state": {}, "param_groups": []}},
        "compiled": {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "FSDP units": {key.replace("layers.0.", "layers.0._fsdp_wrapped_module."): value for key, value in state.items()},
    }[kind]


@pytest.mark.parametrize("reads", ["classes", "captions"])
@pytest.mark.parametrize("kind", ["flat (FSDP)", "DDP", "DeepSpeed", "averaged", "compiled", "FSDP units"])
def test_every_published_wrapping_is_unwrapped(gpt, kind, reads, tmp_path):
    if reads == "captions":
        text = dict(num_classes=0, text="some/t5", caption_tokens=6, caption_width=12, caption_padding="hidden")
        gpt = make("gpt-tiny", **{**TINY_GPT, **text})
    torch.save(wrapped(official_state(gpt), kind), tmp_path / "model.pt")
    again = from_official(tmp_path / "model.pt", num_heads=4, layout_shape=(4, 4))
    assert isinstance(again, GPT) and not again.training
    assert again.settings.num_classes == gpt.settings.num_classes and again.settings.caption_padding == gpt.settings.caption_padding
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in gpt.state_dict().items())


def test_a_tokenizer_goes_to_the_official_format_and_back(vqgan, tmp_path):
    to_official(vqgan, tmp_path)
    names = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    assert names["quantize.codebook_used"].shape == (65536,) and names["encoder.mid.1.q.weight"].shape == (32, 32, 1, 1)
    again = from_official(tmp_path, image_size=(64, 64), norm_groups=8)
    assert again.settings == vqgan.settings
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in vqgan.state_dict().items())
    revived = from_official(tmp_path, image_size=(64, 64), norm_groups=8, revive_after=3)
    assert official_state(revived).keys() == names.keys() - {"quantize.codebook_used"}


def test_wrong_keys_and_shapes_are_all_named(gpt, tmp_path):
    state = official_state(gpt)
    state["stray"] = state.pop("norm.weight")
    state["output.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "c2i.pt")
    with pytest.raises(ValueError, match=r"(?s)missing norm.weight.*unexpected stray.*output.weight has shape \(3, 3\)"):
        from_official(tmp_path / "c2i.pt", num_heads=4, layout_shape=(4, 4))
    torch.save(official_state(gpt), tmp_path / "c2i.pt")
    with pytest.raises(ValueError, match="give num_heads="):
        from_official(tmp_path / "c2i.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no LlamaGen checkpoint"):
        from_official(tmp_path / "other.pt")
    torch.save({"quantize.embedding.weight": torch.zeros(4, 8)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="lacks encoder.conv_in.weight"):
        from_official(tmp_path / "half.pt")


def test_a_checkpoint_that_would_run_code_is_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "c2i.pt").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="not opened"):
        from_official(tmp_path / "c2i.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"condition_attention": "learned"}, "uniform"),
        ({"layout_shape": (2, 8)}, "square"),
        ({"text": "hash"}, "no form"),
        ({"layout_kind": "sequence", "layout_shape": (16,)}, "no form"),
    ],
)
def test_generators_that_the_official_format_cannot_say_are_not_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_official(make("gpt-tiny", **{**TINY_GPT, **changes}), tmp_path)
    assert not any(tmp_path.iterdir())
