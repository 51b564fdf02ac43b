"""Token reduction in the vision models of transformers, built tiny from their own classes."""

import pytest
import torch
import transformers as tf

import vistok
from vistok.pruning import STRATEGIES
from vistok.pruning.blocks import parts_of
from vistok.pruning.vit import prune_vit

COMMON = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
VISION = dict(**COMMON, intermediate_size=48)
FAMILIES = {
    "CLIP": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)),
    "CLIP with projection": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION, projection_dim=8)),
    "SigLIP": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
    "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)),
    "DINOv2": lambda: tf.Dinov2Model(tf.Dinov2Config(**COMMON, mlp_ratio=2)),
    "DINOv2 with registers": lambda: tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2, num_register_tokens=3)
    ),
    "DINOv3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**VISION, num_register_tokens=2, layerscale_value=0.5)),
}


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def outputs(model, x):
    """Every tensor a model returns for pixels, by name."""
    return {name: value for name, value in model(pixel_values=x).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tower_is_reduced_and_left_as_it_was(family):
    model, x = build(family), images()
    prefix = parts_of(model).num_prefix
    expected = outputs(model, x)
    for method in [name for name in STRATEGIES if name not in ("cls", "diffrate") or prefix]:
        options = {"zero_tprune": {"num_similar": 2}, "diffrate": {}}.get(method, {"keep": 7})
        with vistok.prune(model, method, **options) as pruned:
            reduced = outputs(model, x)
        counts = pruned.stats().num_tokens
        assert counts[0] == 16 + prefix and counts[-1] < counts[0] and pruned.stats().macs_ratio < 1
        assert torch.equal(pruned.plan.keep[:, :prefix], torch.arange(prefix).expand(2, -1))
        assert any(not torch.equal(reduced[name], value) for name, value in expected.items() if reduced[name].shape == value.shape)
    for name, value in outputs(model, x).items():
        assert torch.equal(value, expected[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_every_token_changes_no_bit_of_a_tower(family, attention):
    model, x = build(family), images()
    model.set_attn_implementation(attention)
    expected = outputs(model, x)
    for method, options in (("tome", {"r": 0}), ("pitome", {"layer_keep_ratio": 1.0}), ("random", {"keep": 16})):
        with vistok.prune(model, method, restore=True, **options):
            for name, value in outputs(model, x).items():
                assert torch.equal(value, expected[name])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("CLIP with projection", "ViT")])
def test_dropping_is_masking_the_dropped_patches_as_keys_from_the_next_layer_on(family):
    model, x = build(family), images()
    tower, parts = parts_of(model).tower, parts_of(model)
    seen = {}
    handle = parts.blocks[0].block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0], kwargs=kwargs), with_kwargs=True
    )
    with vistok.prune(model, "uniform", r=[6]) as pruned:
        reduced = tower(x).last_hidden_state
    handle.remove()
    keep = pruned.plan.keep
    bias = torch.full((2, 1, 1, seen["x"].shape[1]), torch.finfo(torch.float32).min).scatter(3, keep[:, None, None], 0.0)
    hidden, rest = seen["x"], {name: value for name, value in seen["kwargs"].items() if name not in ("attention_mask", "hidden_states")}
    for number, part in enumerate(parts.blocks):
        hidden = part.block(hidden, attention_mask=None if number == 0 else bias, **rest)
    norm = next(getattr(tower, name) for name in ("post_layernorm", "layernorm", "norm") if hasattr(tower, name))
    expected = norm(hidden) if family != "CLIP" else hidden
    torch.testing.assert_close(reduced, expected.gather(1, keep[..., None].expand(-1, -1, 32)), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "DINOv2"])
def test_merging_copies_of_a_patch_loses_nothing_in_a_tower(family):
    model = build(family)
    for name, parameter in model.named_parameters():
        if "position" in name:
            torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 3, 4, 1).repeat_interleave(4, 2).expand(-1, -1, -1, 16).contiguous()
    expected = outputs(model, x)
    with vistok.prune(model, "tome", r=[8, 4], restore=True):
        for name, value in outputs(model, x).items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=2e-4)


def test_a_restored_tower_feeds_a_vision_language_model_its_whole_grid():
    from vistok.training.tasks.vlm import SceneVLMConfig, scene_processor, scene_vlm

    shape = SceneVLMConfig(tower_width=16, tower_depth=2, tower_heads=2, width=32, depth=2, num_heads=2, num_key_value_heads=1, hidden=64)
    torch.manual_seed(0)
    model = scene_vlm(shape, scene_processor(shape)).eval()
    ids = torch.tensor([[1, *[model.config.image_token_id] * 64, 7, 8]])
    pixels = torch.randn(1, 3, 64, 64)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    tower = model.model.vision_tower
    with prune_vit(tower, "tome", keep_ratio=0.5, restore=True) as pruned:
        logits = model(input_ids=ids, pixel_values=pixels).logits
        states = tower(pixels, output_hidden_states=True)
    assert logits.shape == expected.shape and not torch.equal(logits, expected)
    assert pruned.stats().num_tokens == (65, 49, 33) and [x.shape[1] for x in states.hidden_states] == [65, 65, 65]
    assert torch.equal(states.hidden_states[-1], states.last_hidden_state)


def test_a_head_that_averages_patches_sees_all_of_them():
    config = tf.Dinov2Config(**COMMON, mlp_ratio=2, num_labels=3)
    torch.manual_seed(0)
    model = tf.Dinov2ForImageClassification(config).eval()
    with vistok.prune(model, "tome", keep_ratio=0.5) as pruned:
        logits = model(pixel_values=images()).logits
        tokens = model.dinov2(images()).last_hidden_state
    assert tokens.shape[1] == 17 and pruned.stats().num_tokens[-1] == 9
    torch.testing.assert_close(logits, model.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)))
    with pytest.raises(ValueError, match="averages all patches"):
        vistok.prune(model, "random", keep=8)


def test_models_without_a_tower_and_kernels_without_masks_are_refused():
    model = build("CLIP")
    parts_of(model).blocks[0].attention.config._attn_implementation = "flash_attention_2"  # as on a GPU that has it
    with pytest.raises(ValueError, match="takes no additive mask"):
        vistok.prune(model, "tome", r=2)
    vistok.prune(model, "tome", r=2, is_proportional=False).remove()
    bert = tf.BertModel(tf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10))
    with pytest.raises(ValueError, match="no vision tower"):
        prune_vit(bert, "tome", r=2)
    with pytest.raises(ValueError, match="restore is for models of transformers"):
        import timm

        prune_vit(timm.create_model("vit_tiny_patch16_224", depth=1), "tome", r=2, restore=True)
