"""Run a recipe: open its data, build its task from a seed, train it."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from vistok.training.checkpoint import write_json
from vistok.training.config import TrainConfig
from vistok.training.loop import seeded_build, train
from vistok.training.recipes.registry import Recipe, Sources, get_recipe

logger = logging.getLogger("vistok")


def train_tokenizer(name: str, *, out: Path, vae: str | None = None, resume: bool = False, **overrides) -> Path:
    """Run a tokenizer recipe; overrides replace fields of its TrainConfig. Returns the run folder."""
    from vistok.data import open_dataset

    chosen, config = configured(name, "tokenizer", out, overrides)
    dataset = open_dataset(config.data, image_size=config.image_size, on_bad_image=config.on_bad_image)
    sources = Sources(vae=vae, image_size=overrides.get("image_size"), num_images=len(dataset))
    return run_recipe(name, chosen, sources, dataset, config, resume=resume)


def train_generator(
    name: str,
    *,
    out: Path,
    tokenizer: str,
    tokens: Path | None = None,
    order: str | None = None,
    context: str | None = None,
    start: str | None = None,
    grow: int | None = None,
    resume: bool = False,
    **overrides,
) -> Path:
    """Run a generator recipe on the tokens of `data` made by `tokenizer`; overrides replace fields of its TrainConfig.

    tokens: a folder made by `vistok tokenize`; without it the data set is tokenized first, into a folder `out`-tokens beside the run.
    order, context: of an xAR, start, grow: of a GPT, see Sources.
    Returns the run folder. Raises ValueError: the recipe takes no such option, or no continuous tokens.
    """
    import vistok

    chosen, config = configured(name, "generator", out, overrides)
    given = {"order": order, "context": context, "start": start, "grow": grow}
    for option, value in given.items():
        if value is not None and option not in chosen.takes:
            raise ValueError(f"{option}={value!r} is for {'xar' if option in ('order', 'context') else 'gpt'} recipes; {name} has none")
    if grow is not None and start is None:
        raise ValueError(f"grow={grow} needs a trained generator to add to: give start")
    model = None
    if tokens is None:
        model = vistok.load(tokenizer)
        if not hasattr(model, "encode"):
            raise ValueError(f"{tokenizer} is a {type(model).__name__}, not a tokenizer")
        if model.codebook_size is None and "values" not in chosen.takes:
            raise ValueError(f"{name} learns ids, but {tokenizer} makes continuous values; the xar recipes learn those")
    token_folder, held_out, config = token_splits(tokens, model, config, chosen.num_tokens)
    sources = Sources(tokenizer=tokenizer, tokens=token_folder, held_out=held_out, **given)
    return run_recipe(name, chosen, sources, token_folder, config, resume=resume)


def configured(name: str, kind: str, out: Path, overrides: dict[str, Any]) -> tuple[Recipe, TrainConfig]:
    """The recipe of that name and kind, and its settings with `overrides` for a run in `out`."""
    chosen = get_recipe(name, kind)
    return chosen, replace(chosen.train, out=Path(out), **overrides)


def run_recipe(name: str, chosen: Recipe, sources: Sources, dataset: Any, config: TrainConfig, *, resume: bool) -> Path:
    """Build the recipe's task with weights from config.seed and train it on the data set. Returns the run folder."""
    task = seeded_build(lambda: chosen.build(sources), config.seed)
    return train(task, dataset, config, resume=resume, recipe_name=name)


def image_splits(config: TrainConfig) -> tuple[Any, Any]:
    """The images of config.data to train on, and the test split, None where there is none."""
    from vistok.data import open_dataset

    options = {"image_size": config.image_size, "on_bad_image": config.on_bad_image}
    dataset = open_dataset(config.data, **options)
    try:
        return dataset, open_dataset(config.data, split="test", **options)
    except ValueError:  # a small folder can be without a test split
        return dataset, None


def token_splits(tokens: Path | None, tokenizer: Any, config: TrainConfig, num_tokens: int | None) -> tuple[Any, Any, TrainConfig]:
    """The tokens to train on, held-out ones (None where there are none), and the settings at the tokenizer's image size.

    tokens: a folder made before, which brings no held-out tokens and leaves the settings alone; None: those of config.data, made or
    found in a folder `out`-tokens beside the run.
    """
    from vistok.data import TokenFolder

    if tokens is not None:
        return TokenFolder(tokens), None, config
    config = replace(config, image_size=int(tokenizer.settings.image_size[0]))
    token_folder = _tokenized(tokenizer, config, "train", num_tokens)
    try:
        return token_folder, _tokenized(tokenizer, config, "test", num_tokens), config
    except ValueError as error:  # a small folder can be without a test split
        logger.warning("nothing is measured on held-out images: %s", error)
        return token_folder, None, config


def _tokenized(model: Any, config: TrainConfig, split: str, num_tokens: int | None) -> Any:
    """The tokens of one split of config.data, made or found beside the run."""
    from vistok.data import open_dataset
    from vistok.data.tokenize import tokenize_dataset

    dataset = open_dataset(config.data, image_size=model.settings.image_size, split=split, on_bad_image=config.on_bad_image)
    target = config.out.parent / f"{config.out.name}-tokens" / split
    tokens = tokenize_dataset(model, dataset, target, num_tokens=num_tokens, flips=config.flip, source=config.data)
    if len(dataset.bad_images):
        write_json(target / "bad_images.json", dataset.bad_images.to_dict())
        logger.warning("unreadable images: %d; %s lists them", len(dataset.bad_images), target / "bad_images.json")
    return tokens
