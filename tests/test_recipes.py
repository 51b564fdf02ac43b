"""Every "tiny" recipe trains for a few steps from its name alone, and what it writes is a model that loads and works."""

import pytest
import torch

import vistok
from vistok.rng import image_generators
from vistok.training.recipes import RECIPES, train_generator, train_tokenizer

QUICK = {"max_steps": 2, "save_every": 2, "preview_every": 2, "progress": False}
ALONE = [name for name, recipe in RECIPES.items() if name.endswith("-tiny") and recipe().kind == "tokenizer"]
TOKENIZER_OF = {
    "gpt-tiny": "fsq2d-tiny",
    "gpt-mixed-tiny": "fsq2d-tiny",
    "gpt-exposure-tiny": "fsq2d-tiny",
    "gpt-pattention-tiny": "fsq2d-tiny",
    "var-tiny": "var-vqvae-tiny",
    "maskgit-tiny": "titok-tiny",
    "rar-tiny": "titok-tiny",
    "tokenflow-t2i-tiny": "tokenflow-tiny",
    "xar-tiny": "vae-tiny",
    "xar-mixed-tiny": "vae-tiny",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> run folder of a tokenizer recipe, trained once."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = train_tokenizer(name, out=tmp_path_factory.mktemp("runs") / name, **QUICK)
        return runs[name]

    return run


@pytest.mark.parametrize("name", ALONE)
def test_a_tiny_tokenizer_recipe_gives_a_tokenizer_that_makes_images(trained, name):
    run = trained(name)
    assert list((run / "previews").glob("*.png"))
    tokenizer = vistok.load(run)
    H, W = tokenizer.settings.image_size if not isinstance(tokenizer.settings.image_size, int) else (tokenizer.settings.image_size,) * 2
    images = torch.rand(2, 3, H, W) * 2 - 1
    decoded = tokenizer.decode(tokenizer.encode(images), generators=image_generators(0, 2))
    assert decoded.shape == images.shape and decoded.isfinite().all()


@pytest.mark.parametrize("name", TOKENIZER_OF)
def test_a_tiny_generator_recipe_gives_a_pipeline_that_makes_images(trained, tmp_path, name):
    run = train_generator(name, out=tmp_path / "run", tokenizer=str(trained(TOKENIZER_OF[name])), **QUICK)
    images = vistok.load(run)(labels=[0, 1], num_images=1, seed=0).images
    assert len(images) == 2 and images[0].size[0] >= 16


def test_every_tiny_recipe_is_covered_here():
    generators = {name for name, recipe in RECIPES.items() if name.endswith("-tiny") and recipe().kind == "generator"}
    assert generators == set(TOKENIZER_OF)


@pytest.mark.slow
def test_a_trained_generator_of_parameter_tokens_grows_and_trains_on(trained, tmp_path):
    tokenizer = str(trained("fsq2d-tiny"))
    small = train_generator("gpt-pattention-tiny", out=tmp_path / "small", tokenizer=tokenizer, **QUICK)
    tokens = tmp_path / "small-tokens" / "train"
    grown = train_generator(
        "gpt-pattention-tiny", out=tmp_path / "grown", tokenizer=tokenizer, tokens=tokens, start=str(small), grow=8, **QUICK
    )
    before, after = (vistok.load(run).generator for run in (small, grown))
    assert (before.settings.parameter_tokens, after.settings.parameter_tokens) == (32, 40)
    moved = (after.blocks[0].mlp.keys[:64] - before.blocks[0].mlp.keys).abs().max()
    assert 0 < moved < 0.02 and after.blocks[0].mlp.keys[64:].abs().sum() > 0  # two steps away from where it started
    with pytest.raises(ValueError, match="give start"):
        train_generator("gpt-tiny", out=tmp_path / "x", tokenizer=tokenizer, grow=8)
    with pytest.raises(ValueError, match="can grow"):
        plain = train_generator("gpt-tiny", out=tmp_path / "plain", tokenizer=tokenizer, tokens=tokens, **QUICK)
        train_generator("gpt-tiny", out=tmp_path / "x", tokenizer=tokenizer, tokens=tokens, start=str(plain), grow=8)
