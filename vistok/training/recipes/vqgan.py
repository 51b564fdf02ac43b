"""Recipes of LlamaGen: its VQ tokenizer, and its class-conditional GPT over the tokenizer's tokens."""

from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _gpt, _square, _tiny, recipe
from vistok.training.task import TrainingTask


@recipe
def vqgan_tiny() -> Recipe:
    """A small VQGAN for 32 px images, without LPIPS and discriminator; about 20 seconds on two CPU cores."""
    shape = dict(image_size=(32, 32), entropy_weight=0.1, revive_after=5)
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=120), _vqgan("vqgan-tiny", shape))


@recipe
def vqgan_imagenet256() -> Recipe:
    """LlamaGen's VQ-16: L2, LPIPS, and a PatchGAN of weight 0.5 from step 20,000; 40 epochs of ImageNet at 256 px, days on 8 large GPUs."""
    config = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, max_steps=400_000, batch_size=128, learning_rate=1e-4, betas=(0.9, 0.95),
        weight_decay=0.05, warmup_steps=0, schedule="constant", ema_decay=0.9999, precision="bf16", compile=True, workers=8,
        save_every=5000, preview_every=5000, process_timeout=600,
    )  # fmt: skip
    return Recipe("tokenizer", config, _vqgan("vq-16", {}, lpips_weight=1.0, gan_weight=0.5, gan_start=20_000))


@recipe
def gpt_imagenet256() -> Recipe:
    """LlamaGen-B: 300 epochs of ImageNet's 256 tokens an image (vqgan-imagenet256, or a converted VQ-16), batches of 256; days on GPUs."""
    config = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, max_steps=1_500_000, batch_size=256, learning_rate=1e-4, betas=(0.9, 0.95),
        weight_decay=0.05, warmup_steps=0, schedule="constant", ema_decay=0.9999, precision="bf16", compile=True, save_every=5000,
        preview_every=20_000, process_timeout=600,
    )  # fmt: skip
    shape = dict(width=768, depth=12, num_heads=12, condition_attention="uniform")
    return Recipe("generator", config, _gpt(shape, condition_dropout=0.1, dropout=0.1))


def _vqgan(preset: str, shape: dict, **weights):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.training.tasks.perceptual import PerceptualTask, PerceptualTaskConfig

        return PerceptualTask(vistok.create(preset, **{**shape, **_square(sources.image_size)}), PerceptualTaskConfig(**weights))

    return build
