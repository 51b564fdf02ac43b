"""Pruning before the language model, held against masking the dropped tokens as keys of the unpruned model."""

import pytest
import torch

import vistok
from vistok.pruning.vlm import SUPPORTED

transformers = pytest.importorskip("transformers")

IMAGE, PAD = 150, 0
TEXT = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "depth": 2, "num_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
GENERATION = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
QUIET = {"suppress_tokens": [IMAGE, 148, 149, 151, 2]}


def llava():
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=16, **VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 16, 16)}, [16, 16, 16]


def internvl():
    vision = {"image_size": [16, 16], "patch_size": [2, 2], **VISION}
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
    )
    return transformers.InternVLForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 16, 16)}, [16, 16, 16]


def qwen2_vl():
    grid = torch.tensor([[1, 8, 8], [1, 6, 8], [1, 4, 8]])
    config = transformers.Qwen2VLConfig(
        vision_config={**QWEN, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, text_config={**TEXT, "rope_parameters": dict(ROPE)},
        image_token_id=IMAGE, video_token_id=151, vision_start_token_id=148, vision_end_token_id=149,
    )  # fmt: skip
    pixels = torch.randn(int(grid.prod(dim=1).sum()), 3 * 2 * 4 * 4)
    return transformers.Qwen2VLForConditionalGeneration(config), {"pixel_values": pixels, "image_grid_thw": grid}, [16, 12, 8]


def qwen2_5_vl():
    grid = torch.tensor([[1, 8, 8], [1, 6, 8], [1, 4, 8]])
    vision = {**QWEN, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**vision, "tokens_per_second": 2}, text_config={**TEXT, "rope_parameters": dict(ROPE)},
        image_token_id=IMAGE, video_token_id=151, vision_start_token_id=148, vision_end_token_id=149,
    )  # fmt: skip
    pixels = torch.randn(int(grid.prod(dim=1).sum()), 3 * 2 * 4 * 4)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), {"pixel_values": pixels, "image_grid_thw": grid}, [16, 12, 8]


def vipllava():
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=16, **VISION)
    config = transformers.VipLlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layers=[-1, -2]
    )
    return transformers.VipLlavaForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 16, 16)}, [16, 16, 16]


def mistral3():
    vision = transformers.PixtralVisionConfig(image_size=32, patch_size=4, head_dim=8, **VISION)
    text = transformers.MistralConfig(**TEXT, head_dim=8, sliding_window=None)
    config = transformers.Mistral3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, spatial_merge_size=2)
    sizes = torch.tensor([[32, 32], [24, 32], [32, 16]])
    return (
        transformers.Mistral3ForConditionalGeneration(config),
        {"pixel_values": torch.randn(3, 3, 32, 32), "image_sizes": sizes},
        [16, 12, 8],
    )


