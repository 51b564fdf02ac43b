"""Recipes of SEED: both stages in one run, from nothing."""

from dataclasses import replace

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import EVEN_CODEBOOK, emoji_config, fitted_codebook_size, square, tiny_config
from vistok.training.task import TrainingTask


@recipe
def seed_tiny() -> Recipe:
    """A SEED of 8 tokens for 32 px images: 20 steps with captions or class names, 80 with pixels; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=100), _seed("seed-tiny", contrast_steps=20))


@recipe
def seed_emoji() -> Recipe:
    """32 tokens of up to 1,024 codes for 64 px images, 2.5 M parameters; 700 of 2,100 steps on captions; 12 minutes on one CPU core."""
    config = emoji_config(
        max_steps=2100, batch_size=32, learning_rate=1e-3, weight_decay=0.02, warmup_steps=100, ema_decay=0.995, flip=False,
        save_every=400, preview_every=700,
    )  # fmt: skip
    return Recipe("tokenizer", config, _seed("seed-64", contrast_steps=700))


def _seed(preset: str, *, contrast_steps: int):
    """The encoder goes on learning in stage II, with some of the contrast; pixels count most. A teacher in the sources (--vae) says what
    the generation embedding should be."""

    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.tokenizers.seed import SEEDLossWeights
        from vistok.training.tasks.seed import SEEDTask, SEEDTaskConfig
        from vistok.training.tasks.teacher import VisionTeacher

        with torch.device("meta"):
            shape = vistok.create(preset).settings
        size = fitted_codebook_size(shape.quantizer.codebook_size, shape.num_registers, sources.num_images)
        quantizer = replace(shape.quantizer, codebook_size=size, **EVEN_CODEBOOK)
        fields = dict(quantizer=quantizer, **square(sources.image_size))
        if sources.vae is not None:
            fields["embedding_dim"] = VisionTeacher(sources.vae, reads="image").width
        task = SEEDTaskConfig(
            teacher=sources.vae,
            contrast_steps=contrast_steps,
            joint_contrast_weight=0.2,
            frozen_encoder=False,
            weights=SEEDLossWeights(vq=1.0, semantic=0.5, pixels=2.0),
        )
        return SEEDTask(vistok.create(preset, **fields), task)

    return build
