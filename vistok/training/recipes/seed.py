"""Recipes of SEED: both stages in one run, from nothing."""

from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _codebook_size, _square, _tiny, recipe
from vistok.training.task import TrainingTask

# unit vectors, and a term for even use: registers that share one codebook otherwise settle on a code or two each
CODEBOOK = dict(
    metric="cosine", update="ema", commitment_weight=0.25, kmeans_iterations=10, revive_after=20, entropy_weight=0.1,
    entropy_temperature=0.05,
)  # fmt: skip


@recipe
def seed_tiny() -> Recipe:
    """A SEED of 8 tokens for 32 px images: 20 steps with captions or class names, 80 with pixels; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=100), _seed("seed-tiny", contrast_steps=20))


@recipe
def seed_emoji() -> Recipe:
    """32 tokens of up to 1,024 codes for 64 px images, 2.5 M parameters; 700 of 2,100 steps on captions; 12 minutes on one CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=2100, batch_size=32, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.02,
        warmup_steps=100, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.995, flip=False, shift=4,
        save_every=400, preview_every=700, log_every=20,
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
        size = _codebook_size(shape.quantizer.codebook_size, shape.num_registers, sources.num_images)
        quantizer = replace(shape.quantizer, codebook_size=size, **CODEBOOK)
        fields = dict(quantizer=quantizer, **_square(sources.image_size))
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
