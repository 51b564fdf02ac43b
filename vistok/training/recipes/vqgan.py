"""Recipes of VQGAN, LlamaGen's tokenizer among them; its GPT is in gpt.py."""

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import LIVE_CODEBOOK, emoji_config, fitted_codebook_size, imagenet_config, square, tiny_config
from vistok.training.task import TrainingTask


@recipe
def vqgan_tiny() -> Recipe:
    """A small VQGAN for 32 px images, without LPIPS and discriminator; about 20 seconds on two CPU cores."""
    shape = dict(LIVE_CODEBOOK, image_size=(32, 32))
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=120), _vqgan("vqgan-tiny", shape))


@recipe
def vqgan_emoji() -> Recipe:
    """64 tokens of up to 1,024 codes for 64 px images, 1.7 M parameters, by L2 alone; about 12 minutes on one CPU core."""
    config = emoji_config(max_steps=2400, save_every=400, preview_every=800)
    return Recipe("tokenizer", config, _vqgan("vqgan-64", LIVE_CODEBOOK))


@recipe
def vqgan_imagenet256() -> Recipe:
    """LlamaGen's VQ-16: L2, LPIPS, and a PatchGAN of weight 0.5 from step 20,000; 40 epochs of ImageNet at 256 px, days on 8 large GPUs."""
    config = imagenet_config(max_steps=400_000, batch_size=128, weight_decay=0.05, warmup_steps=0, schedule="constant", workers=8)
    return Recipe("tokenizer", config, _vqgan("vq-16", {}, lpips_weight=1.0, gan_weight=0.5, gan_start=20_000))


def _vqgan(preset: str, shape: dict, **weights):
    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.training.tasks.image_losses import ImageLossConfig
        from vistok.training.tasks.perceptual import PerceptualTask

        fields = {**shape, **square(sources.image_size)}
        with torch.device("meta"):
            planned = vistok.create(preset, **fields)
        fields["codebook_size"] = fitted_codebook_size(planned.codebook_size, planned.max_tokens, sources.num_images)
        return PerceptualTask(vistok.create(preset, **fields), ImageLossConfig(**weights))

    return build
