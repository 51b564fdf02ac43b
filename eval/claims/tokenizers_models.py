"""The tokenizers that `eval.claims.tokenizers` compares: 64 px images, about 1.3 million parameters each, 1,024 codes (FSQ: 1,000).

| name | tokens | order | learns from |
|---|---|---|---|
| vq | 8 x 8 grid | raster | pixels |
| titok | 32 | 1D, all alike | pixels |
| flextok | 32, any prefix decodes | 1D, coarse to fine | latents of its own VAE |
| seed | 32 | 1D, causal | captions, then pixels too |
| lavit | as many of 64 as the image needs | kept patches in raster order | pixels |
| lavit-fixed | all 64 | raster | pixels |
| tokenflow | 1 + 4 + 16 + 64 | scales | pixels and words |
| tokenflow-single | 1 + 4 + 16 + 64 | scales | pixels and words |

Every codebook is compared by cosine where the method leaves a choice, starts by k-means, follows a moving average and revives idle codes.
Convolutions run on folded pixels (4 x 4 into channels), so that each model gets a comparable number of steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vistok.layers.pyramid import PyramidDecoder, PyramidEncoder
from vistok.quantizers import VQ, VQConfig
from vistok.quantizers.multiscale import MultiScaleResidual
from vistok.registry import register
from vistok.tokenizers.base import pyramid_shape
from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
from vistok.tokenizers.lavit import LaVIT, LaVITConfig
from vistok.tokenizers.seed import CODES, SEED, SEEDConfig, SEEDLossWeights, SEEDVisionConfig
from vistok.tokenizers.seed_pixels import EmbeddingDecoderConfig
from vistok.tokenizers.seed_qformer import QFormerConfig
from vistok.tokenizers.titok import TiTok, TiTokConfig
from vistok.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from vistok.tokenizers.tokenflow_nets import SemanticEncoderConfig
from vistok.tokenizers.vae import KLVAE, VAEConfig
from vistok.tokenizers.vqgan import VQGAN, VQGANConfig
from vistok.tokens import TokenLayout
from vistok.training.task import TrainingTask
from vistok.training.tasks.flextok import FlexTokTask, FlexTokTaskConfig
from vistok.training.tasks.lavit import LaVITTask, LaVITTaskConfig
from vistok.training.tasks.seed import SEEDTask, SEEDTaskConfig
from vistok.training.tasks.titok import TiTokTask
from vistok.training.tasks.tokenflow import TokenFlowTask, TokenFlowTaskConfig
from vistok.training.tasks.tokenizer import TokenizerTask
from vistok.training.tasks.vae import VAETask, VAETaskConfig

SIZE, FOLD, CODEBOOK_SIZE = 64, 4, 1024
MOVING = dict(update="ema", kmeans_iterations=10, revive_after=20)


@register
class FoldedVQ(VQGAN):
    """VQGAN on pixels folded 4 x 4 into channels, its codebook a moving average.

    The same as a VQGANConfig with pixel_patch=4 and codebook_update="ema", but for the order in which a seed draws the weights, which is
    that of the published table.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        shape = {**pyramid_shape(config), "patch": FOLD}
        self.encoder = PyramidEncoder(config.latent_channels, **shape)
        self.decoder = PyramidDecoder(config.latent_channels, **shape)
        self.quantizer = VQ(replace(self.quantizer.config, **MOVING))
        side = config.image_size[0] // config.reduction // FOLD
        self.layout = TokenLayout("grid", (side, side))
        self.min_tokens = self.max_tokens = side * side


@register
class SingleCodebookTokenFlow(TokenFlow):
    """TokenFlow with one unit code of all channels in place of a pair of unit codes: the share of each half is up to training."""

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        pair = self.quantizer.quantizer.config
        self.quantizer = MultiScaleResidual(VQ(replace(pair, groups=(), metric="cosine")), self.quantizer.scales)


@dataclass(frozen=True)
class Entry:
    """One tokenizer of the table.

    order: "raster", "1d", "causal 1d", "dynamic" or "scales". build: (max_steps, trained VAE or None) -> the task.
    num_tokens: tokens every image gets; None: the model's own choice. stage: share of the steps after which the task enters its second
    stage, where steps cost something else.
    """

    order: str
    build: Callable[[int, KLVAE | None], TrainingTask]
    num_tokens: int | None = None
    stage: float = 0.0
    needs_vae: bool = False
    learning_rate: float = 1e-3


def vae_task() -> TrainingTask:
    """The VAE under flextok, trained on a share of its time."""
    shape = dict(latent_channels=8, stem=FOLD, block_channels=(24, 48), layers_per_block=1, norm_groups=8, mid_attention=False)
    return VAETask(KLVAE(VAEConfig(image_size=(SIZE, SIZE), **shape)), VAETaskConfig(kl_weight=1e-3))


def _vq(max_steps: int, vae: KLVAE | None) -> TrainingTask:
    config = VQGANConfig(
        image_size=(SIZE, SIZE), width=72, multipliers=(1, 1), blocks=1, latent_channels=48, codebook_size=CODEBOOK_SIZE, code_dim=16,
        norm_groups=8,
    )  # fmt: skip
    return TokenizerTask(FoldedVQ(config))


