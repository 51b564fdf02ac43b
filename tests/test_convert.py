import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.convert import FORMATS, convert, export
from vistok.convert.flextok import from_official, official_state, rules, to_official
from vistok.convert.flextok_config import check_config, official_config, settings_of
from vistok.convert.kl_vae import from_official as vae_from_official
from vistok.convert.kl_vae import to_official as vae_to_official
from vistok.convert.safe_reader import parse_value, read_shapes
from vistok.registry import create
from vistok.tokenizers import FlexTokConfig, VAEConfig
from vistok.tokenizers.flextok import FlexTok

VAE = VAEConfig(image_size=(32, 32), latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.3)
BASE = dict(
    image_size=(32, 32), vae=VAE, patch_size=(2, 2), max_grid=(8, 8), num_registers=16, levels=(8, 5, 5), encoder_width=32, encoder_depth=1,
    decoder_width=32, decoder_depth=2, head_width=16, decoder_head_width=16, frequency_width=32, max_time=1.0,
)  # fmt: skip


def build(**overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlexTok(FlexTokConfig(**{**BASE, **overrides})).eval()
        for parameter in model.parameters():
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    to_official(build(), tmp_path / "official")
    return tmp_path / "official"


def change(folder, *path, value):
    """Set one value of the official configuration; `...` removes it."""
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


# -- round trips ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": (1, 2), "max_grid": (16, 8), "image_size": (32, 32)},
        {"patch_size": (4, 3), "max_grid": (4, 6), "image_size": (32, 36)},
        {"max_grid": (11, 9), "image_size": (32, 32)},
        {"num_registers": 5, "levels": (4,)},
        {"head_width": 8, "decoder_head_width": 32, "encoder_width": 40, "decoder_depth": 1, "mlp_ratio": 2.0},
        {"frequency_width": 33, "max_time": 1000.0, "levels": (7, 6, 2, 3)},
        {"position_scaling": "interpolate", "max_grid": (4, 4)},
        {"vae": VAEConfig(latent_channels=3, block_channels=(32, 32, 64), layers_per_block=2, mid_attention=False)},
    ],
    ids=["base", "patch1x2", "patch4x3", "cropped", "five", "heads", "times", "interpolated", "vae"],
)
def test_ours_to_official_to_ours_changes_nothing(tmp_path, options):
    model = build(**options)
    to_official(model, tmp_path)
    size = model.settings.image_size
    again = from_official(tmp_path, norm_groups=model.settings.vae.norm_groups, image_size=size)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = {name: getattr(again.settings, name) for name in BASE if name not in ("vae", "image_size")}
    assert plain == {name: getattr(model.settings, name) for name in plain}
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = model.encode(images)
    assert torch.equal(tokens.ids, again.encode(images).ids)
    assert torch.equal(model.decode(tokens, num_steps=2), again.decode(tokens, num_steps=2))


def test_the_configuration_is_read_from_the_header_when_there_is_no_file(folder):
    with_file = from_official(folder, norm_groups=4)
    (folder / "config.json").unlink()
    assert from_official(folder, norm_groups=4).settings == with_file.settings
    assert from_official(folder / "model.safetensors", norm_groups=4).settings == with_file.settings


def test_without_any_configuration_what_shapes_cannot_say_is_asked_for(folder):
    (folder / "config.json").unlink()
    change_weights(folder, lambda state: None)  # drops the header too
    with pytest.raises(ValueError, match="levels.*head_width.*max_time.*scaling_factor.*patch_size"):
        from_official(folder, norm_groups=4)
    options = {
        "levels": (8, 5, 5),
        "head_width": 16,
        "decoder_head_width": 16,
        "max_time": 1.0,
        "scaling_factor": 0.3,
        "patch_size": (2, 2),
    }
    again = from_official(folder, norm_groups=4, image_size=(32, 32), **options)
    assert again.settings == build().settings


def test_convert_and_export_are_inverse_folders(folder, tmp_path):
    assert convert("flextok", folder, tmp_path / "ours", norm_groups=4) == tmp_path / "ours"
    assert isinstance(vistok.load(tmp_path / "ours"), FlexTok)
    export("flextok", tmp_path / "ours", tmp_path / "back")
    there, back = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())
    with pytest.raises(ValueError, match="did you mean 'flextok'"):
        convert("flextock", folder, tmp_path / "x")
    assert set(FORMATS) >= {"flextok", "kl-vae"}


