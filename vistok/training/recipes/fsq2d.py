"""Recipes of the convolutional FSQ tokenizer."""

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_config, square, tiny_config
from vistok.training.task import TrainingTask


@recipe
def fsq2d_tiny() -> Recipe:
    """A convolutional tokenizer for 32 px images; about 10 seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=60), _fsq2d("fsq2d-tiny", image_size=(32, 32)))


@recipe
def fsq2d_emoji() -> Recipe:
    """The quick baseline: 64 tokens of 1,000 codes for 64 px images; 3 to 4 minutes on two CPU cores, about 22 dB."""
    config = emoji_config(max_steps=1200, batch_size=32, save_every=200, preview_every=200, log_every=10)
    return Recipe("tokenizer", config, _fsq2d("fsq2d-64"))


def _fsq2d(preset: str, **changes):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.tokenizer import TokenizerTask

        return TokenizerTask(vistok.create(preset, **{**changes, **square(sources.image_size)}))

    return build
