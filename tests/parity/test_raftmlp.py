"""RaftMLP against the reference, at the training resolution and off it."""

import torch
from safetensors.torch import load_file

from vistok.pruning.backbones.raftmlp import RaftMLP, RaftMLPConfig, from_official, to_official

FAMILY = "raftmlp"


def build(golden):
    config = RaftMLPConfig.from_dict(golden.spec["config"])
    model = RaftMLP(config).eval()
    model.load_state_dict(from_official(load_file(golden.folder / "state.safetensors"), config))
    return model


def test_every_level_and_the_logits_match(golden):
    model = build(golden)
    inputs = {name.split(".")[0] for name in golden.io if name.endswith(".x")}
    assert inputs == set(golden.spec["inputs"]) == {name.split(".")[0] for name in golden.io}
    for name in inputs:
        with torch.no_grad():
            maps = model.forward_features(golden.io[f"{name}.x"])
            results = {f"{name}.level{i}": x for i, x in enumerate(maps)}
            results[f"{name}.logits"] = model.forward_head(maps)
        golden.check(name, results, inputs=(f"{name}.x", f"{name}.fp64_err"))


def test_official_names_survive_a_round_trip(golden):
    state, config = load_file(golden.folder / "state.safetensors"), RaftMLPConfig.from_dict(golden.spec["config"])
    back = to_official(from_official(state, config), config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
