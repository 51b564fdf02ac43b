"""What a recipe is, what it is built from, and the table of all recipes."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vistok.training.config import TrainConfig
from vistok.training.task import TrainingTask


@dataclass(frozen=True)
class Sources:
    """What a recipe is built from besides images: names or folders of trained models, and tokens."""

    vae: str | None = None
    """The VAE under a FlexTok."""
    image_size: int | None = None
    """Pixels the tokenizer is built for; None: the recipe's."""
    num_images: int | None = None
    """Images a tokenizer is trained on; None: as many as its codebook can use."""
    tokenizer: str | None = None
    """The tokenizer of a generator."""
    tokens: Any = None
    """TokenFolder a generator trains on."""
    order: str | None = None
    """The order of an xAR ("cell-2"); None: what suits the tokens."""
    context: str | None = None
    """How an xAR sees earlier entities in training; None: noisy."""
    start: str | None = None
    """A trained GPT, or pipeline or run of one, whose weights a new run starts from; None: fresh ones."""
    grow: int | None = None
    """Parameter tokens that each attention layer of `start` gains first, others in proportion; None: none."""
    held_out: Any = None
    """TokenFolder or images that are held out, to measure a generator or classifier on."""
    dataset: Any = None
    """The images a classifier is trained on."""
    architecture: str | None = None
    """Model of timm for a classifier; None: the recipe's."""
    teacher: str | None = None
    """A classifier to learn from."""
    target: Any = None
    """What a drafter or pruner is trained for, its name, and, of a pruner, the share of tokens to keep."""

    def generator_task_parts(self) -> dict[str, Any]:
        """What a GeneratorTask is given beside model and config: the loaded tokenizer, the name it is stored by, the held-out tokens."""
        import vistok
        from vistok.registry import is_bundled

        reference = self.tokenizer if is_bundled(self.tokenizer) else None
        return {"tokenizer": vistok.load(self.tokenizer), "tokenizer_reference": reference, "held_out": self.held_out}


@dataclass(frozen=True)
class Recipe:
    """train: its settings; build: (sources) -> the task; num_tokens: tokens an image a generator is trained on, None for all.

    takes: what a generator's recipe can be given besides: "order", "context", "start", "grow", and "values", a continuous tokenizer's
    tokens.
    """

    kind: Literal["tokenizer", "generator", "classifier", "vlm", "teacher", "drafter", "pruner"]
    train: TrainConfig
    build: Callable[[Sources], TrainingTask]
    num_tokens: int | None = None
    takes: frozenset[str] = frozenset()


RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Decorator: register a recipe under its function's name, with dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str, kind: str | None = None) -> Recipe:
    """The recipe of that name. Raises ValueError: there is none, or it is of another kind."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        raise ValueError(f"no recipe {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; recipes: {', '.join(RECIPES)}"))
    found = RECIPES[name]()
    if kind is not None and found.kind != kind:
        raise ValueError(f"{name!r} trains a {found.kind}: vistok train {found.kind} --recipe {name}")
    return found
