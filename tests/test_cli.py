"""The command line on tiny models and a tiny folder: every command end to end, its help, its errors, resuming."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vistok
from vistok import cli
from vistok.cli import COMMANDS, main
from vistok.commands.generate import as_label
from vistok.commands.models import parse_setting
from vistok.commands.train import GeneratorRecipe, TokenizerRecipe
from vistok.convert import FORMATS
from vistok.training.recipes import RECIPES

FAST = ["--threads", "1", "--no-progress", "--preview-every", "0", "--batch-size", "4"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images of two classes and of several sizes, with captions, and two files that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        path = folder / ("round" if i % 2 else "square") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        noise(40 + i, 36 + 2 * i, i).save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}")
    (folder / "round" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    (folder / "square" / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def models(photos, tmp_path_factory):
    """Run folders trained for two steps: fsq2d, flextok, and a generator over each."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("fsq2d", "flextok"):
        assert run("train", "tokenizer", "--recipe", f"{name}-tiny", "--data", photos, "--out", root / name, "--max-steps", 2, *FAST) == 0
        generator = ["--recipe", "gpt-tiny", "--data", photos, "--tokenizer", root / name, "--out", root / f"gpt-{name}"]
        assert run("train", "generator", *generator, "--max-steps", 2, *FAST) == 0
    return root


def test_help_is_answered_without_torch():
    code = """
import sys
from vistok.cli import main
assert main(["--help"]) == 0
assert "torch" not in sys.modules and "tyro" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in COMMANDS)


def test_the_help_of_every_command_teaches_and_loads_no_torch():
    code = f"""
import sys
from vistok.cli import main
for name in {list(COMMANDS)!r}:
    assert main([*name.split(), "--help"]) == 0
assert "torch" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"\n    vistok {name} " in out for name in COMMANDS), "every help has an example"
    assert out.count("usage: vistok") == len(COMMANDS)


def test_python_dash_m_vistok_is_the_same_command():
    out = subprocess.run([sys.executable, "-m", "vistok", "--version"], capture_output=True, text=True, check=True).stdout
    assert out == f"vistok {vistok.__version__}\n"


def test_the_listed_recipes_are_those_that_exist():
    kinds = {name: RECIPES[name]().kind for name in RECIPES}
    assert set(get_args(TokenizerRecipe)) == {name for name, kind in kinds.items() if kind == "tokenizer"}
    assert set(get_args(GeneratorRecipe)) == {name for name, kind in kinds.items() if kind == "generator"}


