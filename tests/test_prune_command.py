"""The overlay of a reduction, `vistok prune`, and the evaluation of token reduction on the bundled classifier."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.cli import main
from vistok.data.scenes import question_scene
from vistok.image import to_pil
from vistok.pruning.overlay import overlay


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A scene of the classifier's test split as a file."""
    from vistok.data import open_dataset
    from vistok.image import from_uint8

    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    to_pil(from_uint8(open_dataset("scenes", image_size=48, split="test").read(7)[None]))[0].save(path)
    return path


def test_an_overlay_shows_single_patches_tints_merged_ones_and_pales_dropped_ones():
    image = torch.zeros(3, 8, 8)
    plain = np.asarray(overlay(image, torch.arange(4), (2, 2), width=40)).astype(int)
    mixed = np.asarray(overlay(image, torch.tensor([0, 1, 1, -1]), (2, 2), width=40)).astype(int)
    inner = (slice(4, 16), slice(4, 16)), (slice(4, 16), slice(24, 36)), (slice(24, 36), slice(4, 16)), (slice(24, 36), slice(24, 36))
    assert plain.shape == (40, 40, 3) and len(np.unique(plain)) == 1
    assert np.array_equal(mixed[inner[0]], plain[inner[0]])
    assert np.array_equal(mixed[inner[1]][0, 0], mixed[inner[2]][0, 0]) and np.ptp(mixed[inner[1]][0, 0]) > 50
    assert mixed[inner[3]].min() > 220
    with pytest.raises(ValueError, match="2 x 3"):
        overlay(image, torch.arange(4), (2, 3))


