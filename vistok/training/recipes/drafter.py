"""Recipes of drafters: heads that learn, from a frozen generator, what it will say next; and of judges of drafts."""

from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.runs import configured, run_recipe, token_splits
from vistok.training.recipes.shared import tiny_config
from vistok.training.task import TrainingTask


def train_drafter(name: str, *, out: Path, target: str, tokens: Path | None = None, resume: bool = False, **overrides) -> Path:
    """Run a drafter recipe for the pipeline `target` on the tokens of `data`; overrides replace fields of its TrainConfig.

    tokens: a folder made by `vistok tokenize` with the pipeline's tokenizer; without it the data set is tokenized first, into a folder
    `out`-tokens beside the run. Returns the run folder. Raises ValueError: the target is no pipeline of a next-token generator.
    """
    import vistok

    chosen, config = configured(name, "drafter", out, overrides)
    pipe = vistok.load(target)
    generator = getattr(pipe, "generator", None)
    if not hasattr(generator, "extend"):
        raise ValueError(f"{target} is no pipeline whose generator predicts one next token after another; nothing can be drafted for it")
    token_folder, held_out, config = token_splits(tokens, pipe.tokenizer, config, generator.max_tokens)
    sources = Sources(target=(pipe, str(target)), tokens=token_folder, held_out=held_out)
    return run_recipe(name, chosen, sources, token_folder, config, resume=resume)


@recipe
def eagle_tiny() -> Recipe:
    """EAGLE's head for any small generator; seconds on two CPU cores."""
    return Recipe("drafter", tiny_config(image_size=32, max_steps=60), _head("EagleHead"))


@recipe
def eagle_emoji() -> Recipe:
    """EAGLE's head for emoji-gpt-fsq2d, one layer of 160, 0.4 M parameters; about 4 minutes on a CPU core."""
    return Recipe("drafter", _emoji(), _head("EagleHead"))


@recipe
def medusa_tiny() -> Recipe:
    """Three Medusa heads for any small generator; seconds on two CPU cores."""
    return Recipe("drafter", tiny_config(image_size=32, max_steps=60), _head("MedusaHeads", num_drafts=3))


@recipe
def medusa_emoji() -> Recipe:
    """Four Medusa heads for emoji-gpt-fsq2d, 0.7 M parameters; about 4 minutes on a CPU core."""
    return Recipe("drafter", _emoji(), _head("MedusaHeads", num_drafts=4))


@recipe
def chimera_tiny() -> Recipe:
    """Three Chimera heads for any small generator; seconds on two CPU cores."""
    return Recipe("drafter", tiny_config(image_size=32, max_steps=60), _head("ChimeraHeads", num_drafts=3))


@recipe
def chimera_emoji() -> Recipe:
    """Four Chimera heads for emoji-gpt-fsq2d, 2.0 M parameters; minutes on a CPU core."""
    return Recipe("drafter", _emoji(), _head("ChimeraHeads", num_drafts=4))


@recipe
def judge_tiny() -> Recipe:
    """A judge for any small generator; seconds on two CPU cores."""
    return Recipe("drafter", tiny_config(image_size=32, max_steps=20), _judge())


@recipe
def judge_emoji() -> Recipe:
    """A judge for emoji-gpt-fsq2d, 161 parameters; minutes on a CPU core."""
    return Recipe("drafter", _emoji(max_steps=300, learning_rate=1e-2, weight_decay=0.0), _judge())


def _emoji(**changes) -> TrainConfig:
    base = TrainConfig(
        out=Path(), data="emoji", max_steps=1000, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.02, warmup_steps=30,
        schedule="trapezoid", decay_fraction=0.5, final_fraction=0.02, ema_decay=0.98, save_every=250, preview_every=250, log_every=25,
    )  # fmt: skip
    return replace(base, **changes)


def _head(kind: str, **shape):
    def build(sources: Sources) -> TrainingTask:
        from vistok.decoding import heads
        from vistok.training.tasks.drafter import DrafterTask

        pipe, name = sources.target
        head = getattr(heads, kind).for_target(pipe.generator, **shape)
        return DrafterTask(head, pipe.generator, held_out=sources.held_out, target_name=name)

    return build


def _judge():
    def build(sources: Sources) -> TrainingTask:
        from vistok.decoding.heads import JudgeHead
        from vistok.training.tasks.judge import JudgeTask

        pipe, name = sources.target
        head = JudgeHead.for_target(pipe.generator)
        return JudgeTask(head, pipe.generator, pipe.tokenizer, held_out=sources.held_out, target_name=name)

    return build
