"""Learned pruning: the soft masks of training and the tokens that leave in use are the same thing, and both heads learn."""

import pytest
import torch

pytest.importorskip("transformers")

from vlm_toys import IMAGE, SPECIAL, build

import vistok
from vistok.pruning.learned import ATP, ATPConfig, DeleteGate, DeleteGateConfig, SoftLayers, budget_loss
from vistok.rng import image_generators
from vistok.testing import assert_matches_mask_oracle


def atp():
    torch.manual_seed(3)
    pruner = ATP(ATPConfig(layers=(1, 2, 3), grid=4))
    for stage in pruner.stages:
        torch.nn.init.normal_(stage.head.weight, std=0.3)
        torch.nn.init.constant_(stage.head.bias, -0.3)
    return pruner


def gate():
    torch.manual_seed(3)
    pruner = DeleteGate(DeleteGateConfig(layers=(1, 2, 3), width=32))
    for stage in pruner.stages:
        torch.nn.init.normal_(stage.score.weight, std=0.3)
        torch.nn.init.zeros_(stage.score.bias)
    return pruner


PRUNERS = pytest.mark.parametrize("make", [atp, gate])


@PRUNERS
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_dropping_tokens_gives_the_logits_of_masks_of_zero_and_one(make, name):
    model, inputs = build(name)
    pruner = make()
    with torch.no_grad():
        with SoftLayers(model, pruner, is_hard=True) as soft:
            masked = model(**inputs).logits
        with vistok.prune(model, pruner) as pruned:
            dropped = model(**inputs).logits
        plain = model(**inputs).logits
    last = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    torch.testing.assert_close(dropped[last], masked[last], atol=2e-4, rtol=2e-4)
    assert (plain[last] - masked[last]).abs().max() > 1e-2
    counts = torch.tensor(pruned.stats().num_kept)
    assert torch.equal(counts, torch.stack([kept.sum(dim=1) for kept in soft.kept]).long())
    assert len({tuple(row) for row in counts.tolist()}) > 1 and bool((counts[-1] < torch.tensor([32, 16])).all())


@PRUNERS
def test_a_learned_pruner_matches_the_oracle_over_two_turns(make):
    model, inputs = build("llava")
    more = torch.tensor([[9, 17, 33, 21], [40, 41, 42, 43]])
    assert_matches_mask_oracle(model, inputs, make(), second_turn=more, suppress_tokens=SPECIAL)


@PRUNERS
def test_the_loss_reaches_every_parameter_of_the_pruner(make):
    model, inputs = build("llava")
    model.requires_grad_(False)
    pruner = make()
    with SoftLayers(model, pruner) as soft:
        logits = model(**inputs).logits
        terms = budget_loss(soft.kept, soft.num_visual, pruner.settings.layers, target=0.25, floor=0.05)
    (logits[:, -1].logsumexp(dim=-1).mean() + 0.05 * terms["late"] + 0.2 * terms["budget"]).backward()
    for name, parameter in pruner.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    if make is atp:  # both thresholds
        assert all(bool((stage.head.bias.grad != 0).all()) for stage in pruner.stages)


def test_the_answers_alone_reach_both_thresholds():
    model, inputs = build("llava")
    model.requires_grad_(False)
    pruner = atp()
    with SoftLayers(model, pruner):
        model(**inputs).logits[:, -1].logsumexp(dim=-1).mean().backward()
    assert all(bool((stage.head.bias.grad != 0).all()) for stage in pruner.stages)


def test_answers_that_are_not_there_yet_in_use_change_no_mask_of_training():
    model, inputs = build("llava")
    answer = torch.tensor([[9, 17, 33], [40, 41, 42]])
    ids, mask = torch.cat([inputs["input_ids"], answer], dim=1), torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    is_answer[:, -3:] = True
    pruner, kept = atp(), []
    with torch.no_grad():
        for tokens, valid, answers in ((inputs["input_ids"], inputs["attention_mask"], None), (ids, mask, is_answer), (ids, mask, None)):
            with SoftLayers(model, pruner, answers=answers) as soft:
                model(input_ids=tokens, attention_mask=valid, pixel_values=inputs["pixel_values"])
            kept.append(torch.stack(soft.kept)[..., : inputs["input_ids"].shape[1]])
    torch.testing.assert_close(kept[1], kept[0], atol=1e-5, rtol=1e-5)
    assert (kept[2] - kept[0]).abs().max() > 1e-4


def test_the_budget_is_in_tokens_and_a_floor_holds_every_stage_up():
    kept = [torch.full((2, 10), value) for value in (0.9, 0.3, 0.0)]
    terms = budget_loss(kept, torch.tensor([10, 10]), (1, 2, 3), target=0.25, floor=0.1)
    torch.testing.assert_close(terms["budget"], torch.tensor(4.0 - 2.5))
    torch.testing.assert_close(terms["late"], torch.tensor(0.9 * 1 + 0.3 * 2))
    torch.testing.assert_close(terms["floor"], torch.tensor(1.0))