def idefics3(config_class=None, model_class=None):
    config = (config_class or transformers.Idefics3Config)(
        vision_config={"image_size": 16, "patch_size": 2, **VISION}, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[1, 1] = 0  # images of a row with fewer are padded with zeros
    return (model_class or transformers.Idefics3ForConditionalGeneration)(config), {"pixel_values": pixels}, [16, 16, 16]


def smolvlm():
    return idefics3(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration)


MODELS = {function.__name__: function for function in (llava, vipllava, internvl, qwen2_vl, qwen2_5_vl, mistral3, idefics3, smolvlm)}


def build(name):
    """A model of random weights and a batch of two prompts, the first with two images, the second with one and padding on the left."""
    torch.manual_seed(0)
    model, inputs, counts = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    first = [1, 5, 148, *[IMAGE] * counts[0], 149, 7, 148, *[IMAGE] * counts[1], 149, 9, 11]
    second = [1, 6, 148, *[IMAGE] * counts[2], 149, 8]
    length = max(len(first), len(second))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in (first, second)])
    inputs |= {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model.eval(), inputs


def masked_logits(model, inputs, rows, new_tokens):
    """Logits of the unpruned model for each new token, with the dropped tokens masked as keys and every token in its own place."""
    ids, steps = inputs["input_ids"], new_tokens.shape[1]
    seen = torch.zeros_like(ids).scatter(1, rows.clamp(min=0), 1) * inputs["attention_mask"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    positions = model._prepare_position_ids_for_generation(ids, {**rest, "attention_mask": inputs["attention_mask"]})
    later = positions[..., -1:] + 1 + torch.arange(steps - 1)
    if "mm_token_type_ids" in rest:
        kinds = rest["mm_token_type_ids"]
        rest["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(ids), steps - 1)], dim=1)
    with torch.no_grad():
        output = model(
            input_ids=torch.cat([ids, new_tokens[:, :-1]], dim=1),
            attention_mask=torch.cat([seen, seen.new_ones(len(ids), steps - 1)], dim=1),
            position_ids=torch.cat([positions, later], dim=-1),
            **rest,
        )
    return output.logits[:, -steps:]


@pytest.mark.parametrize("name", MODELS)
def test_pruning_equals_masking_the_dropped_tokens_in_the_unpruned_model(name):
    model, inputs = build(name)
    plain = model.generate(**inputs, **GENERATION, **QUIET)
    with vistok.prune(model, "divprune", keep_ratio=0.5) as pruned:
        rows = pruned.rewrite(**inputs)[1]
        result = model.generate(**inputs, **GENERATION, **QUIET)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :length], inputs["input_ids"])
    expected = masked_logits(model, inputs, rows, result.sequences[:, length:])
    torch.testing.assert_close(torch.stack(result.logits, dim=1), expected, atol=2e-4, rtol=2e-4)
    assert (torch.stack(plain.logits, dim=1)[:, 0] - expected[:, 0]).abs().max() > 1e-2  # the comparison has power
    report = pruned.stats()
    assert [2 * kept for kept in report.num_kept] == list(report.num_visual)
    assert result.past_key_values.get_seq_length() == report.pruned_length + 2 < length


@pytest.mark.parametrize("name", MODELS)
def test_keeping_every_visual_token_gives_the_same_logits_and_text(name):
    model, inputs = build(name)
    plain = model.generate(**inputs, **GENERATION, **QUIET)
    with vistok.prune(model, "dart", keep_ratio=1.0):
        result = model.generate(**inputs, **GENERATION, **QUIET)
    assert torch.equal(result.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)


def test_beams_and_plain_tensors_come_back_with_the_original_prompt():
    model, inputs = build("llava")
    with vistok.prune(model, "random", keep=3, seed=4):
        sequences = model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2, do_sample=False, **QUIET)
        again = model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2, do_sample=False, **QUIET)
    assert torch.equal(sequences, again)
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, dim=0))


def test_the_model_gets_its_own_generate_back_after_an_exception():
    model, inputs = build("llava")
    with pytest.raises(KeyError), vistok.prune(model, "uniform", keep=3):
        raise KeyError
    assert "generate" not in model.__dict__ and not model._forward_pre_hooks
    first = vistok.prune(model, "uniform", keep=3)
    with pytest.raises(ValueError, match="already pruned"):
        vistok.prune(model, "uniform", keep=3)
    first.remove()


def test_what_would_silently_not_be_pruned_is_refused():
    model, inputs = build("llava")
    with vistok.prune(model, "uniform", keep=3) as pruned:
        with pytest.raises(RuntimeError, match="plain forward"):
            model(**inputs)
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(**inputs, max_length=60)
        with pytest.raises(RuntimeError, match="no generate"):
            pruned.stats()
    with pytest.raises(ValueError, match="there are divprune"):
        vistok.prune(model, "tome", keep=3)
    with pytest.raises(ValueError, match="either keep"):
        vistok.prune(model, "uniform")


def test_an_unsupported_family_is_refused_with_the_ones_that_work():
    config = transformers.LlamaConfig(**TEXT)
    assert set(MODELS) == set(SUPPORTED)
    with pytest.raises(ValueError, match=SUPPORTED[0]):
        vistok.prune(transformers.LlamaForCausalLM(config), "divprune", keep=3)
