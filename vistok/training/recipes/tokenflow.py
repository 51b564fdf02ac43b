"""Recipes of TokenFlow: the tokenizer, and the generator of its scales."""

from dataclasses import replace

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import (
    LIVE_CODEBOOK,
    emoji_config,
    emoji_generator_config,
    fitted_codebook_size,
    imagenet_config,
    require_all_tokens,
    require_tokenizer,
    tiny_config,
)
from vistok.training.task import TrainingTask


@recipe
def tokenflow_tiny() -> Recipe:
    """A TokenFlow of 1 + 4 + 16 tokens for 32 px images, its meaning learned from captions; about 15 seconds on two CPU cores."""
    task = dict(semantic_steps=20, semantic_weight=0.05)
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=80), _tokenflow("tokenflow-tiny", LIVE_CODEBOOK, **task))


@recipe
def tokenflow_emoji() -> Recipe:
    """1 + 4 + 16 + 64 tokens of up to 2,048 codes for 64 px images; 2,000 of 4,600 steps on captions alone; 18 minutes on one CPU core."""
    config = emoji_config(max_steps=4600, decay_fraction=0.35, ema_decay=0.995, save_every=500, preview_every=1000)
    task = dict(semantic_steps=2000, semantic_weight=0.05, buckets=2048)
    # the pixel half is half as wide as the semantic one: counted three times, it gets its say in the choice of an id
    return Recipe("tokenizer", config, _tokenflow("tokenflow-small", {**LIVE_CODEBOOK, "pixel_weight": 3.0}, **task))


@recipe
def tokenflow_imagenet256() -> Recipe:
    """TokenFlow-B at 256 px with the plain decoder, from CLIP ViT-B/16: the published losses and schedule; days on 8 large GPUs."""
    config = imagenet_config(
        max_steps=500_000, batch_size=256, weight_decay=0.0, warmup_steps=0, schedule="constant", workers=8, compile=False
    )
    task = dict(
        semantic="teacher",
        teacher="openai/clip-vit-base-patch16",
        start_from_teacher=True,
        lpips_weight=1.0,
        gan_weight=0.5,
        gan_start=20_000,
    )
    return Recipe("tokenizer", config, _tokenflow("tokenflow-b", dict(decoder_width=128, decoder_blocks=2), **task))


@recipe
def tokenflow_t2i_tiny() -> Recipe:
    """A two-layer generator of a trained TokenFlow's scales, from classes and captions; seconds on two CPU cores."""
    shape = dict(width=64, depth=2, num_heads=2, hidden=128, caption_tokens=4)
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _t2i(shape, num_words=256))


@recipe
def tokenflow_t2i_emoji() -> Recipe:
    """Classes and captions to the scales of vistok/emoji-tokenflow, 4 layers of 160, 2.3 M parameters; about 8 minutes on one CPU core."""
    shape = dict(width=160, depth=4, num_heads=5, hidden=448, caption_tokens=7)
    return Recipe("generator", emoji_generator_config(), _t2i(shape, num_words=1024, token_dropout=0.05))


def _t2i(shape: dict, *, num_words: int, **task):
    """num_words: rows of the table that words of captions are hashed into."""

    def build(sources: Sources) -> TrainingTask:
        from vistok.generators import TokenFlowT2I, TokenFlowT2IConfig
        from vistok.tokenizers import TokenFlow
        from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig

        tokens, parts = sources.tokens, sources.generator_task_parts()
        tokenizer = parts["tokenizer"]
        require_tokenizer(tokenizer, TokenFlow, sources.tokenizer)
        require_all_tokens(tokens)
        settings, classes = tokenizer.settings, tuple(tokens.classes)
        rows = num_words + 2 + len(classes)  # words, padding, classes, start
        config = TokenFlowT2IConfig(
            vocab_size=rows + settings.codebook_size, image_token_start=rows, pad_token=num_words, scales=settings.scales,
            codebook_size=settings.codebook_size, group_dims=(settings.semantic_dim, settings.pixel_dim), text="hash",
            num_classes=len(classes), classes=classes, **shape,
        )  # fmt: skip
        return GeneratorTask(TokenFlowT2I(config).read_codes_of(tokenizer), GeneratorTaskConfig(**task), **parts)

    return build


def _tokenflow(preset: str, shape: dict, **task):
    """A teacher in the sources (--vae) takes the place of the captions, or of the recipe's own teacher."""

    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.training.tasks.teacher import VisionTeacher
        from vistok.training.tasks.tokenflow import TokenFlowTask, TokenFlowTaskConfig

        with torch.device("meta"):
            base = vistok.create(preset)
        fields = dict(shape, codebook_size=fitted_codebook_size(base.codebook_size, base.max_tokens, sources.num_images))
        if sources.image_size not in (None, base.settings.image_size[0]):
            fields |= _sized(base.settings, sources.image_size)
        config = TokenFlowTaskConfig(**task)
        if sources.vae is not None:
            fields["teacher_width"] = VisionTeacher(sources.vae, reads="patches", layer=config.teacher_layer).width
            config = replace(config, semantic="teacher", teacher=sources.vae)
        return TokenFlowTask(vistok.create(preset, **fields), config)

    return build


def _sized(settings, image_size: int) -> dict:
    """The config fields for another image size: grids of 1, 2, 4, ... and last of image_size / patch cells a side."""
    patch = settings.encoder.patch_size
    if settings.encoder.kind == "timm" or image_size % patch:
        raise ValueError(f"image_size={image_size} must be a multiple of the recipe's patches of {patch} pixels")
    grid = image_size // patch
    scales = [2**i for i in range(grid.bit_length()) if 2**i < grid]
    encoder = replace(settings.encoder, table_grid=grid)
    return {"image_size": (image_size, image_size), "scales": (*scales, grid), "encoder": encoder, "semantic_decoder_grid": grid}