def test_the_target_falls_to_its_value_and_stays_there():
    from vistok.training.tasks.pruner import PrunerTaskConfig

    config = PrunerTaskConfig(target=0.25, anneal_steps=4)
    assert [config.target_at(step) for step in (0, 2, 4, 9)] == [1.0, 0.625, 0.25, 0.25]
    assert [float(config.target_at(torch.tensor(step))) for step in (0, 2, 9)] == [1.0, 0.625, 0.25]
    assert PrunerTaskConfig(target=0.25).target_at(0) == 0.25


def test_a_gate_in_training_is_drawn_for_each_prompt_and_mostly_open_or_shut():
    model, inputs = build("llava")
    pruner = gate()
    for stage in pruner.stages:
        torch.nn.init.zeros_(stage.score.weight)

    def kept(rows: slice, numbers: list[int] | None):
        generators = None if numbers is None else image_generators(0, numbers)
        part = {key: value[rows] for key, value in inputs.items() if key != "pixel_values"}
        part["pixel_values"] = inputs["pixel_values"][2 * (rows.start or 0) : 2 * rows.stop]  # two images, then one
        with torch.no_grad(), SoftLayers(model, pruner, generators=generators) as soft:
            model(**part)
        return soft.kept[0][soft._is_visual]

    assert bool((kept(slice(0, 2), None) == 0.5).all())
    drawn = kept(slice(0, 2), [3, 4])
    assert ((drawn < 0.1) | (drawn > 0.9)).float().mean() > 0.3
    assert torch.equal(torch.cat([kept(slice(0, 1), [3]), kept(slice(1, 2), [4])]), drawn)
    assert not torch.equal(kept(slice(0, 2), [4, 3]), drawn)


def test_coarser_grids_score_higher():
    from vistok.pruning.stages import StageView

    pruner = ATP(ATPConfig(layers=(1,), grid=8))
    ordinal = torch.arange(64)[None]
    view = StageView(1, None, None, None, None, None, None, ordinal)
    score = pruner.stages[0]._spatial(view).view(8, 8)
    assert score[0, 0] == score[4, 4] == 1 - 3 / 16 and score[2, 0] == score[0, 2] == 0.25
    assert int((score > 0).sum()) == 16 and score[1, 1] == 0


@PRUNERS
def test_a_pruner_is_saved_and_loaded(make, tmp_path):
    pruner = make()
    pruner.save_pretrained(tmp_path)
    loaded = vistok.load(tmp_path)
    assert type(loaded) is type(pruner) and loaded.settings == pruner.settings
    for key, value in pruner.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_bad_shapes_and_uses_are_refused():
    model, inputs = build("llava")
    with pytest.raises(ValueError, match="the model has 4"):
        SoftLayers(model, ATP(ATPConfig()))
    with pytest.raises(ValueError, match="must rise"):
        ATPConfig(layers=(2, 1))
    with SoftLayers(model, atp()), pytest.raises(ValueError, match="without a cache"):
        model.generate(**inputs, max_new_tokens=2, suppress_tokens=SPECIAL)
    assert not model._forward_pre_hooks and not model.model.language_model._forward_pre_hooks


@pytest.fixture(scope="module")
def scene_model(tmp_path_factory):
    """A run of `vistok train vlm`, two steps long."""
    from vistok.training.recipes.vision import train_vlm

    folder = tmp_path_factory.mktemp("vlm") / "run"
    return train_vlm("vlm-tiny", out=folder, max_steps=2, batch_size=2, preview_every=0, progress=False)


@pytest.mark.parametrize("recipe", ["atp-tiny", pytest.param("delete-gate-tiny", marks=pytest.mark.slow)])
def test_a_pruner_recipe_trains_towards_its_budget_and_gives_a_pruner_that_works(scene_model, recipe, tmp_path):
    import json

    from vistok.training.recipes.pruner import train_pruner

    short = {"max_steps": 12, "batch_size": 2, "preview_every": 12, "log_every": 1, "progress": False, "learning_rate": 0.05}
    folder = train_pruner(recipe, out=tmp_path / "run", target=str(scene_model), **short)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line["kept_0"] for line in lines if "kept_0" in line]
    assert abs(kept[-1] - 0.25) < abs(kept[0] - 0.25)
    assert any("held_out_pruned" in line for line in lines)
    model = vistok.load(scene_model)
    image = model.processor(text="<image> what", images=[torch.zeros(64, 64, 3).numpy()], return_tensors="pt")
    with vistok.prune(model, vistok.load(folder)) as pruned:
        model.generate(**image, max_new_tokens=2)
    assert pruned.stats().tokens_per_layer[1] <= pruned.stats().tokens_per_layer[0]


def test_a_model_that_answers_no_scene_questions_is_no_target(tmp_path):
    from vistok.training.recipes.pruner import train_pruner

    with pytest.raises(ValueError, match="no model of `vistok train vlm`"):
        train_pruner("atp-tiny", out=tmp_path / "run", target="vistok/emoji-fsq2d")
