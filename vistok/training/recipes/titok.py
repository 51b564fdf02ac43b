"""Recipes of TiTok: one stage, and the two stages of the first paper."""

from dataclasses import replace

from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_config, fitted_codebook_size, imagenet_config, square, tiny_config
from vistok.training.task import TrainingTask

# registers that share one codebook settle on a few codes each without a term for even use; a clustered codebook reached 48 % on the emoji
CODEBOOK = dict(
    quantizer="vq", codebook_update="ema", kmeans_iterations=10, revive_after=10, commitment_weight=0.25, entropy_weight=0.1,
)  # fmt: skip
TITOK_EMOJI = dict(
    image_size=(64, 64), patch_size=8, decoder_patch_size=8, num_registers=32, encoder_width=160, encoder_depth=4, encoder_heads=5,
    decoder_width=160, decoder_depth=4, decoder_heads=5, code_dim=12, codebook_size=1024, cosine=True,
)  # fmt: skip
TITOK_PROXY_TINY = dict(
    num_registers=32, encoder_width=64, encoder_depth=2, encoder_heads=2, decoder_width=64, decoder_depth=2, decoder_heads=2, code_dim=8,
    codebook_size=256,
)  # fmt: skip
PIXELS_TINY = dict(code_dim=32, channels=32, blocks=1)


@recipe
def titok_tiny() -> Recipe:
    """A one-stage TiTok of 16 tokens for 32 px images; about 15 seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=120), _single("titok-tiny", CODEBOOK))


@recipe
def titok_tiny_text() -> Recipe:
    """titok-tiny whose decoder also reads 8 words of the caption (TA-TiTok); about 15 seconds on two CPU cores."""
    shape = dict(CODEBOOK, text_width=32, text_tokens=8)
    return Recipe("tokenizer", tiny_config(image_size=32, max_steps=120), _single("titok-tiny", shape, text="hash"))


@recipe
def titok_tiny_stage1() -> Recipe:
    """Stage 1 of a tiny two-stage TiTok: the codes of vistok/emoji-fsq2d, or of the 2D tokenizer --vae; seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=64, max_steps=40), _stage_one(TITOK_PROXY_TINY | CODEBOOK, "vistok/emoji-fsq2d"))


@recipe
def titok_tiny_stage2() -> Recipe:
    """Stage 2 of a tiny two-stage TiTok: --vae is the run of stage 1; seconds on two CPU cores."""
    return Recipe("tokenizer", tiny_config(image_size=64, max_steps=40), _stage_two(PIXELS_TINY))


@recipe
def titok_emoji() -> Recipe:
    """32 tokens of up to 1,024 codes for 64 px images, one stage, 2.6 M parameters; 18 minutes on one CPU core."""
    config = emoji_config(
        max_steps=2200, learning_rate=1e-3, weight_decay=0.02, warmup_steps=100, ema_decay=0.995, save_every=500, preview_every=500
    )
    # with the weight of the tiny recipes every code is used and little said: 13.4 dB at the end against 17.0
    return Recipe("tokenizer", config, _single(TITOK_EMOJI, dict(CODEBOOK, entropy_weight=0.01)))


@recipe
def titok_imagenet256() -> Recipe:
    """The published single-stage TiTok-BL-64 (64 tokens of 8,192 codes): 650,000 steps of 256 photos, days on 8 large GPUs.

    Loss as far as the house has it: L2 + 1.1 LPIPS + 0.1 PatchGAN from step 200,000 (published: also logits of a ConvNeXt, and LeCam).
    """
    losses = dict(lpips_weight=1.1, gan_weight=0.1, gan_start=200_000)
    return Recipe("tokenizer", _imagenet(max_steps=650_000), _single("titok-bl64", {}, **losses))


@recipe
def titok_text256() -> Recipe:
    """The published TA-TiTok-BL-64 on captioned photos: its decoder reads 77 features of CLIP L's text model; days on 8 large GPUs."""
    losses = dict(lpips_weight=1.1, gan_weight=0.1, gan_start=200_000)
    config = _imagenet(max_steps=650_000, data="captioned/train")
    return Recipe("tokenizer", config, _single("ta-titok-bl64", {}, text="openai/clip-vit-large-patch14", **losses))


