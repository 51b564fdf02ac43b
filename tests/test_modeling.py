import json
import random
import struct
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import vistok
import vistok.registry
from vistok.modeling import config_from_dict
from vistok.tokenizers import FSQ2D, FlexTok


@pytest.fixture(scope="module")
def model():
    return vistok.create("fsq2d-tiny").eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# -- round trips ---------------------------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_a_config_and_a_safetensors_file_and_loads_bit_equal(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = FSQ2D.from_pretrained(folder)
    assert again.settings == model.settings
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_half_precision_on_disk_is_float32_when_loaded(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["encoder.1.weight"].dtype == torch.float16
    again = FSQ2D.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    assert torch.equal(again.encoder[1].weight, model.encoder[1].weight.half().float())
    assert FSQ2D.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_int8_on_disk_is_within_half_a_step_of_each_row_and_a_quarter_of_the_size(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "packed", dtype=torch.int8)
    again = FSQ2D.from_pretrained(tmp_path / "packed")
    assert again.dtype == torch.float32
    for (name, weight), loaded in zip(model.named_parameters(), again.parameters()):
        if weight.ndim >= 2:
            step = weight.flatten(1).abs().amax(1) / 127
            assert ((weight - loaded).flatten(1).abs().amax(1) <= 0.501 * step + 1e-9).all(), name
        else:
            assert torch.equal(weight.half().float(), loaded), name
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("packed", "whole")]
    assert sizes[0] < 0.4 * sizes[1]


@pytest.mark.parametrize("change", ["scale missing", "scale too short", "int8 without need"])
def test_int8_weights_need_one_scale_a_row(model, tmp_path, change):
    model.save_pretrained(tmp_path, dtype=torch.int8)
    key = "encoder.1.weight"

    def damage(state):
        if change == "scale too short":
            state[f"{key}:scale"] = state[f"{key}:scale"][:-1].clone()
        elif change == "scale missing":
            del state[f"{key}:scale"]
        else:
            state["encoder.1.bias"] = state["encoder.1.bias"].to(torch.int8)

    change_weights(tmp_path, damage)
    with pytest.raises(ValueError, match="encoder.1"):
        FSQ2D.from_pretrained(tmp_path)


def test_the_bundled_models_load_and_stay_small():
    names = vistok.list_models("vistok/emoji-*")
    assert {"vistok/emoji-flextok", "vistok/emoji-fsq2d", "vistok/emoji-gpt", "vistok/emoji-gpt-fsq2d", "vistok/emoji-vae"} <= set(names)
    for name in names:
        vistok.load(name)
    weights = [path.stat().st_size for path in vistok.registry.BUNDLED.rglob("*.safetensors")]
    assert sum(weights) < 24 * 2**20


def test_the_config_is_plain_data_and_builds_the_same_model(model):
    data = json.loads(json.dumps(dict(model.config)))
    assert FSQ2D.from_config({k: v for k, v in data.items() if not k.startswith("_")}).settings == model.settings


def test_a_config_field_named_like_a_submodule_does_not_hide_it():
    from vistok.tokenizers import VAEConfig

    vae = VAEConfig(image_size=(32, 32), block_channels=(8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)
    model = vistok.create("flextok-tiny", vae=vae, patch_size=(2, 2))
    assert isinstance(model.vae, torch.nn.Module)
    with pytest.raises(AttributeError):
        model.nothing_of_that_name  # noqa: B018


class Holder(DiffusionPipeline):
    def __init__(self, tokenizer):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)


def test_a_diffusers_pipeline_keeps_a_model_bit_equal(model, tmp_path):
    Holder(model).save_pretrained(tmp_path)
    again = Holder.from_pretrained(tmp_path).tokenizer
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert type(again) is FSQ2D and torch.equal(model.encode(images).ids, again.encode(images).ids)
    assert torch.equal(model.decode(model.encode(images)), again.decode(again.encode(images)))


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_model(model, folder, tmp_path):
    import subprocess

    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"images": images}, tmp_path / "in.safetensors")
    code = (
        "import sys, vistok; from safetensors.torch import load_file, save_file; m = vistok.load(sys.argv[1]);"
        "t = m.encode(load_file(sys.argv[2])['images']); save_file({'ids': t.ids, 'out': m.decode(t).contiguous()}, sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "in.safetensors", tmp_path / "out.safetensors"], check=True)
    there, tokens = load_file(tmp_path / "out.safetensors"), model.encode(images)
    assert torch.equal(there["ids"], tokens.ids) and torch.equal(there["out"], model.decode(tokens))


# -- broken weights ------------------------------------------------------------------------------------------------------------------------

KEY = "encoder.1.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop(KEY),
        lambda state: state.update({KEY: state[KEY][:1].clone()}),
        lambda state: state.update({KEY: state[KEY].view(-1).clone()}),
        lambda state: state.update({KEY: state[KEY].long()}),
        lambda state: state.update({KEY: state[KEY].bool()}),
        lambda state: state.update({KEY + "x": state.pop(KEY)}),
    ],
    ids=["missing", "short", "flat", "int64", "bool", "renamed"],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_key(folder, change):
    change_weights(folder, change)
    with pytest.raises(ValueError, match="model.safetensors") as caught:
        vistok.load(folder)
    assert KEY in str(caught.value)


