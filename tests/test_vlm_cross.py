"""Mllama, BLIP-2 and InstructBLIP: fewer keys or query tokens, held against hiding the same ones in the unpruned model."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as T
from vlm_toys import BOS, IMAGE, PAD, SPECIAL, TEXT, spread

import vistok

GENERATION = {
    "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": SPECIAL,
}  # fmt: skip


def mllama():
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 16,
        "patch_size": 4, "vision_output_dim": 32, "intermediate_layers_indices": [0], "max_num_tiles": 2, "num_channels": 3,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = {**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = spread(T.MllamaForConditionalGeneration(T.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)))
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn_attn_gate"):
            torch.nn.init.ones_(layer.cross_attn_attn_gate)
            torch.nn.init.ones_(layer.cross_attn_mlp_gate)
    ids = torch.tensor([[BOS, IMAGE, 5, 6, 7, 8], [PAD, BOS, IMAGE, 9, 10, 11]])
    mask = (ids != PAD).long()
    cross = torch.zeros(2, 6, 1, 2, dtype=torch.int64)
    cross[0, 1:], cross[1, 2:, :, 0] = 1, 1  # the second image is one tile
    inputs = {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 1, 2, 3, 16, 16), "cross_attention_mask": cross,
        "aspect_ratio_ids": torch.tensor([[2], [1]]), "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
    }  # fmt: skip
    return model, inputs


def query_former(kind: str):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    former = {**vision, "encoder_hidden_size": 16, "vocab_size": 160}
    former = {name: value for name, value in former.items() if name not in ("image_size", "patch_size")}
    if kind == "blip2":
        text = T.OPTConfig(
            vocab_size=160, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2,
        )  # fmt: skip
        config_class, model_class = T.Blip2Config, T.Blip2ForConditionalGeneration
    else:
        text = T.LlamaConfig(**TEXT)
        config_class, model_class = T.InstructBlipConfig, T.InstructBlipForConditionalGeneration
    config = config_class(vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=12, image_token_index=IMAGE)
    config.image_token_id = IMAGE
    model = spread(model_class(config))
    torch.nn.init.normal_(model.query_tokens)
    model.language_model.generation_config.eos_token_id, model.language_model.generation_config.pad_token_id = None, PAD
    ids = torch.tensor([[*[IMAGE] * 12, BOS, 5, 6, 7], [PAD, PAD, *[IMAGE] * 12, BOS, 8]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    if kind == "instructblip":
        inputs |= {"qformer_input_ids": torch.tensor([[5, 6], [7, 8]]), "qformer_attention_mask": torch.ones(2, 2, dtype=torch.int64)}
    return model, inputs


def test_mllama_equals_hiding_the_keys_of_the_dropped_tokens_at_every_step():
    model, inputs = mllama()
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "divprune", keep_ratio=0.5) as pruned:
        result = model.generate(**inputs, **GENERATION)
        uncached = model.generate(**inputs, **GENERATION, use_cache=False)
    torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(result.logits), atol=1e-4, rtol=1e-4)
    assert pruned.stats().num_visual == (17,) * 4 and pruned.stats().num_kept == (9,) * 4
    assert result.past_key_values.layers[1].keys.shape[-2] == 2 * 9
    kept = {}

    def hide(text, args, kwargs):
        """Every token stays, the dropped ones are masked."""
        states, mask = kwargs["cross_attention_states"].reshape(4, 17, -1), kwargs["cross_attention_mask"]
        stays = torch.zeros(4, 17, dtype=torch.bool)
        stays[:, 0] = True
        stays[torch.arange(4)[:, None], pruned._select(states[:, 1:]) + 1] = True
        kept.update(stays=stays)
        kwargs["cross_attention_mask"] = mask.masked_fill(~stays.view(2, 1, 1, 34), torch.finfo(mask.dtype).min)
        return args, kwargs

    tokens = result.sequences[:, 6:-1]
    cross = torch.cat([inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:].expand(-1, 3, -1, -1)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], dim=1)
    whole = {
        **inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1), "cross_attention_mask": cross, "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }  # fmt: skip
    hook = model.model.language_model.register_forward_pre_hook(hide, with_kwargs=True)
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, 5:]
    hook.remove()
    torch.testing.assert_close(torch.stack(result.logits, dim=1), expected, atol=2e-4, rtol=2e-4)
    assert (torch.stack(plain.logits, dim=1)[:, 0] - expected[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_query_tokens_that_leave_equal_hidden_ones(kind):
    model, inputs = query_former(kind)
    with vistok.prune(model, "divprune", keep=5) as pruned:
        result = model.generate(**inputs, **GENERATION)
    assert pruned.stats().num_kept == (5, 5) and pruned.stats().pruned_length == 16 - 7
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :prompt], inputs["input_ids"])
    # the same prompt through the language model, whole, with the dropped tokens masked
    captured = {}
    original = type(model.language_model).generate
    model.language_model.__dict__["generate"] = lambda **kwargs: captured.update(kwargs) or original(model.language_model, **kwargs)
    plain = model.generate(**inputs, **GENERATION)
    del model.language_model.__dict__["generate"]
    _, rows = pruned.rewrite(captured["input_ids"], captured["inputs_embeds"], captured["attention_mask"])
    seen_mask = torch.zeros_like(inputs["attention_mask"]).scatter(1, rows.clamp(min=0), 1) * inputs["attention_mask"]
    tokens = result.sequences[:, prompt:-1]
    embeds = torch.cat([captured["inputs_embeds"], model.get_input_embeddings()(tokens)], dim=1)
    real = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    with torch.no_grad():
        expected = model.language_model(
            inputs_embeds=embeds, attention_mask=torch.cat([seen_mask, torch.ones_like(tokens)], dim=1),
            position_ids=(real.cumsum(dim=1) - 1).clamp(min=0), use_cache=False,
        ).logits[:, prompt - 1 :]  # fmt: skip
    torch.testing.assert_close(torch.stack(result.logits, dim=1), expected, atol=2e-4, rtol=2e-4)
    assert (torch.stack(plain.logits, dim=1)[:, 0] - expected[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("make", [mllama, lambda: query_former("blip2"), lambda: query_former("instructblip")])
def test_keeping_all_gives_identical_logits_and_the_model_gets_its_own_back(make):
    model, inputs = make()
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "uniform", keep_ratio=1.0):
        result = model.generate(**inputs, **GENERATION)
    assert torch.equal(result.sequences, plain.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(plain.logits))
    assert not any(module._forward_pre_hooks for module in model.modules())
    for module in (model, getattr(model, "language_model", model)):
        assert "generate" not in module.__dict__


def test_what_does_not_fit_is_refused_with_the_reason():
    model, inputs = mllama()
    with pytest.raises(ValueError, match="between the layers"):
        vistok.prune(model, "fastv", keep_ratio=0.5)
    with pytest.raises(ValueError, match="select by features"):
        vistok.prune(model, "visionzip", keep_ratio=0.5)
    with vistok.prune(model, "uniform", keep_ratio=0.5), pytest.raises(ValueError, match="already pruned"):
        vistok.prune(model, "uniform", keep_ratio=0.5)
    model, inputs = query_former("blip2")
    model.language_model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="relative positions"):
        vistok.prune(model, "uniform", keep_ratio=0.5)
