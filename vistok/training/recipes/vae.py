"""Recipes of the KL-VAE."""

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_config, imagenet_config, square, tiny_config
from vistok.training.task import TrainingTask

VAE_EMOJI = dict(
    image_size=(64, 64), latent_channels=8, stem=4, block_channels=(48, 96), layers_per_block=2, norm_groups=16, mid_attention=False
)


@recipe
def vae_tiny() -> Recipe:
    """A KL-VAE for 32 px images; about 10 seconds on two CPU cores."""
    shape = dict(image_size=(32, 32), latent_channels=4, stem=4, block_channels=(16, 32), layers_per_block=1, norm_groups=8)
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=40), _vae(shape, kl_weight=1e-3))


@recipe
def vae_emoji() -> Recipe:
    """The KL-VAE under emoji-flextok: 64 px to 8 x 8 x 8 latents; about 10 minutes on one CPU core."""
    config = emoji_config(max_steps=2000, learning_rate=1.5e-3, save_every=200, preview_every=200, log_every=10)
    return Recipe("tokenizer", config, _vae(VAE_EMOJI, kl_weight=1e-3))


@recipe
def vae_imagenet256() -> Recipe:
    """A KL-VAE of the published shape (f8, 16 channels) with LPIPS and a PatchGAN, for folders of 256 px photos; days on 8 large GPUs."""
    config = imagenet_config(max_steps=500_000, batch_size=256, warmup_steps=1000, workers=8)
    return Recipe("tokenizer", config, _vae({"latent_channels": 16}, kl_weight=1e-6, lpips_weight=1.0, gan_weight=0.1, gan_start=20_000))


def _vae(shape: dict, **weights):
    def build(sources: Sources) -> TrainingTask:
        from vistok.tokenizers.vae import KLVAE, VAEConfig
        from vistok.training.tasks.vae import VAETask, VAETaskConfig

        return VAETask(KLVAE(VAEConfig(**{**shape, **square(sources.image_size)})), VAETaskConfig(**weights))

    return build