def test_prune_draws_a_column_a_layer_and_names_the_class(picture, tmp_path, capsys):
    out = tmp_path / "overlay.png"
    assert main(["prune", str(picture), "--method", "pitome", "--keep-ratio", "0.3", "--layers", "3", "12", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "145 -> 44 tokens" in printed and "of the multiply-adds; cactus" in printed  # scene 7 is of class 7
    width, height = Image.open(out).size
    assert width > 2 * 288 and height < 2 * 288
    assert main(["prune", str(picture), "--layers", "13", "--out", str(out)]) == 2
    assert main(["prune", str(picture), "--method", "zero_tprune", "--keep-ratio", "0.5", "--out", str(out)]) == 2


def test_prune_shows_what_a_vision_language_model_keeps(tmp_path, capsys):
    from vistok.training.recipes.vision import train_vlm

    quick = {"max_steps": 1, "save_every": 1, "preview_every": 0, "batch_size": 2, "progress": False}
    run = train_vlm("vlm-tiny", out=tmp_path / "run", **quick)
    path, out = tmp_path / "question.png", tmp_path / "overlay.png"
    Image.fromarray(question_scene(3).image.permute(1, 2, 0).numpy()).save(path)
    assert main(["prune", str(path), "--model", str(run), "--method", "divprune", "--keep-ratio", "0.25", "--out", str(out)]) == 0
    assert out.is_file() and "read the word ?" in capsys.readouterr().out


def test_the_bundled_classifier_is_right_and_stays_so_when_merged():
    from eval.pruning import open_classified
    from eval.pruning_measure import matched, run_lower_resolution, run_vit

    torch.set_grad_enabled(False)
    try:
        model = vistok.load("vistok/emoji-vit")
        images, labels = open_classified("scenes", model, 60)
        full, logits = run_vit(model, images, labels, None, None)
        assert full.right.float().mean() > 0.9 and full.divergence.max() < 1e-6 and full.agrees.all()
        merged, _ = run_vit(model, images, labels, logits, matched(model, "tome", 0.5))
        dropped, _ = run_vit(model, images, labels, logits, matched(model, "random", 0.5))
        small = run_lower_resolution(model, images, labels, logits, 0.5)
        assert merged.macs_ratio == pytest.approx(dropped.macs_ratio) == pytest.approx(0.5, abs=0.02)
        assert small.macs_ratio == pytest.approx(0.5, abs=0.06)
        assert merged.divergence.mean() < dropped.divergence.mean() and merged.agrees.float().mean() > 0.95
        with pytest.raises(ValueError, match="comes no nearer"):
            matched(model, "zero_tprune", 0.1)
    finally:
        torch.set_grad_enabled(True)


def test_evaluation_refuses_classes_that_are_not_the_models(tmp_path):
    from eval.pruning import open_classified

    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{number}.png")
    with pytest.raises(ValueError, match="not the model's"):
        open_classified(str(tmp_path), vistok.load("vistok/emoji-vit"), 4)


def test_evaluation_writes_its_table(tmp_path):
    from eval.pruning import Config
    from eval.pruning import main as evaluate

    try:
        rows = evaluate(Config(methods=("tome",), budgets=(0.5,), num_images=20, seeds=(0,), out=tmp_path / "results.json"))
    finally:
        torch.set_grad_enabled(True)
    assert set(rows) == {"unpruned @ 1", "tome @ 0.5", "random @ 0.5", "smaller picture @ 0.5"}
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["tome @ 0.5"]["macs_ratio"] < 0.55


def test_verdicts_of_the_claims_are_paired_and_skip_budgets_one_side_cannot_reach():
    from eval.claims.pruning_report import compare, series

    def row(right, divergence=0.0):
        return {"right": right, "divergence": [divergence] * len(right), "macs_ratio": 0.5}

    better, worse = [1] * 50 + [0] * 50, [1] * 30 + [0] * 70
    rows = {"vit/A/0.5": row(better), "vit/B/0.5": row(worse, 1.0), "vit/A/0.2": row(worse)}
    judged = compare(rows, "vit", ("A beats B", "A", "B"))
    assert judged.difference == pytest.approx(20) and judged.verdict == "holds"
    assert compare(rows, "vit", ("B beats A", "B", "A")).verdict == "does not hold"
    assert compare(rows, "vit", ("A is closer", "A", "B"), "divergence").difference == pytest.approx(1)
    rows |= {"vit/random 0/0.5": row([1, 0]), "vit/random 1/0.5": row([1, 1])}
    assert series(rows, "vit", "random", "right")["0.5"].tolist() == [1.0, 0.5]


def test_a_learned_pruner_is_judged_against_its_own_baselines_and_against_no_pruning():
    from eval.claims.pruning_report import _learned, learned_baselines

    def row(right, **facts):
        return {"right": right, "divergence": [0.0] * len(right), **facts}

    full, kept, lost = [1] * 100, [1] * 100, [1] * 50 + [0] * 50
    rows = {"vlm/unpruned/1": row(full), "vlm-learned/ATP/learned": row(kept, layers=[1, 3], shares=[0.3, 0.2])}
    rows |= {f"vlm-learned/{name}/learned": row(lost) for name in learned_baselines("ATP", (0, 1))}
    lines = _learned(rows)
    assert "| stages before layers 1, 3: 0.300, 0.200 of the tokens left | |" in lines
    kept, *others = [line for line in lines if line.startswith("* ")]
    assert "75% of the visual tokens removed" in kept and "**holds**, +0.00" in kept
    assert len(others) == 4 and all("**holds**, +50.00" in line for line in others)


def test_the_bundled_pruner_leaves_a_quarter_of_the_visual_tokens():
    from eval.pruning_measure import every_second, scene_questions, stage_shares

    pytest.importorskip("transformers")
    model, pruner = vistok.load("vistok/emoji-vlm"), vistok.load("vistok/emoji-vlm-atp")
    asked = scene_questions(model, 8)
    shares = stage_shares(model, asked, pruner)
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.03) and list(shares) == sorted(shares, reverse=True)
    inputs = model.processor(images=asked.images, text=asked.texts, return_tensors="pt", padding=True)
    with torch.no_grad(), vistok.prune(model, every_second(model), layer=1, keep_ratio=0.25) as pruned:
        model(**inputs)
    rows = pruned.drops()[0][1][inputs["input_ids"] == model.config.image_token_id].view(8, 8, 8)
    assert not rows[:, ::2, ::2].any() and int(rows.sum()) == 8 * 48
