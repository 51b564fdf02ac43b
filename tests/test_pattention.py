"""Layers made of parameter tokens, and their growth."""

import pytest
import torch

import vistok
from vistok.convert.llamagen import official_state
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


@pytest.mark.parametrize("proj_tokens", [None, 5])
@torch.no_grad()
def test_a_grown_block_gives_the_same_with_and_without_its_cache(proj_tokens):
    torch.manual_seed(0)
    block, x = PattentionBlock(32, 2, num_tokens=8, mlp_tokens=16, proj_tokens=proj_tokens), torch.randn(2, 6, 32)
    assert len(block.attention.proj.keys) == (proj_tokens or 8)
    before = block(x)
    block.grow(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), before, atol=1e-5, rtol=0)
    cache, rows = block.new_cache(2, 6), []
    for part in x.split([3, 1, 2], dim=1):
        rows.append(block(part, start=cache.length, cache=cache.layer(0)))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(rows, 1), before, atol=1e-5, rtol=0)


def test_the_optimizer_keeps_its_moments_and_takes_over_the_new_tokens():
    layer, x = build()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()

    step()
    before = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in layer.named_parameters()}
    layer.grow(3, generator=torch.Generator().manual_seed(1), optimizer=optimizer)
    for name, parameter in layer.named_parameters():
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"][:12], before[name]) and state["exp_avg"][12:].abs().max() == 0 and state["step"] == 1
    assert [len(group["params"]) for group in optimizer.param_groups] == [2] and len(optimizer.state) == 2
    values = layer.keys.detach().clone()
    step()
    assert (layer.keys[12:] != values[12:]).any()


# as the blocks of a GPT


def gpt(**overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("gpt-tiny", mixing="pattention", num_classes=3, layout_shape=(4, 4), **overrides).eval()


@torch.no_grad()
def test_a_gpt_of_parameter_tokens_gives_the_same_with_its_cache_and_sees_no_later_token():
    model, ids = gpt(), torch.randint(200, (2, 15), generator=torch.Generator().manual_seed(0))
    assert not any(isinstance(part, torch.nn.Linear) for block in model.blocks for part in block.modules())
    condition, cache = model.make_condition(2, labels=[0, 1]), model.new_cache(2)
    expected = model(ids, condition)
    parts = [model(ids[:, :3], condition, cache=cache)] + [model(ids[:, n : n + 1], cache=cache) for n in range(3, 15)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)
    changed = ids.clone()
    changed[:, 9:] = 0
    assert torch.equal(model(changed, condition)[:, :10], expected[:, :10])


@torch.no_grad()
def test_a_grown_gpt_is_the_same_function_saved_and_loaded_too(tmp_path):
    model, ids = gpt(parameter_tokens=24, mlp_parameter_tokens=48), torch.arange(15)[None]
    before = model(ids, model.make_condition(1, labels=[2]))
    model.grow(8, generator=torch.Generator().manual_seed(0))
    model.grow(4, 6, generator=torch.Generator().manual_seed(0))
    after = model(ids, model.make_condition(1, labels=[2]))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert model.settings.parameter_tokens == 36 and model.settings.mlp_parameter_tokens == 48 + 16 + 6
    assert model.config["parameter_tokens"] == 36
    model.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again(ids, again.make_condition(1, labels=[2])), after)


def test_a_grown_gpt_trains_on():
    model, ids = gpt(parameter_tokens=16, mlp_parameter_tokens=16).train(), torch.arange(16)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1], model.make_condition(1)).flatten(0, 1), ids[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = [step() for _ in range(10)]
    model.grow(8, generator=torch.Generator().manual_seed(0), optimizer=optimizer)
    losses += [step() for _ in range(10)]
    assert losses[10] < losses[9] < losses[0] and losses[-1] < 0.7 * losses[9]
    assert all(block.mlp.keys[16:].abs().sum() > 0 for block in model.blocks)


def test_what_cannot_grow_says_so():
    with pytest.raises(ValueError, match="can grow"):
        vistok.create("gpt-tiny").grow(4)
    with pytest.raises(ValueError, match="mixing"):
        vistok.create("gpt-tiny", parameter_tokens=4)
    with pytest.raises(ValueError, match="negative"):
        gpt(parameter_tokens=-1)
    with pytest.raises(ValueError, match="has no form"):
        official_state(gpt())
