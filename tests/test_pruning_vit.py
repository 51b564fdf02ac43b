import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

import vistok
from vistok.pruning import STRATEGIES

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
FAMILIES = {
    "plain": lambda: VisionTransformer(**SMALL),
    "layer scale": lambda: VisionTransformer(**SMALL, init_values=0.3),
    "qk norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=4),
    "mean pooling": lambda: VisionTransformer(**SMALL, global_pool="avg", class_token=False),
    "attention pooling": lambda: VisionTransformer(**SMALL, global_pool="map", class_token=False),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "rotary": lambda: Eva(**SMALL, use_rot_pos_emb=True, init_values=0.5),
    "mixed rotary": lambda: Eva(**SMALL, use_rot_pos_emb=True, rope_type="mixed"),
    "DINOv3": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, num_reg_tokens=4, use_abs_pos_emb=False, rope_type="dinov3", rope_rotate_half=True
    ),
}


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():  # away from the initial values, where branches do nothing and norms are the identity
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_vit_is_reduced_and_left_as_it_was(family):
    model, x = build(family), images()
    expected = model(x)
    methods = [name for name in STRATEGIES if name not in ("cls", "diffrate") or model.num_prefix_tokens]
    for method in methods:
        options = {"zero_tprune": {"num_similar": 2}, "diffrate": {}}.get(method, {"keep": 7})
        with vistok.prune(model, method, **options) as pruned:
            reduced = model(x)
        counts = pruned.stats().num_tokens
        assert counts[0] == 16 + model.num_prefix_tokens and counts[-1] < counts[0] and pruned.stats().macs_ratio < 1
        assert reduced.shape == expected.shape and not torch.equal(reduced, expected)
        assert torch.equal(pruned.plan.keep[:, : model.num_prefix_tokens], torch.arange(model.num_prefix_tokens).expand(2, -1))
        assert (pruned.size[:, : model.num_prefix_tokens] == 1).all()
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_prefix_tokens_that_may_be_merged_count_as_patches():
    model = build("distilled")
    for protected, removed in ((None, 4), (1, 5)):  # floor(0.3 T) of T = 16 patches, or 17 with the distillation token
        with vistok.prune(model, "pitome", layer_keep_ratio=0.7, num_protected_prefix=protected) as pruned:
            model(images())
        assert pruned.stats().num_tokens[:2] == (18, 18 - removed)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_token_changes_no_bit(family):
    model, x = build(family), images()
    expected = model(x)
    for method, options in (
        ("tome", {"r": 0}),
        ("tome", {"keep_ratio": 1.0}),
        ("pitome", {"layer_keep_ratio": 1.0}),
        ("random", {"keep": 16}),
    ):
        with vistok.prune(model, method, **options):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["plain", "layer scale", "qk norm", "mean pooling", "attention pooling"])
def test_merging_copies_of_a_patch_loses_nothing_with_proportional_attention(family):
    model = build(family)
    torch.nn.init.zeros_(model.pos_embed)
    x = torch.randn(1, 3, 4, 1).repeat_interleave(4, 2).expand(-1, -1, -1, 16)  # 4 rows of 4 equal patches
    expected = model(x)
    with vistok.prune(model, "tome", r=[8, 4]):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    if model.num_prefix_tokens:  # without one, all sizes are equal and the bias cancels
        with vistok.prune(model, "tome", r=[8, 4], is_proportional=False):
            assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["plain", "rotary", "mixed rotary", "DINOv3"])
def test_dropping_patches_is_running_the_blocks_on_the_rest_with_their_own_positions(family):
    model, x = build(family), images()
    with vistok.prune(model, "uniform", r=[6, 0, 0]) as pruned:
        reduced = model.forward_features(x)
    keep = pruned.plan.keep
    P = model.num_prefix_tokens
    tokens = model.patch_embed(x)
    rope = None
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(tokens)
    else:
        tokens = model._pos_embed(tokens)
    hidden = model.norm_pre(tokens)
    for layer, block in enumerate(model.blocks):
        table = rope[layer] if getattr(model, "rope_mixed", False) else rope
        options = {} if rope is None else {"rope": table if layer == 0 else table[..., keep[0, P:] - P, :]}
        if layer == 0:  # attention sees everything, the feed-forward only what is left
            scale = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
            branch = block.attn(block.norm1(hidden), **options)
            hidden = (hidden + (branch if scale[0] is None else scale[0] * branch))[:, keep[0]]
            branch = block.mlp(block.norm2(hidden))
            hidden = hidden + (branch if scale[1] is None else scale[1] * branch)
        else:
            hidden = block(hidden, **options)
    torch.testing.assert_close(reduced, model.norm(hidden), atol=1e-5, rtol=1e-4)


