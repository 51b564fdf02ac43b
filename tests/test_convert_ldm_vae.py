"""KL-VAEs of LDM's format: names and shapes of the official file, both ways, and the same images as its own arithmetic."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.convert import convert, export
from vistok.convert.kl_vae import from_official as from_diffusers
from vistok.convert.kl_vae import to_official as to_diffusers
from vistok.convert.ldm_vae import _layout, from_official, official_state, to_official

SMALL = dict(image_size=(16, 16), latent_channels=3, block_channels=(8, 8, 16), layers_per_block=2, norm_groups=4)


def build(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("vae-kl16", **{**SMALL, **fields}).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


class Official:
    """The released arithmetic, written from its description over its own state dict."""

    def __init__(self, state, channels, blocks, groups):
        self.state, self.channels, self.blocks, self.groups = state, channels, blocks, groups

    def conv(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, x, name):
        return F.group_norm(x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def residual(self, x, name):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x, half):
        x = self.residual(x, f"{half}.mid.block_1")
        return self.residual(self.attention(x, f"{half}.mid.attn_1"), f"{half}.mid.block_2")

    def encode(self, images):
        x, levels = self.conv(images, "encoder.conv_in", padding=1), len(self.channels)
        for level in range(levels):
            for block in range(self.blocks):
                x = self.residual(x, f"encoder.down.{level}.block.{block}")
                if level == levels - 1:
                    x = self.attention(x, f"encoder.down.{level}.attn.{block}")
            if level < levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2)
        x = self.middle(x, "encoder")
        return self.conv(self.conv(F.silu(self.norm(x, "encoder.norm_out")), "encoder.conv_out", padding=1), "quant_conv").chunk(2, 1)

    def decode(self, latents):
        x = self.middle(self.conv(self.conv(latents, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        for level in reversed(range(len(self.channels))):
            for block in range(self.blocks + 1):
                x = self.residual(x, f"decoder.up.{level}.block.{block}")
            if level:
                x = self.conv(F.interpolate(x, scale_factor=2.0), f"decoder.up.{level}.upsample.conv", padding=1)
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1)


def test_kl16_has_the_published_size_and_names():
    with torch.device("meta"):
        model = vistok.create("vae-kl16")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(66.46, abs=0.01)
    layout = _layout(model.settings)
    assert len(layout) == 312 and len({ours for ours, _ in layout.values()}) == 312 and model.layout.shape == (16, 16)
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.4.attn.1.q.weight": (512, 512, 1, 1),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.attn_1.proj_out.bias": (512,),
        "decoder.up.0.block.2.norm2.weight": (128,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "quant_conv.weight": (32, 32, 1, 1),
        "post_quant_conv.weight": (16, 16, 1, 1),
    }
    assert {name: layout[name][1] for name in expected} == expected
    assert not any(".attn." in name for name in layout if name.startswith("decoder.up"))


@torch.no_grad()
def test_it_encodes_and_decodes_as_the_official_arithmetic_does():
    model = build()
    official = Official(official_state(model), model.settings.block_channels, 2, 4)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, logvar = official.encode(images)
    ours = model.posterior(images)
    torch.testing.assert_close(ours[0], mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], logvar.clamp(-30, 20), atol=1e-4, rtol=1e-4)
    latents = model.encode_latents(images)
    torch.testing.assert_close(latents, 0.2325 * mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode_latents(latents), official.decode(latents / 0.2325), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"encoder_attention": False}, {"encoder_attention": False, "mid_attention": False}])
def test_both_ways_change_no_bit(fields, tmp_path):
    model = build(**fields)
    to_official(model, tmp_path / "theirs")
    again = from_official(tmp_path / "theirs", image_size=(16, 16), norm_groups=4)
    assert again.settings == model.settings
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    convert("kl-16", tmp_path / "theirs", tmp_path / "ours", image_size=(16, 16), norm_groups=4)
    export("kl-16", tmp_path / "ours", tmp_path / "back")
    a, b = (torch.load(tmp_path / folder / "kl16.ckpt", weights_only=True)["model"] for folder in ("theirs", "back"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_trained_it_is_left_out_and_misfits_are_named(tmp_path):
    model = build()
    state = official_state(model)
    options = dict(image_size=(16, 16), norm_groups=4)
    torch.save({"model": {**state, "loss.discriminator.main.0.weight": torch.zeros(2)}, "epoch": 3}, tmp_path / "kl16.ckpt")
    assert from_official(tmp_path, **options).settings == model.settings
    torch.save({"model": {**state, "encoder.extra.weight": torch.zeros(2)}}, tmp_path / "extra.ckpt")
    with pytest.raises(ValueError, match="unexpected encoder.extra.weight"):
        from_official(tmp_path / "extra.ckpt", **options)
    del state["decoder.up.0.block.0.conv1.bias"]
    torch.save({"model": state}, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match="missing decoder.up.0.block.0.conv1.bias"):
        from_official(tmp_path / "less.ckpt", **options)
    torch.save({"model": {"something": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no VAE of LDM's format"):
        from_official(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="stem=2"):
        to_official(build(stem=2), tmp_path)


def test_diffusers_own_format_knows_the_attention_too(tmp_path):
    model = build()
    to_diffusers(model, tmp_path)
    again = from_diffusers(tmp_path)
    assert again.settings == model.settings and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values())
    )
