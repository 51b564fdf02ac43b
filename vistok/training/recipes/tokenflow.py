"""Recipes of TokenFlow."""

from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _tiny, recipe
from vistok.training.task import TrainingTask


@recipe
def tokenflow_tiny() -> Recipe:
    """A TokenFlow of 1 + 4 + 16 tokens for 32 px images, its meaning learned from captions; about 15 seconds on two CPU cores."""
    return Recipe(
        "tokenizer",
        _tiny(image_size=32, max_steps=60),
        _tokenflow("tokenflow-tiny", dict(revive_after=10), semantic="captions", semantic_weight=0.1),
    )


@recipe
def tokenflow_emoji() -> Recipe:
    """1 + 4 + 16 + 64 tokens of 1,024 codes for 64 px images, its meaning learned from captions; about an hour on a CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=3000, batch_size=16, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.01,
        warmup_steps=100, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.998, shift=4, save_every=200,
        preview_every=400, log_every=20,
    )  # fmt: skip
    return Recipe("tokenizer", config, _tokenflow("tokenflow-small", dict(revive_after=50), semantic="captions", semantic_weight=0.05))


@recipe
def tokenflow_imagenet256() -> Recipe:
    """TokenFlow-B at 256 px with the plain decoder, from CLIP ViT-B/16: the published losses and schedule; days on 8 large GPUs."""
    config = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, max_steps=500_000, batch_size=256, learning_rate=1e-4, betas=(0.9, 0.95),
        weight_decay=0.0, warmup_steps=0, schedule="constant", ema_decay=0.9999, precision="bf16", workers=8, save_every=5000,
        preview_every=5000, process_timeout=600,
    )  # fmt: skip
    task = dict(
        semantic="teacher",
        teacher="openai/clip-vit-base-patch16",
        start_from_teacher=True,
        lpips_weight=1.0,
        gan_weight=0.5,
        gan_start=20_000,
    )
    return Recipe("tokenizer", config, _tokenflow("tokenflow-b", dict(decoder_width=128, decoder_blocks=2), **task))


def _tokenflow(preset: str, shape: dict | None = None, **task):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.tokenflow import TokenFlowTask, TokenFlowTaskConfig

        model = vistok.create(preset, **(shape or {}))
        size = model.settings.image_size[0]
        if sources.image_size not in (None, size):
            raise ValueError(
                f"this recipe's grids fit {size} px, not {sources.image_size}; a TokenFlowConfig with other scales is another recipe"
            )
        return TokenFlowTask(model, TokenFlowTaskConfig(**task))

    return build
