"""Recipes of FlexTok."""

from dataclasses import replace
from typing import Any

import torch

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_config, imagenet_config, square, tiny_config
from vistok.training.task import TrainingTask

FLEXTOK_EMOJI = dict(
    image_size=(64, 64), patch_size=(2, 2), max_grid=(4, 4), num_registers=64, levels=(8, 5, 5, 5), encoder_width=160, encoder_depth=3,
    decoder_width=160, decoder_depth=4, head_width=32, decoder_head_width=32, max_time=1.0, decode_steps=10, decode_guidance_scale=2.5,
)  # fmt: skip
FLEXTOK_EMOJI_TASK = dict(shared_length=True, noise_share=0.3, open_gates=True, cached_views=8)


@recipe
def flextok_tiny() -> Recipe:
    """A FlexTok of 16 tokens on the pixels of 32 px images; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=40), _flextok("flextok-tiny", open_gates=True, noise_share=0.25))


@recipe
def flextok_emoji() -> Recipe:
    """64 tokens of 1,000 codes on the latents of emoji-vae; between one and two hours on a CPU core."""
    config = emoji_config(
        max_steps=14_000, batch_size=32, learning_rate=1.5e-3, weight_decay=0.02, warmup_steps=200, ema_decay=0.999, save_every=500,
        preview_every=1000, log_every=50, shift=0,
    )  # fmt: skip
    return Recipe("tokenizer", config, _flextok(FLEXTOK_EMOJI, "vistok/emoji-vae", **FLEXTOK_EMOJI_TASK))


@recipe
def flextok_imagenet256() -> Recipe:
    """The published d12-d12 (256 tokens, 64,000 codes) on the latents of a 16-channel VAE (--vae); weeks of one large GPU, so use eight.

    Schedule after the paper's appendix as far as it is public: pow2 nested dropout, mode time sampling 0.25, REPA on DINOv2-L, bf16.
    """
    config = imagenet_config(
        max_steps=390_000, batch_size=1024, learning_rate=6e-4, betas=(0.9, 0.99), weight_decay=0.05, warmup_steps=5000, workers=8
    )
    task = dict(null_dropout=0.2, repa="vit_large_patch14_dinov2.lvd142m", cached_views=0)
    return Recipe("tokenizer", config, _flextok("flextok-d12-d12", **task))


def _resized(settings: Any, image_size: int | None) -> Any:
    """A FlexTokConfig for square images of this size, its position table large enough; unchanged for None."""
    if image_size is None:
        return settings
    grid = tuple(max(table, image_size // pixels) for table, pixels in zip(settings.max_grid, settings.reduction, strict=True))
    return replace(settings, max_grid=grid, **square(image_size))


def _flextok(shape: str | dict, default_vae: str | None = None, **task):
    """shape: a preset's name or fields of FlexTokConfig; its VAE is replaced by the one in the sources, weights and all."""

    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
        from vistok.tokenizers.vae import KLVAE
        from vistok.training.tasks.flextok import FlexTokTask, FlexTokTaskConfig

        source = sources.vae or default_vae
        vae = vistok.load(source) if source else None
        if vae is not None and not isinstance(vae, KLVAE):
            raise ValueError(f"{source} is a {type(vae).__name__}, not a KL-VAE")
        if isinstance(shape, dict):
            settings = FlexTokConfig(vae=vae.settings, **shape)
        else:
            with torch.device("meta"):
                settings = vistok.create(shape, **({"vae": vae.settings} if vae else {})).settings
        model = FlexTok(_resized(settings, sources.image_size))
        if model.vae is not None:
            if vae is None:
                raise ValueError("this recipe works on latents and needs a trained VAE: --vae NAME or FOLDER")
            model.vae.load_state_dict(vae.state_dict())
        return FlexTokTask(model, FlexTokTaskConfig(**task))

    return build
