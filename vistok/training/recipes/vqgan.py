"""Recipes of LlamaGen: its VQ tokenizer, and its class-conditional GPT over the tokenizer's tokens."""

from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes import Recipe, Sources, _codebook_size, _gpt, _square, _tiny, recipe
from vistok.training.task import TrainingTask

CODEBOOK = dict(codebook_update="ema", kmeans_iterations=10, revive_after=20)


@recipe
def vqgan_tiny() -> Recipe:
    """A small VQGAN for 32 px images, without LPIPS and discriminator; about 20 seconds on two CPU cores."""
    shape = dict(CODEBOOK, image_size=(32, 32))
    return Recipe("tokenizer", _tiny(image_size=32, max_steps=120), _vqgan("vqgan-tiny", shape))


@recipe
def vqgan_emoji() -> Recipe:
    """64 tokens of up to 1,024 codes for 64 px images, 1.7 M parameters, by L2 alone; about 13 minutes on one CPU core."""
    config = TrainConfig(
        out=Path(), data="emoji", image_size=64, max_steps=2400, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.01,
        warmup_steps=50, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, shift=4, save_every=400,
        preview_every=800, log_every=20,
    )  # fmt: skip
    return Recipe("tokenizer", config, _vqgan("vqgan-64", CODEBOOK))


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
        import torch

        import vistok
        from vistok.training.tasks.image_losses import ImageLossConfig
        from vistok.training.tasks.perceptual import PerceptualTask

        fields = {**shape, **_square(sources.image_size)}
        with torch.device("meta"):
            planned = vistok.create(preset, **fields)
        fields["codebook_size"] = _codebook_size(planned.codebook_size, planned.max_tokens, sources.num_images)
        return PerceptualTask(vistok.create(preset, **fields), ImageLossConfig(**weights))

    return build
