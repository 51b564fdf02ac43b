"""Recipes of vision teachers: small towers taught by a folder's classes and captions, for the semantic losses of TokenFlow and SEED."""

from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.runs import configured, image_splits, run_recipe
from vistok.training.recipes.shared import square, tiny_config
from vistok.training.task import TrainingTask


def train_teacher(name: str, *, out: Path, captions: str = "hash", resume: bool = False, **overrides) -> Path:
    """Run a teacher recipe on `data`; overrides replace fields of its TrainConfig. Returns the run folder.

    captions: who turns captions into the vectors the tower learns to meet (vistok.metrics.captions: hash, minilm, a folder).
    Raises ValueError: the images have neither two classes nor captions.
    """
    chosen, config = configured(name, "teacher", out, overrides)
    dataset, held_out = image_splits(config)
    sources = Sources(dataset=dataset, held_out=held_out, image_size=config.image_size, teacher=captions)
    return run_recipe(name, chosen, sources, dataset, config, resume=resume)


@recipe
def teacher_tiny() -> Recipe:
    """A two-layer tower for 32 px images; seconds on two CPU cores."""
    return Recipe("teacher", tiny_config(image_size=32, max_steps=60, batch_size=32), _teacher("vision-tower-tiny"))


@recipe
def teacher_emoji() -> Recipe:
    """A four-layer tower of width 128 for 64 px images, 0.8 M parameters; about 5 minutes on a CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=1500, batch_size=64, learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.05,
        warmup_steps=100, schedule="trapezoid", decay_fraction=0.5, final_fraction=0.02, ema_decay=0.995, flip=True, shift=6,
        save_every=500, preview_every=250, log_every=25,
    )  # fmt: skip
    return Recipe("teacher", config, _teacher("vision-tower-64"))


def _teacher(preset: str, **task):
    """The recipe's preset, fitted to the classes and captions of the data set; `sources.teacher` names who reads captions."""

    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.vision_teacher import VisionTeacherConfig, VisionTeacherTask, tower_for

        size = square(sources.image_size)
        model = tower_for(sources.dataset, lambda **fields: vistok.create(preset, **fields), captions=sources.teacher, **size)
        return VisionTeacherTask(model, VisionTeacherConfig(**task), held_out=sources.held_out)

    return build
