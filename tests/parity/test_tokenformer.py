"""Pattention and TokenFormer's block against tensors of the reference implementation; every tensor of every case is checked."""

import math

import pytest
import torch
from safetensors.torch import load_file

from vistok.layers.pattention import ACTIVATIONS, Pattention, PattentionBlock

FAMILY = "tokenformer"
INPUTS = {"pattention.x", "pattention.mask", "pattention.router_index", "growth.new_keys_random", "growth.new_values"}


@pytest.fixture(scope="module")
def state(golden):
    state = load_file(golden.folder / "state.safetensors")
    return {name.replace("key_param_tokens", "keys").replace("value_param_tokens", "values"): value for name, value in state.items()}


def layer(keys, values, activation, scale=1.0, norm_tokens=None):
    """norm_tokens: the n in tau; all of them, as in the reference, by default."""
    out = Pattention(keys.shape[1], values.shape[1], len(keys), activation=activation, scale=scale)
    out.load_state_dict({"keys": keys, "values": values, "norm_tokens": torch.tensor(norm_tokens or len(keys))})
    return out


def appended(golden, state, keys, values):
    return torch.cat([state["pattention.keys"], keys]), torch.cat([state["pattention.values"], values])


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    groups = {name.split(".")[0] for name in golden.io if name not in INPUTS}
    assert groups <= {*ACTIVATIONS, "layer"} and set(golden.spec["tensors"]) == set(golden.io)
    assert set(golden.spec["config"]) == {"pattention", "layer"}


def test_the_sizes_are_those_of_the_case(golden, state):
    config = golden.spec["config"]["pattention"]
    n, m = config["tokens"], config["grow_by"]
    assert state["pattention.keys"].shape == (n, config["in_dim"]) and state["pattention.values"].shape == (n, config["out_dim"])
    assert golden.io["pattention.x"].shape == (config["seq"], config["batch"], config["in_dim"])
    assert golden.io["growth.new_values"].shape == (m, config["out_dim"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pattention_and_the_reference_way_to_grow(golden, state, activation):
    io, keys, values = golden.io, state["pattention.keys"], state["pattention.values"]
    x, new_values = io["pattention.x"], io["growth.new_values"]
    zeros = torch.zeros_like(io["growth.new_keys_random"])
    plain = layer(keys, values, activation)
    zero_keys = layer(*appended(golden, state, zeros, new_values), activation)
    out = zero_keys(x)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), [zero_keys.keys, zero_keys.values])
    results = {
        "out": plain(x),
        "out_scale": layer(keys, values, activation, scale=1 / math.sqrt(x.shape[-1]))(x),
        "out_mask": plain(x, mask=io["pattention.mask"]),
        "out_router": plain(x, tokens=io["pattention.router_index"]),
        "grown_zero_keys": out,
        "grown_zero_both": layer(*appended(golden, state, zeros, torch.zeros_like(new_values)), activation)(x),
        "grown_random": layer(*appended(golden, state, io["growth.new_keys_random"], new_values), activation)(x),
        "grad_key_grown_zero": grads[0],
        "grad_value_grown_zero": grads[1],
    }
    golden.check(activation, {f"{activation}.{name}": value for name, value in results.items()})


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_growth_with_the_old_tau_gives_the_output_before_growth(golden, state, activation):
    zeros = torch.zeros_like(golden.io["growth.new_keys_random"])
    grown = layer(*appended(golden, state, zeros, golden.io["growth.new_values"]), activation, norm_tokens=len(state["pattention.keys"]))
    golden.compare(f"{activation}.out", grown(golden.io["pattention.x"]))


@torch.no_grad()
def test_block(golden, state):
    config = golden.spec["config"]["layer"]
    block = PattentionBlock(
        config["hidden"],
        config["heads"],
        num_tokens=config["qkv_tokens"],
        proj_tokens=config["proj_tokens"],
        mlp_tokens=config["ffn_tokens"],
        activation=config["norm_activation_type"],
        rotary_share=config["rotary_pct"],
        rotary_base=config["rotary_base"],
        norm_eps=config["norm_eps"],
    )
    ours = block.state_dict()
    for name, value in state.items():
        if name.startswith("layer."):
            ours[name.removeprefix("layer.")] = value
    block.load_state_dict(ours)
    x = golden.io["layer.x"].transpose(0, 1)  # the reference has the sequence first
    cache, rows = block.new_cache(len(x), config["max_seq"]), []
    prefill = min(5, x.shape[1])
    for part in x.split([prefill, *[1] * (x.shape[1] - prefill)], dim=1):
        rows.append(block(part, start=cache.length, cache=cache.layer(0)))
        cache.advance(part.shape[1])
    results = {"layer.out": block(x).transpose(0, 1), "layer.out_cached": torch.cat(rows, dim=1).transpose(0, 1)}
    golden.check("layer", results, inputs=("layer.x",))
