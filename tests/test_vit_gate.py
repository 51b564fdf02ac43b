"""The delete gate in vision transformers: hidden patches and dropped ones are the same to the class token, and every gate learns."""

import pytest
import timm
import torch

import vistok
from vistok.pruning.learned import DeleteGate, DeleteGateConfig
from vistok.pruning.learned_vit import GatedTokens, SoftViT


def build(name: str = "vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    gate = DeleteGate(DeleteGateConfig(width=32, layers=(1, 3)))
    for stage in gate.stages:
        torch.nn.init.normal_(stage.score.weight, std=0.5)
    return model, gate, torch.rand(3, 3, 32, 32) * 2 - 1


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"init_values": 0.5, "qk_norm": True}])
def test_hidden_patches_and_dropped_ones_give_the_same_logits(options):
    model, gate, images = build(**options)
    with torch.no_grad():
        plain = model(images)
        with SoftViT(model, gate, keep_ratio=0.25) as soft:
            hidden = model(images)
        with vistok.prune(model, GatedTokens(gate=gate, keep_ratio=0.25)) as pruned:
            dropped = model(images)
    torch.testing.assert_close(dropped, hidden, atol=2e-4, rtol=2e-4)
    assert (plain - hidden).abs().max() > 1e-3
    prefix = model.num_prefix_tokens
    assert [kept.sum(dim=1).tolist() for kept in soft.kept] == [[32.0] * 3, [16.0] * 3]
    assert pruned.stats().num_tokens[-1] == prefix + 16
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_keeping_all_changes_nothing():
    model, gate, images = build()
    with torch.no_grad(), vistok.prune(model, GatedTokens(gate=gate, keep_ratio=1.0)):
        pruned = model(images)
    with torch.no_grad():
        assert torch.equal(pruned, model(images))


def test_the_loss_reaches_every_gate():
    model, gate, images = build()
    model.requires_grad_(False)
    with SoftViT(model, gate) as soft:
        (model(images).square().mean() + soft.kept[-1].mean()).backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_what_does_not_fit_is_refused():
    model, gate, _ = build()
    deep = DeleteGate(DeleteGateConfig(width=32, layers=(4,)))
    with pytest.raises(ValueError, match="the model has 4"):
        SoftViT(model, deep)
    with pytest.raises(ValueError, match="keep_ratio=2"):
        GatedTokens(gate=gate, keep_ratio=2)


@pytest.mark.slow
def test_the_recipe_trains_gates_on_a_frozen_classifier(tmp_path):
    import json

    from vistok.training.recipes.pruner import train_pruner
    from vistok.training.recipes.vision import train_classifier

    short = {"batch_size": 4, "progress": False, "log_every": 1}
    classifier = train_classifier("vit-tiny", out=tmp_path / "vit", max_steps=2, preview_every=0, **short)
    folder = train_pruner(
        "vit-gate-tiny", out=tmp_path / "run", target=str(classifier), max_steps=15, preview_every=15, learning_rate=0.05, **short
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line["kept_0"] for line in lines if "kept_0" in line]
    assert abs(kept[-1] - 0.5) < abs(kept[0] - 0.5)
    assert any("held_out_agreement_uniform" in line for line in lines)
    model = vistok.load(classifier)
    with torch.no_grad(), vistok.prune(model, GatedTokens(gate=vistok.load(folder), keep_ratio=0.5)) as pruned:
        model(torch.rand(2, 3, 48, 48))
    assert pruned.stats().num_tokens[-1] == 1 + 18
    with pytest.raises(ValueError, match="reads 48 pixels"):
        train_pruner("vit-gate-tiny", out=tmp_path / "x", target=str(classifier), image_size=64)
    with pytest.raises(ValueError, match="no model of `vistok train vlm`"):
        train_pruner("atp-tiny", out=tmp_path / "x", target=str(classifier))