def test_an_extra_weight_is_refused_and_the_nearest_known_key_is_named(folder):
    change_weights(folder, lambda state: state.update({"encoder.1.weights": torch.zeros(1)}))
    with pytest.raises(ValueError, match="unexpected encoder.1.weights .*encoder.1.weight"):
        vistok.load(folder)


def test_every_key_at_fault_is_named(folder):
    change_weights(folder, lambda state: (state.pop(KEY), state.pop("encoder.1.bias")))
    with pytest.raises(ValueError) as caught:
        vistok.load(folder)
    assert KEY in str(caught.value) and "encoder.1.bias" in str(caught.value)


@pytest.mark.parametrize("case", range(12))
def test_a_file_cut_anywhere_is_refused(folder, case):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: (0, len(data) - 1, *random.Random(0).sample(range(len(data)), 10))[case]])
    with pytest.raises((ValueError, OSError), match="model.safetensors"):
        vistok.load(folder)


def test_a_flipped_bit_in_the_header_is_refused(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    for _ in range(40):
        spoilt = bytearray(data)
        spoilt[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises((ValueError, OSError), match="model.safetensors"):
            vistok.load(folder)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.pt", "model.ckpt", "diffusion_pytorch_model.bin"])
def test_pickled_weights_are_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(OSError, match=name.replace(".", r"\.")):
        vistok.load(folder)


# -- broken configs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_target_": "os.system"}, "_target_"),
        ({"_partial_": True}, "_partial_"),
        ({"encoder": "os.system"}, "encoder"),
        ({"chanels": [16, 24]}, "did you mean 'channels'"),
        ({"channels": "os.system"}, "channels"),
        ({"blocks": 1.5}, "blocks must be int"),
        ({"blocks": True}, "blocks must be int"),
        ({"levels": {"_target_": "os.system"}}, "levels must be a list"),
        ({"image_size": [64]}, "2 entries"),
        ({"channels": [10**9, 10**9]}, "config"),
        ({"channels": [10**30]}, "beyond"),
        ({"blocks": 10**9}, "blocks"),
        ({"blocks": -1}, "blocks"),
        ({"levels": [10**6] * 6}, "at most"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_built(folder, changes, message):
    before = set(sys.modules)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        vistok.load(folder)
    assert not {name for name in set(sys.modules) - before if not name.startswith(("vistok", "torch", "diffusers"))}


def test_an_absurd_size_allocates_nothing(tmp_path):
    import resource

    vistok.create("flextok-tiny").save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changes in ({"encoder_width": 10**6 * 64}, {"encoder_width": 10**9 * 64}, {"encoder_depth": 10**9}, {"num_registers": 10**15}):
        change_config(tmp_path, **{"encoder_width": 64, "encoder_depth": 2, "num_registers": 16, **changes})
        with pytest.raises(ValueError):
            vistok.load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    "text, message",
    [("{", "not valid JSON"), ('{"blocks": NaN}', "NaN"), ("[]", "object"), ("[" * 100000, "not valid"), ("\xff", "not valid")],
)
def test_a_config_file_that_is_no_plain_object_is_refused(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, OSError), match=message):
        vistok.load(folder)


def test_a_huge_config_file_is_refused_unread(folder):
    (folder / "config.json").write_text(" " * (1 << 21))
    with pytest.raises(ValueError, match="at most"):
        vistok.load(folder)


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    rate: float = 0.5


def test_nested_configs_are_checked_as_strictly():
    assert config_from_dict(Outer, {"inner": {"size": 3}, "rate": 1}) == Outer(Inner(3), 1.0)
    assert config_from_dict(Outer, {"inner": None}) == Outer(None)
    for data, message in (
        ({}, "lacks the field 'inner'"),
        ({"inner": {}}, "lacks the field 'size'"),
        ({"inner": {"size": "3"}}, "must be int"),
        ({"inner": None, "rate": float("inf")}, "finite"),
        ([], "named fields"),
    ):
        with pytest.raises(ValueError, match=message):
            config_from_dict(Outer, data)


def test_the_wrong_class_or_option_is_an_error(folder, model):
    with pytest.raises(ValueError, match="holds a FSQ2D, not a FlexTok"):
        FlexTok.from_pretrained(folder)
    with pytest.raises(TypeError, match="no option 'colour'"):
        FSQ2D.from_pretrained(folder, colour=3)
    with pytest.raises(TypeError, match="FSQ2DConfig"):
        FSQ2D({"levels": (8, 5)})
    with pytest.raises(OSError, match="config.json"):
        FSQ2D.from_pretrained(folder.parent)


# -- threads -------------------------------------------------------------------------------------------------------------------------------


def test_two_threads_get_what_one_gets(model):
    images = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(6)]
    expected = [model.decode(model.encode(x)) for x in images]
    results = [None] * 6

    def work(start):
        for i in range(start, 6, 2):
            results[i] = model.decode(model.encode(images[i]))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