def _titok(max_steps: int, vae: KLVAE | None) -> TrainingTask:
    config = TiTokConfig(
        image_size=(SIZE, SIZE), patch_size=8, decoder_patch_size=8, num_registers=32, encoder_width=128, encoder_depth=3, encoder_heads=4,
        decoder_width=128, decoder_depth=3, decoder_heads=4, code_dim=16, codebook_size=CODEBOOK_SIZE, quantizer="vq", cosine=True,
        codebook_update="ema", kmeans_iterations=10, revive_after=10, commitment_weight=0.25, entropy_weight=0.01,
    )  # fmt: skip
    return TiTokTask(TiTok(config))


def _flextok(max_steps: int, vae: KLVAE | None) -> TrainingTask:
    config = FlexTokConfig(
        image_size=(SIZE, SIZE), patch_size=(1, 1), max_grid=(8, 8), num_registers=32, levels=(8, 5, 5, 5), encoder_width=96,
        encoder_depth=2, decoder_width=96, decoder_depth=3, head_width=32, decoder_head_width=32, max_time=1.0, decode_steps=10,
        decode_guidance_scale=1.5, vae=vae.settings,
    )  # fmt: skip
    model = FlexTok(config)
    model.vae.load_state_dict(vae.state_dict())
    return FlexTokTask(model, FlexTokTaskConfig(shared_length=True, noise_share=0.3, open_gates=True))


def _seed(max_steps: int, vae: KLVAE | None) -> TrainingTask:
    codes = dict(code_dim=16, codebook_size=CODEBOOK_SIZE, metric="cosine", commitment_weight=0.25, entropy_weight=0.01)
    config = SEEDConfig(
        image_size=(SIZE, SIZE),
        vision=SEEDVisionConfig(patch_size=8, width=96, depth=3, num_heads=4, hidden=256),
        qformer=QFormerConfig(width=96, depth=2, num_heads=4, hidden=256),
        quantizer=replace(CODES, entropy_temperature=0.05, **codes, **MOVING),
        block_depth=1,
        block_heads=4,
        head_widths=(48, 16),
        embedding_dim=192,
        pixels=EmbeddingDecoderConfig(channels=(64, 48, 32), blocks=1),
    )
    weights = SEEDLossWeights(vq=1.0, semantic=0.5, pixels=2.0)
    task = dict(joint_contrast_weight=0.1, frozen_encoder=False, weights=weights, text_dim=64, caption_buckets=512)
    return SEEDTask(SEED(config), SEEDTaskConfig(contrast_steps=int(max_steps * STAGES["seed"]), **task))


def _lavit(keep_ratio: float) -> Callable[[int, KLVAE | None], TrainingTask]:
    def build(max_steps: int, vae: KLVAE | None) -> TrainingTask:
        config = LaVITConfig(
            image_size=(SIZE, SIZE), patch_size=8, vision_width=96, vision_depth=3, vision_heads=4, vision_hidden=256, merger_depth=2,
            merger_heads=4, merger_hidden=256, merger_eps=0.0, decoder_width=96, decoder_depth=2, decoder_heads=4, decoder_hidden=256,
            feature_width=96, pixel_width=64, pixel_depth=3,
            quantizer=VQConfig(codebook_size=CODEBOOK_SIZE, code_dim=16, **MOVING),
        )  # fmt: skip
        start = int(max_steps * STAGES["lavit"])
        return LaVITTask(LaVIT(config), LaVITTaskConfig(keep_ratio=keep_ratio, quantize_start=start))

    return build


def _tokenflow(single: bool) -> Callable[[int, KLVAE | None], TrainingTask]:
    def build(max_steps: int, vae: KLVAE | None) -> TrainingTask:
        config = TokenFlowConfig(
            image_size=(SIZE, SIZE), scales=(1, 2, 4, 8), mean=(0.5,) * 3, std=(0.5,) * 3, codebook_size=CODEBOOK_SIZE, semantic_dim=16,
            pixel_dim=8, pixel_weight=3.0, pixel_patch=FOLD, codebook_update="ema", kmeans_iterations=10, revive_after=20,
            encoder=SemanticEncoderConfig(kind="siglip", width=96, depth=3, num_heads=4, hidden=256, patch_size=8, table_grid=8),
            latent_channels=48, pixel_width=24, pixel_multipliers=(2, 3), pixel_blocks=1, decoder_width=24, decoder_multipliers=(2, 2),
            decoder_blocks=1, norm_groups=8, semantic_decoder_depth=1, semantic_decoder_heads=4, semantic_decoder_hidden=256,
            semantic_decoder_grid=8, teacher_width=64,
        )  # fmt: skip
        model = (SingleCodebookTokenFlow if single else TokenFlow)(config)
        return TokenFlowTask(model, TokenFlowTaskConfig(semantic_weight=0.05))

    return build


STAGES = {"seed": 0.15, "lavit": 0.33}
MODELS = {
    "vq": Entry("raster", _vq, learning_rate=2e-3),
    "titok": Entry("1d", _titok),
    "flextok": Entry("causal 1d", _flextok, needs_vae=True, learning_rate=1.5e-3),
    "seed": Entry("causal 1d", _seed, stage=STAGES["seed"]),
    "lavit": Entry("dynamic", _lavit(0.4), stage=STAGES["lavit"]),
    "lavit-fixed": Entry("raster", _lavit(1.0), num_tokens=64, stage=STAGES["lavit"]),
    "tokenflow": Entry("scales", _tokenflow(False), learning_rate=2e-3),
    "tokenflow-single": Entry("scales", _tokenflow(True), learning_rate=2e-3),
}
