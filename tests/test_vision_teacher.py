"""The vision tower and how it is taught: shapes, classes and captions that are or are not there, saving, and that it learns."""

from typing import get_args

import pytest
import torch

import vistok
from vistok.data import BatchLoader
from vistok.image import to_pil
from vistok.metrics.understanding import text_space
from vistok.tokenizers import VisionTower
from vistok.training.recipes.teacher import train_teacher
from vistok.training.tasks.vision_teacher import VisionTeacherConfig, VisionTeacherTask, tower_for

QUICK = {"max_steps": 2, "save_every": 2, "preview_every": 2, "progress": False}


def pictures(*shape, seed=0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).clamp(-1, 1)


def photos(folder, *, captions=False, classes=("dark", "light"), count=40):
    """A folder of noise: darker for the first class."""
    for i in range(count):
        home = folder / classes[i % len(classes)] if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        shade = (i % 2) - 0.5
        to_pil((0.3 * pictures(1, 3, 16, 16, seed=i) + shade).clamp(-1, 1))[0].save(home / f"{i}.png")
        if captions:
            (home / f"{i}.txt").write_text(f"a {('dark', 'light')[i % 2]} picture")
    return folder


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return vistok.create("vision-tower-tiny", classes=("a", "b", "c"), captions="hash:16", caption_width=16).eval()


def test_it_gives_patch_features_one_vector_and_both_answers(tower):
    images = pictures(2, 3, 32, 32)
    features, pooled = tower.features(images), tower.pooled(images)
    assert features.shape == (2, 16, 32) and tower.grid == (4, 4) and pooled.shape == (2, 32) and tower.width == 32
    torch.testing.assert_close(pooled, features.mean(1))
    logits, directions = tower(images)
    assert logits.shape == (2, 3) and directions.shape == (2, 16)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    assert tower.caption_directions(["a red apple"]).shape == (1, 16)
    torch.testing.assert_close(tower.features(images[:1]), features[:1], atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_resized_and_normalised_by_the_config(tower):
    images = pictures(1, 3, 48, 64)
    assert tower.features(images).shape == (1, 16, 32)
    settings = tower.settings
    clip = VisionTower(type(settings)(**{**vars(settings), "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.2, 0.2)}))
    flat = torch.zeros(1, 3, 32, 32)
    torch.testing.assert_close(clip.normalize(flat)[0, :, 0, 0], torch.tensor([0.5, 0.0, -0.5]))
    assert torch.equal(tower.normalize(flat), flat)


def test_a_saved_tower_is_the_same_tower(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    again, images = vistok.load(tmp_path), pictures(2, 3, 32, 32)
    assert again.settings == tower.settings and torch.equal(again.features(images), tower.features(images))


def test_what_was_not_taught_cannot_be_asked():
    plain = vistok.create("vision-tower-tiny", classes=("a", "b"))
    with pytest.raises(ValueError, match="taught without captions"):
        plain.image_directions(pictures(1, 3, 32, 32))
    with pytest.raises(ValueError, match="cannot read any"):
        plain.caption_directions(["a"])
    with pytest.raises(ValueError, match="both or neither"):
        vistok.create("vision-tower-tiny", captions="hash")
    with pytest.raises(ValueError, match="multiple of patch_size"):
        vistok.create("vision-tower-tiny", image_size=(30, 32))


@pytest.mark.parametrize("captions, classes", [(True, ("x", "y")), (False, ("x", "y")), (True, ())], ids=["both", "classes", "captions"])
def test_it_learns_from_whatever_a_folder_has(tmp_path, captions, classes):
    folder = photos(tmp_path / "photos", captions=captions, classes=classes)
    run = train_teacher("teacher-tiny", out=tmp_path / "run", data=str(folder), **{**QUICK, "max_steps": 12})
    tower = vistok.load(run)
    assert tower.settings.classes == classes
    # class names serve as captions where there are none
    assert tower.settings.captions == "hash" and tower.image_directions(pictures(1, 3, 32, 32)).shape == (1, 256)


def test_a_folder_with_neither_teaches_nothing(tmp_path):
    with pytest.raises(ValueError, match="has neither"):
        train_teacher("teacher-tiny", out=tmp_path / "run", data=str(photos(tmp_path / "photos", classes=())), **QUICK)


def test_other_classes_than_its_own_are_refused(tmp_path, tower):
    task = VisionTeacherTask(tower)
    with pytest.raises(ValueError, match="built for the classes"):
        task.on_start(vistok.open_dataset(photos(tmp_path), image_size=32))
    with pytest.raises(ValueError, match="none negative"):
        VisionTeacherConfig(contrast_weight=-1.0)


def test_images_without_class_and_caption_take_no_part(tmp_path):
    dataset = vistok.open_dataset(photos(tmp_path, captions=True), image_size=32)
    tower = tower_for(dataset, lambda **fields: vistok.create("vision-tower-tiny", **fields), captions="hash:16")
    task = VisionTeacherTask(tower).eval()
    task.dataset = dataset
    task.on_start(dataset)
    batch = next(iter(BatchLoader(dataset, batch_size=6, seed=0)))
    batch.labels[2], batch.captions[2] = -1, ""
    loss, logs = task(batch, None, 0)
    batch.images[2] = 1.0  # whatever it shows
    other, _ = task(batch, None, 0)
    torch.testing.assert_close(loss, other)
    assert set(logs) == {"contrast", "class", "accuracy"}


def test_the_command_trains_a_teacher_that_the_probe_can_read(tmp_path, capsys):
    from vistok.cli import main
    from vistok.commands.train_teacher import TeacherRecipe
    from vistok.training.recipes import RECIPES

    assert set(get_args(TeacherRecipe)) == {name for name in RECIPES if RECIPES[name]().kind == "teacher"}
    options = ["--recipe", "teacher-tiny", "--data", str(photos(tmp_path / "photos", captions=True)), "--out", str(tmp_path / "run")]
    assert main(["train", "teacher", *options, "--max-steps", "2", "--no-progress"]) == 0
    assert "python -m eval.probe --model" in capsys.readouterr().err
    tower = vistok.load(tmp_path / "run")
    space = text_space(tower)
    assert space is not None and space[0](pictures(2, 3, 32, 32)).shape == space[1](["a dark picture", "x"]).shape


def test_a_few_steps_teach_it_to_tell_dark_from_light(tmp_path):
    run = train_teacher("teacher-tiny", out=tmp_path / "run", data=str(photos(tmp_path / "photos", count=60)), **{**QUICK, "max_steps": 15})
    dark, light = (-0.5 + 0.2 * pictures(8, 3, 32, 32)).clamp(-1, 1), (0.5 + 0.2 * pictures(8, 3, 32, 32, seed=1)).clamp(-1, 1)
    logits = vistok.load(run)(torch.cat([dark, light]))[0]
    assert (logits.argmax(1) == torch.tensor([0] * 8 + [1] * 8)).all()
