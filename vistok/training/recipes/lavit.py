"""Recipes of LaVIT, on its own vision transformer and pixel decoder."""

from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _codebook_size, _square, _tiny, recipe
from vistok.training.task import TrainingTask


@recipe
def lavit_tiny() -> Recipe:
    """A LaVIT of up to 16 tokens for 32 px images, both stages; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=60), _lavit("lavit-tiny", quantize_start=30))


@recipe
def lavit_emoji() -> Recipe:
    """About 26 of up to 64 tokens of up to 1,024 codes for 64 px images, 2.9 M parameters; about 20 minutes on one CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=3400, batch_size=16, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.02,
        warmup_steps=100, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.995, shift=4, save_every=400,
        preview_every=800, log_every=20,
    )  # fmt: skip
    return Recipe("tokenizer", config, _lavit("lavit-64", quantize_start=1500))


def _lavit(preset: str, **task):
    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.tokenizers.lavit import LaVIT
        from vistok.training.tasks.lavit import LaVITTask, LaVITTaskConfig

        with torch.device("meta"):
            planned = vistok.create(preset, **_square(sources.image_size))
        settings, config = planned.settings, LaVITTaskConfig(**task)
        tokens = round(config.keep_ratio * planned.max_tokens)
        size = _codebook_size(planned.codebook_size, tokens, sources.num_images)
        quantizer = replace(settings.quantizer, codebook_size=size, revive_after=20)
        return LaVITTask(LaVIT(replace(settings, quantizer=quantizer)), config)

    return build
