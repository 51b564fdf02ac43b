"""Recipes of LaVIT, on its own vision transformer and pixel decoder."""

from dataclasses import replace

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import EVEN_CODEBOOK, emoji_config, fitted_codebook_size, square, tiny_config
from vistok.training.task import TrainingTask

# the merger goes on learning after codes are placed: with k-means of one batch, a moving average and revival after 20 steps alone, usage
# of 1,024 codes fell to 6 % in ten steps, before any revival; with these and `place_codes` it rose from 52 to 76 % in the first hundred
CODEBOOK = dict(EVEN_CODEBOOK, revive_after=10)


@recipe
def lavit_tiny() -> Recipe:
    """A LaVIT of up to 16 tokens for 32 px images, both stages; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=60), _lavit("lavit-tiny", quantize_start=30))


@recipe
def lavit_emoji() -> Recipe:
    """About 26 of up to 64 tokens of up to 1,024 codes for 64 px images, 2.9 M parameters; about 11 minutes on one CPU core."""
    config = emoji_config(
        max_steps=2200, learning_rate=1e-3, weight_decay=0.02, warmup_steps=100, ema_decay=0.995, save_every=400, preview_every=800
    )
    return Recipe("tokenizer", config, _lavit("lavit-64", quantize_start=800))


def _lavit(preset: str, **task):
    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.tokenizers.lavit import LaVIT
        from vistok.training.tasks.lavit import LaVITTask, LaVITTaskConfig

        with torch.device("meta"):
            planned = vistok.create(preset, **square(sources.image_size))
        settings, config = planned.settings, LaVITTaskConfig(**task)
        tokens = round(config.keep_ratio * planned.max_tokens)
        size = fitted_codebook_size(planned.codebook_size, tokens, sources.num_images)
        quantizer = replace(settings.quantizer, codebook_size=size, **CODEBOOK)
        return LaVITTask(LaVIT(replace(settings, quantizer=quantizer)), config)

    return build