def test_the_help_of_convert_names_every_format(capsys):
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in FORMATS)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 0, ""),
        (["trian", "tokenizer"], 2, "did you mean `vistok train`"),
        (["train", "tokeniser"], 2, "did you mean `vistok train tokenizer`"),
        (["train"], 2, ""),
        (["info", "vistok/emoji-nothing"], 2, "there is no bundled model"),
        (["models", "zzz*"], 2, "no model matches"),
        (["reconstruct", "nowhere.png", "--model", "no/such/folder"], 2, "is no folder"),
        (["train", "tokenizer", "--recipe", "fsq2d-tiny", "--data", "nowhere", "--out", "x"], 2, "nowhere is not a folder"),
        (["train", "tokenizer", "--recipe", "fsq2d-tiny", "--out", "x", "--batch-size", "0"], 2, "batch_size must be at least 1"),
        (["convert", "flextokk", "a", "--out", "b"], 2, "did you mean 'flextok'"),
        (["convert", "flextok", "nowhere", "--out", "b"], 2, "nowhere"),
        (["demo", "--tokenizer-steps", "3"], 2, "are for --train"),
        (["tokenize", "--model", "m", "--data", "d", "--out", "o", "--rank", "2"], 2, "world_size=1"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert error.count("\n") == (1 if said else 0)


def test_a_wrong_option_is_explained_by_tyro_with_exit_code_2(capsys):
    assert main(["generate", "--modle", "x"]) == 2
    assert "--model" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_training_survives_broken_files_and_reports_them(models):
    report = json.loads((models / "fsq2d" / "bad_images.json").read_text())
    assert set(report["images"]) == {"round/broken.jpg", "square/empty.png"}
    config = json.loads((models / "fsq2d" / "config.json").read_text())
    assert config["recipe"] == "fsq2d-tiny" and config["train"]["batch_size"] == 4


def test_training_stops_at_a_broken_file_when_asked_to(photos, tmp_path, capsys):
    arguments = ["--recipe", "fsq2d-tiny", "--data", photos, "--out", tmp_path / "run", "--on-bad-image", "error", "--max-steps", 9, *FAST]
    assert run("train", "tokenizer", *arguments) == 2
    error = capsys.readouterr().err
    assert "broken.jpg" in error or "empty.png" in error


def test_resume_continues_a_run_and_gives_the_model_of_an_uninterrupted_one(photos, tmp_path, capsys):
    common = ["--recipe", "fsq2d-tiny", "--data", photos, *FAST, "--save-every", 1, "--keep-checkpoints", 9, "--max-steps", 4]
    assert run("train", "tokenizer", *common, "--out", tmp_path / "whole") == 0
    assert run("train", "tokenizer", *common, "--out", tmp_path / "whole") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("train", "tokenizer", *common, "--out", tmp_path / "cut") == 0
    for step in (3, 4):  # as if it had been killed after step 2
        folder = tmp_path / "cut" / "checkpoints" / f"step_{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert run("train", "tokenizer", *common, "--out", tmp_path / "cut", "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_ctrl_c_in_a_training_saves_and_says_how_to_continue(photos, tmp_path, capsys):
    def interrupt():
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    arguments = ["--recipe", "fsq2d-tiny", "--data", photos, "--out", tmp_path / "run", *FAST, "--log-every", 1, "--max-steps", 100_000]
    assert run("train", "tokenizer", *arguments) == 130
    thread.join()
    assert "--resume continues" in capsys.readouterr().err and (tmp_path / "run" / "model" / "config.json").exists()


def test_an_image_size_builds_the_model_for_it(photos, tmp_path):
    for name in ("fsq2d", "flextok"):
        out = tmp_path / name
        arguments = ["--recipe", f"{name}-tiny", "--data", photos, "--out", out, "--max-steps", 1, "--image-size", 96, *FAST]
        assert run("train", "tokenizer", *arguments) == 0
        model = vistok.load(out)
        images = torch.zeros(1, 3, 96, 96)
        assert model.settings.image_size == (96, 96) and model.decode(model.encode(images)).shape == images.shape


def test_tokenize_writes_a_folder_that_trains_a_generator(models, photos, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    arguments = ["--model", models / "flextok", "--data", photos, "--out", tokens, "--num-tokens", 3, "--split", "all"]
    assert run("tokenize", *arguments) == 0
    assert "26 images, 3 tokens each, 200 codes" in capsys.readouterr().out
    assert json.loads((tokens / "bad_images.json").read_text())["count"] == 2
    out = tmp_path / "gpt"
    trained = ["--recipe", "gpt-tiny", "--tokenizer", models / "flextok", "--tokens", tokens, "--out", out, "--max-steps", 1, *FAST]
    assert run("train", "generator", *trained) == 0
    assert vistok.load(out).generator.max_tokens == 3
    assert run("train", "generator", *trained, "--data", photos) == 2


def test_reconstruct_shows_every_count_and_prints_psnr(models, photos, tmp_path, capsys):
    strip = tmp_path / "deep" / "strip.png"
    images = [photos / "square" / "00.png", photos / "round" / "01.png"]
    assert run("reconstruct", *images, "--model", models / "flextok", "--num-tokens", 4, 1, "--out", strip, "--decode-steps", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PSNR,", "dB", "1", "4", "tokens"] and lines[3].startswith("mean") and lines[-1] == str(strip)
    assert Image.open(strip).height > 2 * 32


def test_reconstruct_takes_folders_keeps_sizes_and_skips_broken_files(models, photos, tmp_path, capsys):
    common = ["--model", models / "fsq2d", "--out", tmp_path / "strip.png", "--keep-size"]
    assert run("reconstruct", photos / "round", *common) == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert run("reconstruct", photos / "round", *common, "--on-bad-image", "skip") == 0
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err and "mean" in captured.out
    assert run("reconstruct", photos / "round" / "23.png", "--model", models / "flextok", "--keep-size", "--out", tmp_path / "one.png") == 2
    assert "grid of patches" in capsys.readouterr().err


def test_a_fixed_length_tokenizer_refuses_other_counts(models, photos, tmp_path, capsys):
    image, out = photos / "square" / "00.png", tmp_path / "strip.png"
    assert run("reconstruct", image, "--model", models / "fsq2d", "--num-tokens", 4, "--out", out) == 2
    assert "fixed length, 16 tokens" in capsys.readouterr().err
    assert run("reconstruct", image, "--model", models / "fsq2d", "--decode-steps", 4, "--out", out) == 2
    assert "flow decoders" in capsys.readouterr().err
    assert run("reconstruct", image, "--model", models / "flextok", "--num-tokens", 40, "--out", out) == 2
    assert "1 to 16 tokens" in capsys.readouterr().err
    assert run("reconstruct", image, "--model", models / "gpt-fsq2d", "--out", out) == 0, "a pipeline's tokenizer is taken"


def test_generate_writes_images_a_grid_tokens_and_how_they_were_made(models, tmp_path):
    common = ["--model", models / "gpt-fsq2d", "--num-images", 2, "--seed", 3]
    assert run("generate", *common, "--labels", "square", 0, "--out", tmp_path / "a") == 0
    record = json.loads((tmp_path / "a" / "generation.json").read_text())
    assert record["seed"] == 3 and record["labels"] == ["square", "0"] and record["stats"]["num_images"] == 4
    assert sorted(p.name for p in (tmp_path / "a").glob("0*.png")) == record["files"] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert load_file(tmp_path / "a" / "tokens.safetensors")["ids"].shape == (4, 16)
    assert Image.open(tmp_path / "a" / "grid.png").width == 2 * 34 + 2
    assert run("generate", *common, "--labels", "square", "--out", tmp_path / "b") == 0
    assert (tmp_path / "a" / "0001.png").read_bytes() == (tmp_path / "b" / "0001.png").read_bytes()
    prefix = ["--prefix", tmp_path / "b" / "tokens.safetensors", "--prefix-entities", 5]
    assert run("generate", *common, "--labels", "square", *prefix, "--out", tmp_path / "c") == 0
    assert (tmp_path / "c" / "0001.png").read_bytes() == (tmp_path / "b" / "0001.png").read_bytes()
    assert run("generate", *common, "--labels", "square", "--int8", "--out", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "generation.json").read_text())["int8"] is True


def test_generate_explains_what_it_cannot_do(models, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    assert run("generate", "--model", models / "fsq2d", *out) == 2
    assert "not a pipeline" in capsys.readouterr().err
    assert run("generate", "--model", models / "gpt-fsq2d", "--labels", "squar", *out) == 2
    assert "did you mean 'square'" in capsys.readouterr().err
    assert run("generate", "--model", models / "gpt-fsq2d", "--num-images", 0, *out) == 2


def test_a_number_is_a_class_number_unless_a_class_has_that_name():
    assert as_label("3", ("cat", "dog")) == 3 and as_label("3", ("1", "3")) == "3" and as_label("cat", ("cat",)) == "cat"


def test_models_lists_presets_with_a_line_each(capsys):
    assert run("models", "flextok*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == vistok.list_models("flextok*") and all(len(line.split()) > 3 for line in lines)


def test_info_describes_presets_models_and_pipelines(models, capsys):
    assert run("info", "flextok-d18-d28") == 0
    text = capsys.readouterr().out
    assert "1 to 256 an image" in text and "64,000 codes" in text and "256 x 256 pixels" in text
    assert run("info", models / "gpt-flextok") == 0
    text = capsys.readouterr().out
    assert "TokenImagePipeline" in text and "GPT" in text and "FlexTok" in text and "0 round, 1 square" in text


def test_convert_writes_a_vistok_folder_and_goes_back(tmp_path, capsys):
    torch.manual_seed(0)
    shape = dict(image_size=(16, 16), latent_channels=4, block_channels=(32, 32), layers_per_block=1)
    vistok.create("vae-small", **shape, stem=1).save_pretrained(tmp_path / "ours")
    assert run("convert", "kl-vae", tmp_path / "ours", "--out", tmp_path / "official", "--to-official") == 0
    assert run("convert", "kl-vae", tmp_path / "official", "--out", tmp_path / "back", "--set", "image_size=[16,16]") == 0
    ours, back = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    assert run("convert", "kl-vae", tmp_path / "official", "--out", tmp_path / "back") == 2
    assert "not empty" in capsys.readouterr().err
    assert run("convert", "kl-vae", tmp_path / "official", "--out", tmp_path / "new", "--set", "colour=1") == 2
    assert "colour" in capsys.readouterr().err


def test_a_setting_is_a_name_and_a_json_value():
    assert parse_setting("image_size=[8, 16]") == ("image_size", (8, 16)) and parse_setting("kind=plain") == ("kind", "plain")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_setting("image_size")
