"""Strip-MLP against the reference, with the parts of its blocks."""

import re

import torch
from safetensors.torch import load_file

from vistok.pruning.backbones.stripmlp import StripMLP, StripMLPConfig, from_official, to_official

FAMILY = "stripmlp"
PARTS = {"dwsc": "local", "strip_block": "strip", "mlp": "strip.project", "cgsmm": "strip.strips", "channel_mixing": "channel", "out": ""}


def config_of(golden):
    config = golden.spec["config"]
    return StripMLPConfig(**{**config, "layers": tuple(config["layers"])})


def where(name):
    """Our module of a tensor that the reference recorded."""
    block = re.fullmatch(r"blocks([1-4])\.(\d+)\.(\w+)", name)
    if block:
        stage, index, part = int(block[1]) - 1, block[2], PARTS[block[3]]
        return f"stages.{stage}.{index}.{part}".rstrip(".")
    merging = re.fullmatch(r"merging([1-3])", name)
    assert merging, f"{name} is not understood by this test"
    return f"down.{int(merging[1]) - 1}"


def test_blocks_features_and_logits_match(golden):
    model = StripMLP(config_of(golden)).eval()
    model.load_state_dict(from_official(load_file(golden.folder / "state.safetensors"), config_of(golden)))
    results = {}
    for name in set(golden.io) - {"x", "logits", "features", "fp64_err"}:
        model.get_submodule(where(name)).register_forward_hook(lambda *args, name=name: results.update({name: args[-1]}))
    with torch.no_grad():
        normalised = model.forward_features(golden.io["x"])
        results["features"] = model.forward_head(normalised, pre_logits=True)
        results["logits"] = model.forward_head(normalised)
    assert set(results) >= set(golden.io) - {"x", "fp64_err"}
    for name in set(golden.io) - {"x", "fp64_err"}:
        golden.compare(name, results[name])


def test_official_names_survive_a_round_trip(golden):
    state = load_file(golden.folder / "state.safetensors")
    back = to_official(from_official(state, config_of(golden)), config_of(golden))
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
