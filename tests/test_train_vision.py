"""Classifiers of timm and the small LLaVA train through the one loop, and other libraries open what comes out."""

import json

import pytest
import timm
import torch
from PIL import Image

import vistok
from vistok.data.scenes import KINDS, question_scene
from vistok.training.recipes.vision import train_classifier, train_vlm
from vistok.training.tasks.classifier import ClassifierTask, ClassifierTaskConfig
from vistok.training.tasks.vlm import QuestionScenes, SceneVLMConfig, VLMTask, VLMTaskConfig, scene_processor, scene_vlm

QUICK = {"max_steps": 2, "save_every": 2, "preview_every": 2, "log_every": 1, "batch_size": 4, "progress": False}
TINY = SceneVLMConfig(tower_width=16, tower_depth=1, tower_heads=2, width=32, depth=2, num_heads=2, num_key_value_heads=1, hidden=64)


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
    """A folder with a folder for each of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    for label in "abc":
        (folder / label).mkdir()
        for number in range(12):
            scene = question_scene(number * 3 + "abc".index(label))
            Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(folder / label / f"{number}.png")
    return folder


def test_a_classifier_trains_and_timm_opens_it(small_scenes, tmp_path):
    run = train_classifier("vit-tiny", out=tmp_path / "run", data=str(small_scenes), **QUICK)
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    assert model.num_classes == 3 and model.pretrained_cfg["mean"] == [0.5] * 3
    assert model(torch.zeros(1, 3, 48, 48)).isfinite().all()
    assert json.loads((run / "model" / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    assert any("held_out_accuracy" in line for line in (run / "metrics.jsonl").read_text().splitlines())


def test_a_classifier_learns_from_a_teacher_and_opens_again(small_scenes, tmp_path):
    teacher = train_classifier("vit-tiny", out=tmp_path / "teacher", data=str(small_scenes), **QUICK)
    run = train_classifier("vit-tiny", out=tmp_path / "run", data=str(small_scenes), teacher=str(teacher), **QUICK)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["teacher"] >= 0 for line in lines if "loss" in line)
    x = torch.randn(2, 3, 48, 48)
    same = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    assert torch.equal(vistok.load(run)(x), same(x)) and vistok.load(run).label_names == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["raftmlp_s", "stripmlp_t_light"])
def test_the_mlp_backbones_learn_from_a_teacher(small_scenes, tmp_path, architecture):
    teacher = train_classifier("vit-tiny", out=tmp_path / "teacher", data=str(small_scenes), image_size=32, **QUICK)
    run = train_classifier(
        "vit-tiny", out=tmp_path / "run", data=str(small_scenes), image_size=32, architecture=architecture, teacher=str(teacher), **QUICK
    )
    assert vistok.load(run)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_folders_of_other_libraries_that_fit_nothing_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_of_nobody", "num_classes": 3}))
    with pytest.raises(ValueError, match="vit_of_nobody"):
        vistok.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 3}))
    with pytest.raises(OSError, match="model.safetensors"):
        vistok.load(tmp_path)


def test_a_classifier_task_says_what_its_data_lacks(small_scenes):
    from vistok.data import open_dataset

    data = open_dataset(small_scenes, image_size=16)
    shape = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=3)
    with pytest.raises(ValueError, match="what covers each patch"):
        ClassifierTask(model, ClassifierTaskConfig(token_weight=1.0), architecture="vit_tiny_patch16_224", options=shape).on_start(data)
    with pytest.raises(ValueError, match="no teacher"):
        ClassifierTask(model, ClassifierTaskConfig(teacher_weight=0.5), architecture="vit_tiny_patch16_224", options=shape)
    with pytest.raises(ValueError, match="has 4 classes but the data has 3"):
        four = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=4)
        ClassifierTask(four, ClassifierTaskConfig(), architecture="vit_tiny_patch16_224", options=shape).on_start(data)


def test_the_vlm_task_computes_the_loss_transformers_computes():
    torch.manual_seed(0)
    processor = scene_processor(TINY)
    model = scene_vlm(TINY, processor)
    task = VLMTask(model, processor, VLMTaskConfig())
    batch = task.batch([question_scene(number) for number in range(3)])
    _, logs = task(batch, None, 0)
    expected = model(input_ids=batch.ids, pixel_values=batch.images, labels=batch.targets).loss
    torch.testing.assert_close(logs["answer_loss"], expected)
    loss, _ = task(batch, None, 0)
    loss.backward()
    assert all(p.grad is not None for p in model.model.language_model.parameters())


def test_the_language_loss_does_not_reach_the_tower():
    torch.manual_seed(0)
    processor = scene_processor(TINY)
    task = VLMTask(scene_vlm(TINY, processor), processor, VLMTaskConfig(tower_weight=0.0))
    task(task.batch([question_scene(0)]), None, 0)[0].backward()
    tower = task.model.model.vision_tower
    assert all(p.grad is None or not p.grad.any() for p in tower.parameters())
    assert task.model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_a_vlm_trains_and_transformers_answers_with_it(tmp_path):
    import transformers

    run = train_vlm("vlm-tiny", out=tmp_path / "run", **QUICK)
    processor = transformers.AutoProcessor.from_pretrained(run / "model")
    model = transformers.AutoModelForImageTextToText.from_pretrained(run / "model", dtype=torch.float32).eval()
    scene = question_scene(0)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(images=Image.fromarray(scene.image.permute(1, 2, 0).numpy()), text=text, return_tensors="pt")
    task = VLMTask(model, processor, VLMTaskConfig())
    batch = task.batch([question_scene(0, num_questions=1)])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"], batch.ids[:, :length])  # the processor and the training speak the same language
    torch.testing.assert_close(inputs["pixel_values"], batch.images, atol=1e-5, rtol=0)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= length + 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {f"held_out_{kind}" for kind in KINDS} <= set().union(*lines)


def test_scenes_of_two_processes_are_those_of_one():
    from pathlib import Path

    from vistok.training.config import TrainConfig

    processor = scene_processor(TINY)
    task = VLMTask(scene_vlm(TINY, processor), processor, VLMTaskConfig())
    task.dataset = QuestionScenes()
    config = TrainConfig(out=Path(), batch_size=4)
    whole = next(iter(task.make_loader(config, 8, 0, 1)))
    half = next(iter(task.make_loader(config, 8, 1, 2)))
    assert torch.equal(half.images, whole.images[1::2]) and whole.positions.tolist() == [8, 9, 10, 11]
    assert half.positions.tolist() == [9, 11]


def test_the_bundled_vlm_reads_words_and_needs_its_picture():
    from eval.pruning_measure import Asked, run_vlm, scene_questions

    model = vistok.load("vistok/emoji-vlm")
    every = scene_questions(model, 32)
    chosen = [number for number, kind in enumerate(every.kinds) if kind == "read"]
    fields = [[values[number] for number in chosen] for values in (every.images, every.texts, every.answers, every.kinds)]
    asked = Asked(*fields)
    full, reference = run_vlm(model, asked, None, None)
    blank, _ = run_vlm(model, asked.without_pictures(), reference, None)
    pruned, _ = run_vlm(model, asked, reference, "fastv", layer=2, keep_ratio=0.5)
    assert full.right.float().mean() > 0.8 and blank.right.float().mean() < 0.2
    assert pruned.macs_ratio < 0.75 and pruned.cache_bytes < full.cache_bytes
