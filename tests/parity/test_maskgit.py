"""The MaskGIT generator of TiTok against tensors of the reference implementation, read through the official checkpoint format."""

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.maskgit import from_official, to_official

FAMILY = "maskgit"
INPUTS = {"ids_masked", "classes"}


@pytest.fixture(scope="module")
def model(golden):
    return from_official(golden.folder / "state.safetensors", num_heads=golden.spec["hyper"]["heads"])


def test_the_converted_config_says_what_the_case_says(model, golden):
    settings = model.settings
    known = {
        "hidden": settings.width, "layers": settings.depth, "heads": settings.num_heads, "inter": settings.hidden,
        "seq": model.max_tokens, "codebook": settings.codebook_size, "classes": settings.num_classes,
    }  # fmt: skip
    assert {name: value for name, value in golden.spec["hyper"].items() if name != "B"} == known


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    golden.check_weights(load_file(tmp_path / "model.safetensors"))
    assert from_official(tmp_path).settings == model.settings


def test_logits(model, golden):
    ids, labels = golden.io["ids_masked"], golden.io["classes"]
    with torch.no_grad():
        results = {"logits": model(ids, model.make_condition(len(ids), labels=labels)), "logits_uncond": model(ids)}
    assert set(golden.io) == INPUTS | set(results) == set(golden.spec["tensors"])
    for name, value in results.items():
        golden.compare(name, value)
