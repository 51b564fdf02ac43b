"""Layers made of parameter tokens, and their growth."""

import pytest
import torch

from vistok.layers.pattention import Pattention, PattentionBlock

GROWING = ("l2_norm_gelu", "gelu_l2_norm")


def build(activation="l2_norm_gelu", num_tokens=12):
    torch.manual_seed(0)
    out = Pattention(6, 5, num_tokens, activation=activation)
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter)
    return out, torch.randn(2, 3, 6)


@pytest.mark.parametrize("activation", GROWING)
def test_growing_twice_preserves_the_function(activation):
    layer, x = build(activation)
    before = layer(x)
    for num_new in (7, 30):
        layer.grow(num_new, generator=torch.Generator().manual_seed(1), std=1.0)
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)
    assert layer.num_tokens == 49 and int(layer.norm_tokens) == 12


@pytest.mark.parametrize("activation", GROWING)
def test_new_tokens_learn(activation):
    layer, x = build(activation)
    layer.grow(4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # keys move first; values once the keys are not zero
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    assert layer.keys.grad[12:].abs().min() > 0 and layer.values.grad[12:].abs().sum() > 0


def test_a_grown_layer_is_itself_after_saving_and_loading():
    layer, x = build()
    layer.grow(4)
    again = Pattention(6, 5, 16)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_the_generator_decides_the_new_values():
    grown = []
    for _ in range(2):
        layer, _ = build()
        layer.grow(3, generator=torch.Generator().manual_seed(5))
        grown.append(layer.values)
    assert torch.equal(*grown)


def test_choosing_all_tokens_of_a_grown_layer_changes_nothing():
    layer, x = build()
    layer.grow(4)
    torch.testing.assert_close(layer(x, tokens=torch.arange(16)), layer(x))


@pytest.mark.parametrize("activation", GROWING)
def test_a_zero_input_gives_zero_with_finite_gradients(activation):
    layer, _ = build(activation)
    x = torch.zeros(1, 2, 6, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and x.grad.isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="softmax"):
        build("softmax")[0].grow(1)
    with pytest.raises(ValueError, match="num_new"):
        build()[0].grow(0)
    with pytest.raises(ValueError, match="allowed"):
        Pattention(4, 4, 4, activation="relu")
    with pytest.raises(ValueError, match="multiple"):
        PattentionBlock(10, 4, num_tokens=4, mlp_tokens=4)
    with pytest.raises(ValueError, match="odd"):
        PattentionBlock(24, 2, num_tokens=4, mlp_tokens=4)


@torch.no_grad()
def test_a_grown_block_gives_the_same_with_and_without_its_cache():
    torch.manual_seed(0)
    block, x = PattentionBlock(32, 2, num_tokens=8, mlp_tokens=16), torch.randn(2, 6, 32)
    before = block(x)
    block.grow(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), before, atol=1e-5, rtol=0)
    cache, rows = block.new_cache(2, 6), []
    for part in x.split([3, 1, 2], dim=1):
        rows.append(block(part, start=cache.length, cache=cache.layer(0)))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(rows, 1), before, atol=1e-5, rtol=0)
