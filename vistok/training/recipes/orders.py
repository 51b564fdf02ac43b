"""Recipes of MaskGIT and RAR: generators over any tokenizer's tokens that do not go left to right only."""

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_generator_config, imagenet_config, require_all_tokens, tiny_config
from vistok.training.task import TrainingTask

EMOJI = dict(width=160, depth=4, num_heads=5, hidden=448)


@recipe
def maskgit_tiny() -> Recipe:
    """A two-layer MaskGIT over any tokenizer's tokens; seconds on two CPU cores."""
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _maskgit(dict(width=64, depth=2, num_heads=2, hidden=128)))


@recipe
def maskgit_emoji() -> Recipe:
    """Class-conditioned MaskGIT, 4 layers of 160; about 3 minutes on one CPU core for the 32 tokens of a titok-emoji."""
    return Recipe("generator", emoji_generator_config(batch_size=32), _maskgit(EMOJI))


@recipe
def maskgit_imagenet256() -> Recipe:
    """The published generator of TiTok: 24 layers of 768, batch 2,048; label smoothing 0.1, class dropout 0.1; days on 8 large GPUs."""
    config = imagenet_config(
        max_steps=500_000, batch_size=2048, learning_rate=2e-4, betas=(0.9, 0.96), weight_decay=0.03, warmup_steps=10_000, ema_decay=0.999
    )
    return Recipe("generator", config, _maskgit({}))


@recipe
def rar_tiny() -> Recipe:
    """A two-layer RAR over any tokenizer's tokens, random orders for 30 of its 60 steps; seconds on two CPU cores."""
    shape = dict(width=64, depth=2, num_heads=2, hidden=128)
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _rar(shape, random_steps=30, raster_steps=45))


@recipe
def rar_emoji() -> Recipe:
    """Class-conditioned RAR, 4 layers of 160, random orders for half of its steps, raster for a quarter; about 5 minutes for 64 tokens."""
    return Recipe("generator", emoji_generator_config(), _rar(EMOJI, random_steps=700, raster_steps=1050))


@recipe
def rar_imagenet256() -> Recipe:
    """The published RAR-B: 250,000 steps of 2,048 images, random orders for half of them; days on 8 large GPUs."""
    config = imagenet_config(
        max_steps=250_000, batch_size=2048, learning_rate=4e-4, betas=(0.9, 0.96), weight_decay=0.03, warmup_steps=62_500,
        final_fraction=0.025, ema_decay=0.999, compile=False,
    )  # fmt: skip
    return Recipe("generator", config, _rar({}))


def _fields(sources: Sources) -> dict:
    """Config fields that the tokens decide. Raises ValueError: they are only a part of each image."""
    tokens = sources.tokens
    require_all_tokens(tokens)
    return dict(
        codebook_size=tokens.codebook_size,
        layout_kind=tokens.layout.kind,
        layout_shape=tokens.layout.shape,
        num_classes=len(tokens.classes),
        classes=tuple(tokens.classes),
    )


def _maskgit(shape: dict, **task):
    def build(sources: Sources) -> TrainingTask:
        from vistok.generators import MaskGIT, MaskGITConfig
        from vistok.training.tasks.orders import MaskGITTask, MaskGITTaskConfig

        model = MaskGIT(MaskGITConfig(**_fields(sources), **shape))
        return MaskGITTask(model, MaskGITTaskConfig(**task), **sources.generator_task_parts())

    return build


def _rar(shape: dict, **task):
    def build(sources: Sources) -> TrainingTask:
        from vistok.generators import RAR, RARConfig
        from vistok.training.tasks.orders import RARTask, RARTaskConfig

        return RARTask(RAR(RARConfig(**_fields(sources), **shape)), RARTaskConfig(**task), **sources.generator_task_parts())

    return build