def test_restored_tokens_repeat_what_each_patch_was_merged_into():
    model, x = build("plain"), images()
    with vistok.prune(model, "tome", keep_ratio=0.5) as pruned:
        tokens = model.forward_features(x)
        full = pruned.restore(tokens)
    assert tokens.shape[1] == 9 and full.shape[1] == 17
    assert torch.equal(full, tokens.gather(1, pruned.plan.owner[..., None].expand(-1, -1, 32)))
    assert torch.equal(pruned.size[..., 0].sum(dim=1), torch.full((2,), 17.0))


def test_an_image_does_not_depend_on_its_batch():
    model, x = build("plain"), images(3)
    for method in ("tome", "pitome", "zero_tprune", "cls"):
        with vistok.prune(model, method, **({"num_similar": 2} if method == "zero_tprune" else {"keep": 6})):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-4, rtol=1e-4)


def test_an_exception_inside_takes_the_hooks_off():
    model, x = build("mean pooling"), images()
    expected = model(x)
    with pytest.raises(KeyError), vistok.prune(model, "tome", r=2):
        raise KeyError
    assert torch.equal(model(x), expected) and "pool" not in model.__dict__
    with pytest.raises(ValueError, match="metric="), vistok.prune(model, "tome", r=2, metric="values"):
        model(x)
    assert torch.equal(model(x), expected)


def test_a_second_pruning_of_one_model_is_refused_until_the_first_is_removed():
    model = build("plain")
    first = vistok.prune(model, "tome", r=2)
    with pytest.raises(ValueError, match="already pruned"):
        vistok.prune(model, "pitome", keep=7)
    first.remove()
    first.remove()
    vistok.prune(model, "pitome", keep=7).remove()


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
def test_blocks_that_cannot_be_reduced_are_named(block):
    with pytest.raises(ValueError, match=block.__name__):
        vistok.prune(VisionTransformer(**SMALL, block_fn=block), "tome", r=2)


def test_models_that_are_no_plain_vit_are_refused():
    for model in (timm.create_model("resnet18"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="not supported"):
            vistok.prune(model, "tome", r=2)


def test_wrong_options_say_what_is_allowed():
    model = build("mean pooling")
    with pytest.raises(ValueError, match="there are tome"):
        vistok.prune(model, "merge", r=2)
    with pytest.raises(ValueError, match="exactly one"):
        vistok.prune(model, "tome", r=2, keep=3)
    with pytest.raises(ValueError, match="at most half"):
        vistok.prune(model, "pitome", layer_keep_ratio=0.3)
    with pytest.raises(ValueError, match="class token"), vistok.prune(model, "cls", r=2):
        model(images())
    with pytest.raises(RuntimeError, match="no forward"):
        vistok.prune(build("plain"), "tome", r=2).stats()


def test_masks_are_refused_rather_than_applied_to_merged_tokens():
    model = build("plain")
    with vistok.prune(model, "tome", r=2), pytest.raises(ValueError, match="attn_mask"):
        model(images(), attn_mask=torch.zeros(17, 17))


def test_training_through_a_reduced_model_gives_the_same_gradients_with_checkpointing():
    model, x = build("plain"), images()
    gradients = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)
        model.zero_grad()
        with vistok.prune(model, "tome", r=3):
            model(x).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("tome", {"keep_ratio": 0.5}), ("pitome", {"layer_keep_ratio": 0.8}), ("zero_tprune", {"num_similar": 2}), ("diffrate", {})],
)
def test_a_reduced_model_compiles_to_one_graph(method, options):
    torch.compiler.reset()
    model, x = build("plain"), images()
    with torch.no_grad(), vistok.prune(model, method, **options):
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
