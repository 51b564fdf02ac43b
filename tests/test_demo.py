"""The demo on models trained for two steps: what it writes, what it leaves out, and that --train does the whole job."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vistok.cli import main
from vistok.demo import demo, train_demo
from vistok.training.recipes import train_generator, train_tokenizer

TINY = dict(max_steps=2, batch_size=4, preview_every=0, progress=False, threads=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, 12 images each to train on and 3 held out."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 12), ("test", 3)):
        for label in ("dark", "light"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 128, (32, 32, 3), dtype=np.uint8) + 120 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def models(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer("flextok-tiny", out=root / "flextok", data=photos, **TINY)
    train_tokenizer("fsq2d-tiny", out=root / "fsq2d", data=photos, **TINY)
    train_generator("gpt-tiny", out=root / "gpt", tokenizer=str(tokenizer), data=photos, **TINY)
    return root


@pytest.fixture(scope="module")
def page(models, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "page"
    names = {"tokenizers": [str(models / "flextok"), str(models / "fsq2d"), "vistok/not-here"], "pipelines": [str(models / "gpt")]}
    return out, demo(out, **names, data=photos, num_images=6, num_rows=2, num_samples=2)


def test_the_page_shows_only_files_that_exist_and_every_section(page):
    out, report = page
    text = (out / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="([^"]+)"', text)
    assert len(pictures) > 15 and all((out / picture).is_file() for picture in pictures)
    assert all(f'id="{name}"' in text for name in ("pieces", "new", "copies", "figures", "own"))
    assert "<script" not in text and "http" not in text, "the page stands alone"
    assert "vistok/not-here" in text and report.missing == ["vistok/not-here"]


def test_the_strips_grids_and_figures_are_written(page):
    out, report = page
    files = {path.name for path in out.iterdir()}
    assert files >= {"flextok-strip.png", "fsq2d-strip.png", "gpt-samples.png", "gpt-nearest.png", "gpt-nearest.txt"}
    assert Image.open(out / "flextok-strip.png").width > 6 * 32
    figures = json.loads((out / "figures.json").read_text())
    assert len(figures) == 3 and all(entry["protocol"]["seed"] == 0 for entry in figures.values())
    assert report.tokenizers[0].counts == [1, 2, 4, 8, 16] and report.tokenizers[1].counts == [16]
    text = (out / "figures.txt").read_text()
    assert text.count("held-out images") == 3 and "not here: vistok/not-here" in text
    assert len((out / "gpt-nearest.txt").read_text().splitlines()) == 4


def test_without_any_model_the_demo_says_how_to_train_some(tmp_path):
    with pytest.raises(OSError, match="demo --train"):
        demo(tmp_path, tokenizers=["vistok/not-here"], pipelines=[])


def test_the_demo_trains_shows_and_continues(photos, tmp_path):
    recipes = {"tokenizer_recipe": "fsq2d-tiny", "generator_recipe": "gpt-tiny"}
    sizes = {"tokenizer_steps": 2, "generator_steps": 2, "num_images": 4, "num_rows": 2, "num_samples": 2, "threads": 1, "data": photos}
    report = train_demo(tmp_path, **recipes, **sizes)
    assert [result.source for result in report.pipelines] == [str(tmp_path / "generator")]
    assert "Trained here from nothing" in (tmp_path / "index.html").read_text(encoding="utf-8")
    again = train_demo(tmp_path, **recipes, **sizes)
    assert again.pipelines[0].nearest == report.pipelines[0].nearest, "finished runs are used as they are"


@pytest.mark.slow
def test_the_demo_command_prints_the_memorisation_check(tmp_path, capsys):
    steps = ["--tokenizer-steps", "2", "--generator-steps", "2", "--num-images", "4", "--num-samples", "1", "--threads", "1"]
    assert main(["demo", "--train", "--out", str(tmp_path), *steps]) == 0
    out = capsys.readouterr().out
    assert "nearest training image of each sample" in out and str(tmp_path / "index.html") in out
