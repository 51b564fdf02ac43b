"""Recipes of VAR: its multi-scale tokenizer and its next-scale generator."""

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
def var_vqvae_tiny() -> Recipe:
    """A small multi-scale tokenizer, 30 tokens over 4 scales for 32 px images; about a minute on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=60), _var_vqvae("var-vqvae-tiny", LIVE_CODEBOOK))


@recipe
def var_vqvae_emoji() -> Recipe:
    """94 tokens of up to 1,024 codes over 5 scales for 64 px images, 1.7 M parameters, by L2 alone; about 13 minutes on one CPU core."""
    config = emoji_config(max_steps=2400, save_every=400, preview_every=800)
    return Recipe("tokenizer", config, _var_vqvae("var-vqvae-64", LIVE_CODEBOOK))


@recipe
def var_vqvae_imagenet256() -> Recipe:
    """VAR's tokenizer, 680 tokens over 10 scales at 256 px: L2, LPIPS, and a PatchGAN of weight 0.5 from step 20,000; days on 8 GPUs."""
    config = imagenet_config(max_steps=400_000, batch_size=128, weight_decay=0.05, warmup_steps=1000, schedule="constant", workers=8)
    weights = dict(lpips_weight=1.0, gan_weight=0.5, gan_start=20_000)
    return Recipe("tokenizer", config, _var_vqvae("var-vqvae", dict(revive_after=1000), **weights))


@recipe
def var_tiny() -> Recipe:
    """A two-layer VAR over the tokens of a trained multi-scale tokenizer; half a minute on two CPU cores."""
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _var(dict(width=64, depth=2, num_heads=4)))


@recipe
def var_emoji() -> Recipe:
    """Class-conditioned VAR, 4 layers of 160, 2.1 M parameters, over the 94 tokens of var-vqvae-emoji; about 7 minutes on one CPU core."""
    return Recipe("generator", emoji_generator_config(), _var(dict(width=160, depth=4, num_heads=5)))


@recipe
def var_imagenet256() -> Recipe:
    """VAR-d16: 200 epochs of ImageNet's tokens at batch 1024, settings of our own choice, never run; days on 8 large GPUs."""
    config = imagenet_config(max_steps=250_000, batch_size=1024, learning_rate=4e-4, weight_decay=0.05, warmup_steps=5000)
    return Recipe("generator", config, _var(dict(width=1024, depth=16, num_heads=16)))


def _var_vqvae(preset: str, shape: dict, **weights):
    def build(sources: Sources) -> TrainingTask:
        import torch

        import vistok
        from vistok.tokenizers.var_vqvae import scales_up_to
        from vistok.training.tasks.image_losses import ImageLossConfig
        from vistok.training.tasks.perceptual import PerceptualTask

        fields = dict(shape)
        with torch.device("meta"):
            base = vistok.create(preset)
        if sources.image_size is not None:
            pixels = base.settings.reduction
            if sources.image_size % pixels:
                raise ValueError(f"image_size={sources.image_size} must be a multiple of {pixels}, the pixels a cell of {preset}")
            fields["scales"] = scales_up_to(sources.image_size // pixels)
        num_tokens = sum(side**2 for side in fields.get("scales", base.settings.codes.scales))
        fields["codebook_size"] = fitted_codebook_size(base.codebook_size, num_tokens, sources.num_images)
        return PerceptualTask(vistok.create(preset, **fields), ImageLossConfig(**weights))

    return build


def _var(shape: dict, **task):
    def build(sources: Sources) -> TrainingTask:
        from vistok.generators import VAR, VARConfig
        from vistok.tokenizers import VARVQVAE
        from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig

        tokens, parts = sources.tokens, sources.generator_task_parts()
        tokenizer = parts["tokenizer"]
        require_tokenizer(tokenizer, VARVQVAE, sources.tokenizer)
        require_all_tokens(tokens)
        classes = tuple(tokens.classes)
        model = VAR(VARConfig(codes=tokenizer.settings.codes, num_classes=len(classes), classes=classes, **shape)).read_codes_of(tokenizer)
        return GeneratorTask(model, GeneratorTaskConfig(**task), **parts)

    return build