@recipe
def titok_imagenet256_stage1() -> Recipe:
    """Stage 1 of the published TiTok-B-64: 1,000,000 steps against the codes of a 16 x 16 VQ tokenizer (--vae); days on 8 large GPUs."""
    return Recipe("tokenizer", _imagenet(max_steps=1_000_000), _stage_one("titok-b64"))


@recipe
def titok_imagenet256_stage2() -> Recipe:
    """Stage 2 of the published TiTok-B-64: 500,000 steps of the decoder and the pixel decoder; --vae is the run of stage 1."""
    losses = dict(lpips_weight=0.1, gan_weight=0.01, gan_start=20_000)
    return Recipe("tokenizer", _imagenet(max_steps=500_000), _stage_two({}, **losses))


def _imagenet(**changes) -> TrainConfig:
    base = imagenet_config(
        batch_size=256, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=10_000, final_fraction=0.1, ema_decay=0.999, workers=8
    )
    return replace(base, **changes)


def _settings(shape: str | dict, **changes):
    """TiTokConfig of a preset's name or of fields, with changes."""
    import torch

    import vistok
    from vistok.tokenizers.titok import TiTokConfig

    if isinstance(shape, dict):
        return TiTokConfig(**{**shape, **changes})
    with torch.device("meta"):
        return vistok.create(shape, **changes).settings


def _single(shape: str | dict, changes: dict, **task):
    def build(sources: Sources) -> TrainingTask:
        from vistok.tokenizers.titok import TiTok
        from vistok.training.tasks.titok import TiTokTask, TiTokTaskConfig

        settings = _settings(shape, **changes, **square(sources.image_size))
        size = fitted_codebook_size(settings.codebook_size, settings.num_registers, sources.num_images)
        return TiTokTask(TiTok(replace(settings, codebook_size=size)), TiTokTaskConfig(**task))

    return build


def _stage_one(shape: str | dict, default_teacher: str | None = None, **task):
    """The teacher decides image size, grid and proxy codes; the tokens' shape is the recipe's."""

    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.tokenizers.titok import TiTok
        from vistok.training.tasks.titok import TiTokTask, TiTokTaskConfig

        source = sources.vae or default_teacher
        if source is None:
            raise ValueError("stage 1 learns the codes of a trained 2D tokenizer: --vae NAME or FOLDER")
        teacher = vistok.load(source)
        layout = getattr(teacher, "layout", None)
        if getattr(teacher, "codebook_size", None) is None or layout.kind != "grid":
            raise ValueError(f"{source} is no 2D tokenizer with ids, so it cannot teach stage 1")
        size = tuple(teacher.settings.image_size)
        if sources.image_size not in (None, *size):
            raise ValueError(f"{source} reads images of {size}; stage 1 cannot use image_size={sources.image_size}")
        patch = size[0] // layout.shape[0]
        fields = dict(
            image_size=size, patch_size=patch, decoder_patch_size=patch, target="proxy", proxy_codebook_size=teacher.codebook_size,
            pixel_decoder=None, interleaved_head=False, cosine=True,
        )  # fmt: skip
        return TiTokTask(TiTok(_settings(shape, **fields)), TiTokTaskConfig(stage="proxy", **task), teacher=teacher)

    return build


def _stage_two(pixels: dict, **task):
    def build(sources: Sources) -> TrainingTask:
        import vistok
        from vistok.tokenizers.maskgit_vqgan import PixelDecoderConfig
        from vistok.tokenizers.titok import TiTok
        from vistok.training.tasks.titok import TiTokTask, TiTokTaskConfig, begin_stage_two

        if sources.vae is None:
            raise ValueError("stage 2 continues a run of stage 1: --vae RUN")
        first = vistok.load(sources.vae)
        if not isinstance(first, TiTok) or first.settings.target != "proxy":
            raise ValueError(f"{sources.vae} is no TiTok of stage 1 (it does not predict proxy codes)")
        levels = first.settings.decoder_patch_size.bit_length()  # a patch of 2^(S - 1) pixels takes S resolutions
        multipliers = PixelDecoderConfig().multipliers
        fitted = (multipliers[:1] * levels + multipliers)[-levels:] if levels > len(multipliers) else multipliers[:levels]
        settings = replace(first.settings, pixel_decoder=PixelDecoderConfig(**{"multipliers": fitted, **pixels}))
        return TiTokTask(begin_stage_two(first, settings), TiTokTaskConfig(stage="pixels", **task))

    return build
