"""The emoji-sized generators from the command line: `vistok train generator` on tokens of real tokenizers, then `vistok generate`."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from vistok.cli import main
from vistok.training.recipes import train_tokenizer

RECIPES = {
    "tokenflow-t2i-emoji": ("vistok/emoji-tokenflow", ["--prompts", "picture red", "--labels", "cats", "--num-steps", "2"], 2),
    "rar-emoji": ("vistok/emoji-fsq2d", ["--labels", "dogs"], 40),
    "maskgit-emoji": ("vistok/emoji-fsq2d", ["--labels", "dogs", "--num-steps", "6"], 40),
    "var-emoji": ("var-vqvae-tiny", ["--labels", "dogs"], 2),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 40 pictures in 2 classes, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        place = folder / ("cats", "dogs")[number % 2]
        place.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (6 * number, 90, 255 - 6 * number)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"picture {number}")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_its_images_go_on_from_their_first_entities(recipe, photos, tmp_path, capsys):
    tokenizer, asked, entities = RECIPES[recipe]
    if not tokenizer.startswith("vistok/"):
        quick = {"max_steps": 2, "save_every": 2, "preview_every": 0, "progress": False}
        tokenizer = str(train_tokenizer(tokenizer, out=tmp_path / "tokenizer", data=photos, **quick))
    steps = ["--max-steps", "2", "--save-every", "2", "--preview-every", "0", "--no-progress"]
    run = str(tmp_path / "run")
    assert main(["train", "generator", "--recipe", recipe, "--tokenizer", tokenizer, "--data", photos, "--out", run, *steps]) in (0, None)
    call = ["generate", "--model", run, *asked, "--num-images", "2", "--seed", "1", "--out"]
    assert main([*call, str(tmp_path / "whole")]) in (0, None)
    first = ["--prefix", str(tmp_path / "whole" / "tokens.safetensors"), "--prefix-entities", str(entities)]
    assert main([*call, str(tmp_path / "rest"), *first]) in (0, None)
    whole, rest = (load_file(tmp_path / name / "tokens.safetensors")["ids"] for name in ("whole", "rest"))
    known = entities if "emoji-fsq2d" in tokenizer else 5  # scales of 1 and 4
    assert whole.shape == rest.shape and whole[:, :known].equal(rest[:, :known])
    if recipe != "maskgit-emoji":  # which settles tokens by confidence, not from the first on
        assert whole.equal(rest)
    assert json.loads((tmp_path / "rest" / "generation.json").read_text())["prefix_entities"] == entities