def test_half_precision_survives_the_round_trip(tmp_path):
    to_official(build(), tmp_path / "a", dtype=torch.bfloat16)
    to_official(from_official(tmp_path / "a", norm_groups=4), tmp_path / "b", dtype=torch.bfloat16)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(a[key].dtype == torch.bfloat16 and torch.equal(a[key], b[key]) for key in a)


def test_the_published_layout_is_covered_key_by_key():
    layout = json.loads((Path(__file__).parent / "data" / "layout_flextok_d12_d12.json").read_text())
    with torch.device("meta"):
        model = create("flextok-d12-d12")
    ours = model.state_dict()
    official = official_state(model.settings, ours)
    assert {key: list(value.shape) for key, value in official.items()} == layout
    assert {rule.ours for rule in rules(model.settings, [key for key in ours if key.startswith("vae.vae.")])} == set(ours)


def test_what_the_official_format_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pixels"):
        to_official(create("flextok-tiny"), tmp_path)
    folded = VAEConfig(stem=2, latent_channels=4, block_channels=(8, 8), norm_groups=4)
    with pytest.raises(ValueError, match="stem=2"):
        official_config(FlexTokConfig(**{**BASE, "vae": folded}))


# -- tolerance -----------------------------------------------------------------------------------------------------------------------------


def test_training_artefacts_and_checkpoint_wrappers_do_not_matter(folder):
    expected = from_official(folder, norm_groups=4).state_dict()

    def edit(state):
        state["vae.logvar"] = torch.zeros(1)
        state["decoder.module_dict.dec_repa_head.mlp.0.weight"] = torch.zeros(2, 2)
        for key in [key for key in state if ".blocks.0." in key]:
            state[key.replace(".blocks.0.", ".blocks.0._checkpoint_wrapped_module.")] = state.pop(key)

    change_weights(folder, edit)
    got = from_official(folder, norm_groups=4).state_dict()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_the_weights_decide_where_the_configuration_disagrees_and_it_is_logged(folder, caplog):
    change(folder, "encoder", "module_dict", "enc_register_module", "n_max", value=99)
    with caplog.at_level(logging.WARNING, logger="vistok"):
        assert from_official(folder, norm_groups=4).max_tokens == 16
    assert "num_registers=99" in caplog.text


def test_mup_readouts_are_read_as_linear_layers_with_a_warning(folder, caplog):
    change(folder, "decoder", "module_dict", "dec_to_patches", "use_mup_readout", value=True)
    with caplog.at_level(logging.WARNING, logger="vistok"):
        from_official(folder, norm_groups=4)
    assert "decoder.module_dict.dec_to_patches.use_mup_readout" in caplog.text


def test_shared_keys_may_have_other_names_as_long_as_the_data_flows_the_same_way():
    text = json.dumps(official_config(FlexTokConfig(**BASE)))
    renamed = json.loads(text.replace('"dec_registers_proj"', '"x"').replace('"vae_latents"', '"y"').replace('"dec_temb"', '"z"'))
    assert settings_of(renamed) == settings_of(json.loads(text))


# -- refusals ------------------------------------------------------------------------------------------------------------------------------

