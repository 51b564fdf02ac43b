"""Recipes of LaVIT, on its own vision transformer and pixel decoder."""

from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _square, _tiny, recipe
from vistok.training.task import TrainingTask


@recipe
def lavit_tiny() -> Recipe:
    """A LaVIT of up to 16 tokens for 32 px images, both stages; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=60), _lavit("lavit-tiny", quantize_start=30))


@recipe
def lavit_emoji() -> Recipe:
    """About 26 of up to 64 tokens of 1,024 codes for 64 px images, 2.9 M parameters; about 70 minutes on a CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=6000, batch_size=32, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.02,
        warmup_steps=100, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.998, shift=4, save_every=500,
        preview_every=500, log_every=20,
    )  # fmt: skip
    return Recipe("tokenizer", config, _lavit("lavit-64", quantize_start=2000))


def _lavit(preset: str, **task):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.lavit import LaVITTask, LaVITTaskConfig

        return LaVITTask(vistok.create(preset, **_square(sources.image_size)), LaVITTaskConfig(**task))

    return build
