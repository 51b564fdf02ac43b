"""The bundled TokenFlow and SEED on held-out emoji: what their cards promise, on a few pictures."""

import json

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.data import open_dataset
from vistok.image import from_uint8
from vistok.registry import BUNDLED
from vistok.training.recipes import RECIPES


@pytest.fixture(scope="module")
def images():
    held_out = open_dataset("emoji", image_size=64, split="test")
    return from_uint8(torch.stack([held_out.read(row) for row in range(0, len(held_out), 8)]))


def psnr(decoded, images):
    return -10 * ((decoded - images) / 2).square().mean((1, 2, 3)).log10()


def test_every_scale_of_emoji_tokenflow_adds_to_the_picture_and_most_codes_are_used(images):
    model = vistok.load("vistok/emoji-tokenflow")
    tokens = model.encode(images)
    quality = [psnr(model.decode(tokens.truncate(count)), images).mean() for count in (1, 5, 21, 85)]
    assert quality == sorted(quality) and quality[-1] > 21.5
    assert len(tokens.ids.unique()) > 0.5 * model.codebook_size  # by 38 pictures; all 304 use every code


def test_emoji_seed_gives_back_pictures_and_registers_and_its_tokens_are_causal_words(images):
    model = vistok.load("vistok/emoji-seed")
    with torch.no_grad():
        registers = model.causal_embeddings(images)
        codes = model.quantize(registers).codes
        assert F.cosine_similarity(model.semantic_reconstruction(codes), registers, dim=-1).mean() > 0.9
        assert model.generation_embedding(codes).shape == (len(images), model.settings.embedding_dim)
    tokens = model.encode(images)
    own, other = model.decode(tokens), model.decode(model.encode(images.roll(1, 0)))
    assert psnr(own, images).mean() > psnr(other, images).mean() + 2
    assert len(tokens.ids.unique()) > 0.35 * model.codebook_size  # by 38 pictures; all 304 use 1,022


@pytest.mark.parametrize("name", ["emoji-tokenflow", "emoji-seed"])
def test_a_bundled_tokenizer_comes_with_its_recipe_log_and_card(name):
    folder = BUNDLED / name
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert recipe["recipe"] in RECIPES and "out" not in recipe["train"]
    assert f"--recipe {recipe['recipe']}" in (folder / "README.md").read_text(encoding="utf-8")
    assert lines[-1]["step"] == recipe["train"]["max_steps"] and lines[-1]["usage"] > 0.6