ENCODER, DECODER = ("encoder", "module_dict"), ("decoder", "module_dict")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("regularizer", "_target_"), "os.system", r"regularizer\._target_.*'os.system'"),
        ((*ENCODER, "enc_transformer", "_target_"), "posix.system", r"encoder\.module_dict\.enc_transformer\._target_"),
        ((*ENCODER, "enc_transformer", "init_fn"), {"_target_": "os.system"}, r"enc_transformer\.init_fn"),
        ((*ENCODER, "enc_channels_to_last", "per_sample_op"), {"_target_": "os.system"}, r"per_sample_op"),
        ((*ENCODER, "enc_seq_packer", "mask_mode"), "full", r"enc_seq_packer\.mask_mode='full'"),
        ((*DECODER, "dec_seq_packer", "mask_mode"), ..., r"dec_seq_packer\.mask_mode"),
        ((*DECODER, "dec_transformer", "adaLN_expansion"), 1, "adaLN_expansion=1"),
        ((*DECODER, "dec_transformer", "qk_norm"), False, "qk_norm=False"),
        ((*DECODER, "dec_latent_dropout"), ..., "in this order"),
        ((*DECODER, "dec_extra"), {"_target_": "x.LinearLayer"}, "dec_extra"),
        ((*DECODER, "dec_from_latents", "read_key"), "enc_registers", r"dec_from_latents\.read_key='enc_registers' must read 'codes'"),
        ((*DECODER, "dec_unpacker", "inner_seq_write_keys"), ["dec_patches"], "must name 2 keys"),
        (("vae", "vae_latents_read_key"), "vae_latents", r"vae\.vae_latents_read_key"),
        (("regularizer", "levels"), [8, 5], "fit"),
        (("surprise",), {"_target_": "os.system"}, "surprise"),
        (("pipeline",), ..., "pipeline is missing"),
        (("regularizer",), "os.system", "regularizer"),
    ],
)
def test_a_configuration_that_is_not_flextoks_is_refused_with_the_full_path(folder, path, value, message):
    change(folder, *path, value=value)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        from_official(folder, norm_groups=4)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.pop("decoder.module_dict.dec_latent_dropout.nullcond"), "missing decoder.module_dict.dec_latent_dropout.nullcond"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected surprise"),
        (lambda s: s.pop("encoder.module_dict.enc_register_module.registers"), "no FlexTok checkpoint"),
        (lambda s: s.update({"encoder.module_dict.enc_to_latents.proj.bias": torch.zeros(7)}), "enc_to_latents.proj.bias has shape"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("vae.vae.")], "AutoencoderKL"),
    ],
)
def test_weights_that_are_not_flextoks_are_refused_with_the_key(folder, edit, message):
    change_weights(folder, edit)
    with pytest.raises(ValueError, match=message):
        from_official(folder, norm_groups=4)


def test_pickles_missing_files_and_lying_headers_are_refused(folder, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(ValueError, match="pickled"):
        from_official(tmp_path / "model.bin")
    with pytest.raises(OSError, match="model.bin"):
        from_official(tmp_path)
    with pytest.raises(OSError, match="does not exist"):
        from_official(tmp_path / "nothing")
    (tmp_path / "long.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="claims a header"):
        read_shapes(tmp_path / "long.safetensors")


def test_values_are_data_and_never_code():
    assert parse_value("{'a': (1, True, None)}", "x") == {"a": (1, True, None)} and parse_value('{"a": [1, true]}', "x") == {"a": [1, True]}
    assert parse_value("flextok.wrapper.FlexTok", "x") == "flextok.wrapper.FlexTok"
    for bad in ("__import__('os').system('x')", "[" * 100000, "1" * (1 << 21), "NaN", "{"):
        with pytest.raises(ValueError, match="x "):
            parse_value(bad, "x")


def test_checking_needs_nothing_but_the_data():
    assert list(check_config(official_config(FlexTokConfig(**BASE))))[0] == "vae"


# -- VAEs ----------------------------------------------------------------------------------------------------------------------------------


def test_a_diffusers_vae_is_read_and_written_back_bit_equal(tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16]}
    theirs = AutoencoderKL(**blocks, layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.7, sample_size=32).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours = vae_from_official(tmp_path / "a")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_latents(images), theirs.encode(images).latent_dist.mean * 0.7, atol=1e-6, rtol=1e-5)
    vae_to_official(ours, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    back = AutoencoderKL.from_pretrained(tmp_path / "b")
    assert dict(back.config)["scaling_factor"] == 0.7
    convert("kl-vae", tmp_path / "a", tmp_path / "c")
    assert vistok.load(tmp_path / "c").settings == ours.settings


def test_a_vae_with_a_shift_or_other_blocks_is_refused(tmp_path):
    vae_to_official(create("vae-small"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("shift_factor", 0.1), ("act_fn", "gelu"), ("down_block_types", ["Other"]), ("surprise", 1)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=key):
            vae_from_official(tmp_path)
