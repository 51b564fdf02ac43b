"""RAR against tensors of the reference implementation, read through the official checkpoint format."""

import re

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.rar import from_official, to_official

FAMILY = "rar"
INPUTS = {"ids", "classes", "orders", "cond_ids", "none_ids"}


def guidance(golden):
    """Scale and power of the case's guidance schedule."""
    found = re.search(r"guidance_scale (\d+(?:\.\d+)?), pow (\d+(?:\.\d+)?)", golden.what("sample.cfg_scale"))
    assert found, "case.json does not say the scale and the power of the guidance"
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def model(golden):
    return from_official(golden.folder / "state.safetensors", guidance_power=guidance(golden)[1])


@pytest.fixture(scope="module")
def condition(golden, model):
    return model.make_condition(len(golden.io["ids"]), labels=golden.io["classes"])


def test_every_tensor_of_the_case_is_known(golden):
    known = INPUTS | {"train.logits", "train.labels", "raster.logits", "uncond.logits", "sample.step_logits", "sample.cfg_scale"}
    assert set(golden.io) <= known and set(golden.io) == set(golden.spec["tensors"])


def test_the_converted_config_says_what_the_case_says(model, golden):
    settings = model.settings
    known = {
        "hidden": settings.width, "layers": settings.depth, "heads": settings.num_heads, "inter": settings.hidden,
        "seq": model.max_tokens, "codebook": settings.codebook_size, "classes": settings.num_classes,
    }  # fmt: skip
    assert {name: value for name, value in golden.spec["hyper"].items() if name != "B"} == known


def test_class_rows(model, golden, condition):
    golden.compare("cond_ids", model._class_rows(condition))
    golden.compare("none_ids", model._class_rows(condition.null()))


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    golden.check_weights(load_file(tmp_path / "model.safetensors"))
    assert from_official(tmp_path, guidance_power=model.settings.guidance_power).settings == model.settings


def test_training_logits_in_any_order(model, golden, condition):
    io = golden.io
    visited = io["ids"].gather(1, io["orders"])
    golden.compare("train.labels", visited)
    with torch.no_grad():
        golden.compare("train.logits", model(visited, condition, orders=io["orders"]))


def test_raster_logits(model, golden, condition):
    with torch.no_grad():
        golden.compare("raster.logits", model(golden.io["ids"], condition))
        golden.compare("uncond.logits", model(golden.io["ids"]))


def test_cached_sampling_logits(model, golden, condition):
    ids = golden.io["ids"]
    cache = model.new_cache(len(ids))
    with torch.no_grad():
        steps = [model(ids[:, :0], condition, cache=cache)[:, -1]]
        steps += [model(ids[:, j : j + 1], cache=cache)[:, -1] for j in range(ids.shape[1] - 1)]
    golden.compare("sample.step_logits", torch.stack(steps, dim=1))


def test_guidance_schedule(model, golden):
    schedule = model.guidance_schedule(guidance(golden)[0])
    golden.compare("sample.cfg_scale", torch.tensor([schedule(step) for step in range(model.max_tokens)]))
