"""ACT, IMA skipping and Recycled Attention on stock models, held against slow versions of the same."""

import pytest
import torch

pytest.importorskip("transformers")

from vlm_toys import IMAGE, SPECIAL, build

import vistok
from vistok.pruning.families import attention_of, text_model
from vistok.pruning.methods.act import act

GENERATION = {
    "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": SPECIAL,
}  # fmt: skip
ACT = {"heads": {1: [0, 3], 2: [2]}, "beta": 0.3, "threshold": 0.05}


def logits_of(model, inputs, **options):
    return torch.stack(model.generate(**inputs, **GENERATION, **options).logits, dim=1)


def alone(inputs):
    """The first row, which has no padding."""
    return {name: inputs[name][:1] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][:2]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_act_gives_what_the_function_gives_on_the_eager_maps(attention):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    calibrated = []

    def reference(module, query, key, value, attention_mask, scaling, **options):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        weights = (query @ key.transpose(-2, -1) * scaling + attention_mask).softmax(dim=-1)
        if module.layer_idx in ACT["heads"]:
            before = weights
            weights = act(weights, beta=ACT["beta"], threshold=ACT["threshold"], heads=ACT["heads"][module.layer_idx])
            calibrated.append(bool((weights != before).any()))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("act_reference", reference)
    AttentionMaskInterface.register("act_reference", eager_mask)
    model, inputs = build("llava", attention=attention)
    single = alone(inputs)
    with vistok.prune(model, "act", **ACT), torch.no_grad():
        result = model(**single).logits
    with torch.no_grad():
        plain = model(**single).logits
        model.model.language_model.set_attn_implementation("act_reference")
        expected = model(**single).logits
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("act_reference")
    assert all(calibrated)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-3


def test_act_with_nothing_to_turn_down_changes_nothing_and_padding_does_not_count():
    model, inputs = build("llava")
    plain = logits_of(model, inputs)
    with vistok.prune(model, "act", **{**ACT, "beta": 1.0}):
        torch.testing.assert_close(logits_of(model, inputs), plain, atol=1e-4, rtol=1e-4)
    row = {name: inputs[name][1:, 20:] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][2:]}
    with vistok.prune(model, "act", **ACT):
        both, one = logits_of(model, inputs), logits_of(model, row)
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-4)
    assert (both - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_ima_equals_adding_nothing_to_the_visual_tokens(name):
    model, inputs = build(name)
    is_visual = (inputs["input_ids"] == IMAGE)[..., None]
    rows = []
    with vistok.prune(model, "ima", start=0, interval=2) as skipping:
        assert skipping.skipped == (2,)
        hook = text_model(model).layers[2].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
        result = logits_of(model, inputs)
        hook.remove()
    assert rows[0] == int((~is_visual).sum())  # the others are not computed at all

    def nothing(module, args, output):
        return output.masked_fill(is_visual, 0) if output.shape[1] == is_visual.shape[1] else None

    hook = text_model(model).layers[2].mlp.register_forward_hook(nothing)
    expected = logits_of(model, inputs)
    hook.remove()
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert (result - logits_of(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_recycling_with_only_full_steps_or_every_token_changes_nothing(name):
    model, inputs = build(name)
    plain = logits_of(model, inputs)
    with vistok.prune(model, "recycled", keep=4, period=1):
        assert torch.equal(logits_of(model, inputs), plain)
    with vistok.prune(model, "recycled", keep=1000, period=3):
        torch.testing.assert_close(logits_of(model, inputs), plain, atol=1e-4, rtol=1e-4)


def test_between_full_steps_a_step_sees_the_best_tokens_of_the_last_full_one_and_the_new_ones():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, inputs = build("llava", attention="eager")
    single, keep, period = alone(inputs), 6, 3
    with vistok.prune(model, "recycled", keep=keep, period=period):
        result = model.generate(**single, **GENERATION)
    tokens, length = result.sequences, single["input_ids"].shape[1]
    chosen = {}

    def weights_of(module, kwargs, cached):
        """[2 groups, L] of the only query, mean over the heads of a group."""
        query, key = (f(kwargs["hidden_states"]).view(1, 1, -1, 8).transpose(1, 2) for f in (module.q_proj, module.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        keys = torch.cat([cached, key], dim=2).repeat_interleave(2, dim=1)
        return (query @ keys.transpose(-2, -1) * module.scaling).softmax(dim=-1)[0, :, 0].view(2, 2, -1).mean(dim=1)

    def hide(module, args, kwargs):
        """The whole cache stays; between full steps, keys that are neither among the best of their group nor new are masked."""
        cached, number = kwargs["past_key_values"].layers[module.layer_idx].keys, module.layer_idx
        size = cached.shape[2] + 1
        if (size - 1 - length) % period == 0:
            best = weights_of(module, kwargs, cached).topk(keep, dim=-1).indices
            chosen[number] = torch.zeros(2, size, dtype=torch.bool).scatter(1, best, True)
            return None
        known = chosen[number]
        seen = torch.cat([known, known.new_ones(2, size - known.shape[1])], dim=1).repeat_interleave(2, dim=0)
        kwargs["attention_mask"] = torch.zeros(1, 4, 1, size).masked_fill(~seen[None, :, None], -1e30)
        return args, kwargs

    with torch.no_grad():
        output = model(**single, use_cache=True)
        logits = [output.logits[:, -1]]
        hooks = [attention_of(layer).register_forward_pre_hook(hide, with_kwargs=True) for layer in text_model(model).layers]
        for place in range(length, tokens.shape[1] - 1):
            step = {"input_ids": tokens[:, place : place + 1], "position_ids": torch.tensor([[place]])}
            output = model(**step, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.stack(result.logits, dim=1), torch.stack(logits, dim=1), atol=2e-4, rtol=2e-4)


def test_bad_options_are_refused_and_the_model_gets_its_own_back():
    model, inputs = build("llava")
    with pytest.raises(ValueError, match="beta=2"):
        vistok.prune(model, "act", **{**ACT, "beta": 2})
    with pytest.raises(ValueError, match="there are 4 layers of 4"):
        vistok.prune(model, "act", **{**ACT, "heads": {1: [4]}})
    with pytest.raises(ValueError, match="there are 4 layers"):
        vistok.prune(model, "ima", start=3, end=2)
    with pytest.raises(ValueError, match="keep=0"):
        vistok.prune(model, "recycled", keep=0)
    with vistok.prune(model, "recycled", keep=3), pytest.raises(ValueError, match="static cache"):
        model.generate(**inputs, **GENERATION, cache_implementation="static")
    with (
        vistok.prune(model, "fastv", layer=1, keep_ratio=0.5),
        vistok.prune(model, "ima"),
        pytest.raises(RuntimeError, match="go together"),
    ):
        model.generate(**inputs, **GENERATION)
    for module in text_model(model).modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "_vistok_tap" not in module.__dict__
