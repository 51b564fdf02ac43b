"""Recipes: a name for a model, its losses and its training settings, as plain functions, a file a family.

`vistok train tokenizer --recipe NAME` and `train/tokenizer.py` run them; a copy of a function, changed, is a new recipe. "tiny" recipes
take seconds on a CPU and show that everything works; their pictures are not worth looking at.
"""

from vistok.training.recipes import (  # noqa: F401  each file registers its recipes
    drafter,
    flextok,
    fsq2d,
    gpt,
    lavit,
    orders,
    pruner,
    seed,
    teacher,
    titok,
    tokenflow,
    vae,
    var,
    vision,
    vqgan,
    xar,
)
from vistok.training.recipes.registry import RECIPES, Recipe, Sources, get_recipe, recipe
from vistok.training.recipes.runs import train_generator, train_tokenizer

__all__ = ["RECIPES", "Recipe", "Sources", "get_recipe", "recipe", "train_generator", "train_tokenizer"]
