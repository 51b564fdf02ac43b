"""TokenFlow: one token says what is there and how it looks; a semantic and a pixel codebook behind one index.

Qu et al. 2024, arXiv 2412.03069, section 3.

    semantic  a = Linear(tanh(Linear(ViT(normalise(x)))))          [B, 32, g, g]
    pixel     p = conv1x1(CNN(x))                                  [B, 8, g, g]
    tokens    residual quantization of [a | p] over growing grids; one id picks the nearest pair of unit codes
    f         the sum of all scales' codes, each enlarged to g x g
    semantic' Linear(tanh(Linear(ViT'(f's first 32 channels))))    trained towards a teacher's tokens
    x'        CNN'(conv1x1(f's last 8 channels))

Normalisation belongs to the config: TokenFlow-B feeds images in [-1, 1] to CLIP as they are, the others take mean and standard deviation.
Where the image does not match the grid of the CNN (SigLIP: 384 px, 27 x 27 patches), it is resized, bicubic, on its way in and out.

B images, g side of the last grid, N tokens = sum of all grids, coarse to fine, d = 40 channels, K codes, E width of the ViTs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.pyramid import PyramidDecoder, PyramidEncoder
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, CodeGroup, VQConfig
from vistok.quantizers.base import check_range
from vistok.quantizers.multiscale import MultiScaleOutput, MultiScaleResidual
from vistok.registry import register
from vistok.tokenizers.base import check_ids, check_images
from vistok.tokenizers.tokenflow_nets import PatchTransformer, SemanticEncoderConfig, build_semantic_encoder
from vistok.tokens import TokenLayout, VisualTokens

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FeatureStrategy = Literal["last_sum", "last_semantic", "all_scales", "residuals"]


@dataclass(frozen=True, kw_only=True)
class TokenFlowConfig:
    """Shape of a TokenFlow tokenizer; the default is TokenFlow-B at 224 px."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels, equal; images must have it."""
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)
    """Sides of the grids, coarse to fine; a single one makes a tokenizer of one scale."""
    encoder: SemanticEncoderConfig = field(default_factory=SemanticEncoderConfig)
    """The semantic encoder."""
    mean: tuple[float, float, float] | None = None
    """Of the semantic encoder's input, for images in [0, 1]; None: it gets the images in [-1, 1] as they are (TokenFlow-B)."""
    std: tuple[float, float, float] | None = None
    """As `mean`."""
    codebook_size: int = 32768
    """K."""
    semantic_dim: int = 32
    """Channels of a semantic code."""
    pixel_dim: int = 8
    """Channels of a pixel code."""
    pixel_weight: float = 1.0
    """How much the pixel distance counts beside the semantic one in the choice of an id."""
    commitment_weight: float = 0.25
    """Of the pull of the features to their codes."""
    entropy_weight: float = 0.0
    """Of the loss that spreads the use of codes; costs K numbers a vector in training."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """Who moves the codes: the optimizer (as published), or a moving average of the vectors that chose them."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first training batch that place the codes; 0 (as published): they start random."""
    revive_after: int = 0
    """A code that no vector chose in this many training steps starts anew at a vector of the batch; 0 (as published): never."""
    pixel_patch: int = 1
    """Pixels a side that the CNNs fold into channels; 1 as published, 4 is ten times faster."""
    latent_channels: int = 256
    """Channels between the CNNs and the 1x1 convolutions."""
    pixel_width: int = 128
    """Channels of the first level of the pixel encoder."""
    pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels a level of the pixel encoder, in units of its width."""
    pixel_blocks: int = 2
    """Residual blocks a level of the pixel encoder."""
    decoder_width: int = 128
    """As pixel_width, of the pixel decoder; 256 in the enhanced one."""
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """As pixel_multipliers, largest image first."""
    decoder_blocks: int = 2
    """As pixel_blocks (the decoder has one more a level); 4 in the enhanced one."""
    norm_groups: int = 32
    """Groups of the CNNs' group norms."""
    semantic_decoder_depth: int = 3
    """Blocks of the semantic decoder."""
    semantic_decoder_heads: int = 12
    """Its attention heads, 12 whatever the width in every published model."""
    semantic_decoder_hidden: int = 3072
    """Width of its feed-forward layers."""
    semantic_decoder_grid: int = 14
    """Side of its position table; resized when the last grid differs."""
    teacher_width: int = 512
    """Channels of the teacher's tokens."""
    decoded_size: int | None = None
    """Side of decoded images, where it is not that of the images that go in."""

    def __post_init__(self):
        if self.image_size[0] != self.image_size[1]:
            raise ValueError(f"image_size={self.image_size} must be square")
        if self.pixel_patch < 1:
            raise ValueError(f"pixel_patch={self.pixel_patch} must be at least 1")
        if not self.scales or any(a >= b for a, b in zip((0, *self.scales), self.scales)):
            raise ValueError(f"scales={self.scales} must grow and be positive")
        if (self.mean is None) != (self.std is None) or (self.std is not None and min(self.std) <= 0):
            raise ValueError(f"mean={self.mean} and std={self.std} are given together, std positive")
        if self.encoder.kind != "timm" and self.image_size[0] // self.encoder.patch_size != self.grid:
            made = self.image_size[0] // self.encoder.patch_size
            raise ValueError(f"{self.image_size[0]} px make {made} patches a side, but the last of scales={self.scales} must be that")
        if self.encoder.kind == "siglip" and self.encoder.table_grid != self.grid:
            raise ValueError(
                f"a siglip encoder has one position for each of {self.grid} x {self.grid} patches, not {self.encoder.table_grid}"
            )
        if not 1 <= self.pixel_blocks <= 100 or not 1 <= self.decoder_blocks <= 100 or not 0 <= self.semantic_decoder_depth <= 100:
            raise ValueError("pixel_blocks and decoder_blocks must be 1 to 100, semantic_decoder_depth 0 to 100")

    @property
    def grid(self) -> int:
        """g: side of the last scale."""
        return self.scales[-1]

    @property
    def pixel_size(self) -> int:
        """Side of the images the pixel encoder sees."""
        return self.grid * 2 ** (len(self.pixel_multipliers) - 1) * self.pixel_patch


@dataclass(frozen=True)
class TokenFlowOutput(TokenizerOutput):
    """semantic: decoded semantic tokens [B, g^2, teacher_width]; ids of a left-out scale are -1."""

    semantic: Tensor | None = None


@register
class TokenFlow(VisualModel):
    """Two encoders, one multi-scale quantizer with two codebooks, two decoders."""

    Config = TokenFlowConfig

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        E, groups = config.encoder.width, config.norm_groups
        self.semantic_encoder = build_semantic_encoder(config.encoder, image_size=config.image_size[0])
        self.to_semantic_code = _task_layer(E, config.semantic_dim)
        self.pixel_encoder = PyramidEncoder(
            config.latent_channels, width=config.pixel_width, multipliers=config.pixel_multipliers, blocks=config.pixel_blocks,
            attention=(len(config.pixel_multipliers) - 1,), norm_groups=groups, patch=config.pixel_patch,
        )  # fmt: skip
        self.to_pixel_code = nn.Conv2d(config.latent_channels, config.pixel_dim, 1)
        vq = VQConfig(
            codebook_size=config.codebook_size, code_dim=config.semantic_dim + config.pixel_dim,
            groups=(CodeGroup(dim=config.semantic_dim, metric="cosine"),
                    CodeGroup(dim=config.pixel_dim, weight=config.pixel_weight, metric="cosine")),
            commitment_weight=config.commitment_weight, entropy_weight=config.entropy_weight,
            update=config.codebook_update, kmeans_iterations=config.kmeans_iterations, revive_after=config.revive_after,
        )  # fmt: skip
        self.quantizer = MultiScaleResidual(VQ(vq), [(side, side) for side in config.scales])
        self.from_pixel_code = nn.Conv2d(config.pixel_dim, config.latent_channels, 1)
        self.pixel_decoder = PyramidDecoder(
            config.latent_channels, width=config.decoder_width, multipliers=config.decoder_multipliers, blocks=config.decoder_blocks,
            attention=(len(config.decoder_multipliers) - 1,), norm_groups=groups, patch=config.pixel_patch,
        )  # fmt: skip
        self.semantic_decoder = PatchTransformer(
            config.semantic_dim, width=E, depth=config.semantic_decoder_depth, num_heads=config.semantic_decoder_heads,
            hidden=config.semantic_decoder_hidden, patch_size=1, table_grid=config.semantic_decoder_grid, norm_eps=1e-6, approximate="none",
        )  # fmt: skip
        self.from_semantic = _task_layer(E, config.teacher_width)
        self.codebook_size, self.code_dim = config.codebook_size, vq.code_dim
        self.layout = TokenLayout("scales", self.quantizer.scales)
        self.min_tokens, self.max_tokens = self.quantizer.sizes[0], self.layout.num_tokens

    # -- encode ------------------------------------------------------------------------------------------------------------------------

    def normalize(self, images: Tensor) -> Tensor:
        """What the semantic encoder sees of images [B, 3, H, W] in [-1, 1]."""
        if self.settings.mean is None:
            return images
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.settings.mean, self.settings.std))
        return (((images + 1) * 127.5).clamp(0, 255) / 255 - mean) / std

    def semantic_tokens(self, images: Tensor) -> Tensor:
        """The semantic encoder's patch tokens [B, g^2, E] of images [B, 3, H, W]."""
        return self.semantic_encoder(self.normalize(images.to(self.dtype)))

    def semantic_features(self, images: Tensor) -> Tensor:
        """The semantic channels of `features`, [B, semantic_dim, g, g] float32.

        Raises ValueError: images have another size, or a timm tower makes another number of tokens.
        """
        size, g = self.settings.image_size, self.settings.grid
        check_images(images, multiple=1)
        if tuple(images.shape[-2:]) != size:
            raise ValueError(f"images are {images.shape[-2]} x {images.shape[-1]} but this TokenFlow takes {size[0]} x {size[1]} only")
        tokens = self.semantic_tokens(images)
        if tokens.shape[1] != g * g:
            raise ValueError(
                f"{self.settings.encoder.timm_name} makes {tokens.shape[1]} tokens of such an image, the last scale is {g} x {g}"
            )
        return self.to_semantic_code(tokens).transpose(1, 2).unflatten(2, (g, g)).float()

    def features(self, images: Tensor) -> Tensor:
        """[B, d, g, g] float32, semantic channels first, not quantized and not normalised."""
        semantic = self.semantic_features(images)
        pixel = self.to_pixel_code(self.pixel_encoder(_resize(images.to(self.dtype), self.settings.pixel_size)))
        return torch.cat([semantic, pixel.float()], dim=1)

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, N], coarse to fine, each grid in raster order; deterministic, so generators are not used.

        num_tokens: how many, a number of whole scales. Raises ValueError: it ends inside a scale, or images have another size.
        """
        num_scales = self.quantizer.num_scales(self.max_tokens if num_tokens is None else num_tokens)
        return VisualTokens.from_ids(self.quantizer.encode(self.features(images), num_scales=num_scales).ids, self.layout)

    # -- decode ------------------------------------------------------------------------------------------------------------------------

    def total(self, tokens: VisualTokens) -> Tensor:
        """f [B, d, g, g] float32: the sum of the codes of each image's scales.

        Raises ValueError: an id outside the codebook, or a count that ends inside a scale.
        """
        ids = check_ids(tokens, self.codebook_size, "tokenflow")
        totals = ids.new_zeros(len(ids), self.code_dim, *self.quantizer.scales[-1], dtype=torch.float32)
        for count in tokens.counts.unique().tolist():
            rows = tokens.counts == count
            totals[rows] = self.quantizer.decode(ids[rows, :count])
        return totals

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens of whole scales, also the first few; deterministic, so generators are not used."""
        return self.decode_pixels(self.total(tokens)).clamp(-1, 1).float()

    @torch.no_grad()
    def decode_semantic(self, tokens: VisualTokens) -> Tensor:
        """Semantic tokens [B, g^2, teacher_width]: what the teacher would say of the image."""
        return self.decode_meaning(self.total(tokens))

    def decode_pixels(self, total: Tensor) -> Tensor:
        """Images [B, 3, H, W], unclamped, of f [B, d, g, g]."""
        pixel = total[:, self.settings.semantic_dim :].to(self.dtype)
        size = self.settings.decoded_size or self.settings.image_size[0]
        return _resize(self.pixel_decoder(self.from_pixel_code(pixel)), size)

    def decode_meaning(self, total: Tensor) -> Tensor:
        """Semantic tokens [B, g^2, teacher_width] of f [B, d, g, g]."""
        semantic = total[:, : self.settings.semantic_dim].to(self.dtype)
        return self.from_semantic(self.semantic_decoder(semantic))

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] of ids [...]: a semantic and a pixel half, each of unit length.

        Raises ValueError: an id is outside [0, K).
        """
        check_range(ids, self.codebook_size)
        return self.quantizer.quantizer.decode(ids)

    @torch.no_grad()
    def visual_features(self, tokens: VisualTokens, strategy: FeatureStrategy = "last_sum") -> Tensor:
        """What a language model reads of an image, [B, T, C].

        last_sum: f, T = g^2, C = d (the paper's choice). last_semantic: its semantic channels. all_scales: f after each scale, on that
        scale's grid, T = N. residuals: each scale's own codes, T = N. Source: section 4.4, the ablation of the input strategy.
        Raises ValueError: another strategy, or (all_scales, residuals) images with different counts.
        """
        if strategy in ("last_sum", "last_semantic"):
            channels = self.settings.semantic_dim if strategy == "last_semantic" else self.code_dim
            return self.total(tokens)[:, :channels].flatten(2).transpose(1, 2)
        if strategy not in ("all_scales", "residuals"):
            raise ValueError(f"strategy={strategy!r}; allowed: last_sum, last_semantic, all_scales, residuals")
        if bool((tokens.counts != tokens.counts[0]).any()):
            raise ValueError(f"{strategy} needs images with equally many tokens, got {tokens.counts.tolist()}")
        ids = check_ids(tokens, self.codebook_size, "tokenflow")
        maps = self.quantizer.running_sums(ids) if strategy == "all_scales" else self.quantizer.maps(ids)
        return torch.cat([part.flatten(2) for part in maps], dim=2).transpose(1, 2)

    # -- train -------------------------------------------------------------------------------------------------------------------------

    def quantize(self, images: Tensor, *, dropped: int | None = None) -> MultiScaleOutput:
        """Ids and summed codes of images [B, 3, H, W] with gradients and losses; dropped: number of a scale to leave out."""
        return self.quantizer(self.features(images), dropped=dropped)

    def unquantized_meaning(self, images: Tensor) -> Tensor:
        """Semantic tokens [B, g^2, teacher_width] by the semantic half alone, as if there were a code for every vector; with gradients."""
        semantic = self.semantic_features(images)
        no_pixels = semantic.new_zeros(len(semantic), self.settings.pixel_dim, *semantic.shape[2:])
        return self.decode_meaning(self.quantizer.unquantized(torch.cat([semantic, no_pixels], dim=1)))

    def forward(self, images: Tensor, *, dropped: int | None = None) -> TokenFlowOutput:
        """Training pass on images [B, 3, H, W] in [-1, 1]: "mse" of the reconstruction and the quantizer's losses; the task adds what a
        teacher says. dropped: number of a scale to leave out."""
        out = self.quantize(images, dropped=dropped)
        reconstruction = self.decode_pixels(out.total)
        target = _resize(images, reconstruction.shape[-1])
        losses = {"mse": (reconstruction.float() - target.float()).square().mean(), **out.losses}
        ids = out.ids
        if dropped is not None:
            start = sum(self.quantizer.sizes[:dropped])
            ids = torch.cat([ids[:, :start], ids.new_full((len(ids), self.quantizer.sizes[dropped]), -1), ids[:, start:]], dim=1)
        return TokenFlowOutput(reconstruction, VisualTokens.from_ids(ids, self.layout), losses, self.decode_meaning(out.total))


def _task_layer(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


def _resize(images: Tensor, size: int) -> Tensor:
    return images if tuple(images.shape[-2:]) == (size, size) else F.interpolate(images, size=(size, size), mode="bicubic")


# -- presets ----------------------------------------------------------------------------------------------------------------------------


@register
def tokenflow_b(**overrides) -> TokenFlow:
    """TokenFlow-B at 256 px as published: CLIP ViT-B/16, 9 scales, 817 tokens, enhanced decoder; 377 M parameters."""
    base = TokenFlowConfig(
        image_size=(256, 256), scales=(1, 2, 4, 6, 8, 10, 12, 14, 16), decoder_width=256, decoder_blocks=4,
    )  # fmt: skip
    return TokenFlow(replace(base, **overrides))


@register
def tokenflow_l(**overrides) -> TokenFlow:
    """TokenFlow-L at 256 px: ViTamin-XL of timm, 9 scales, 817 tokens; 560 M parameters (its weights were never published)."""
    encoder = SemanticEncoderConfig(kind="timm", timm_name="vitamin_xlarge_256", width=1152)
    base = TokenFlowConfig(
        image_size=(256, 256), scales=(1, 2, 4, 6, 8, 10, 12, 14, 16), encoder=encoder, mean=CLIP_MEAN, std=CLIP_STD,
        semantic_decoder_hidden=4608, semantic_decoder_grid=16, teacher_width=1152,
    )  # fmt: skip
    return TokenFlow(replace(base, **overrides))


@register
def tokenflow_xl(**overrides) -> TokenFlow:
    """TokenFlow-XL at 384 px as published: SigLIP-so400m/14, 15 scales, 2,227 tokens; 524 M parameters in use."""
    encoder = SemanticEncoderConfig(kind="siglip", width=1152, depth=26, num_heads=16, hidden=4304, patch_size=14, table_grid=27)
    base = TokenFlowConfig(
        image_size=(384, 384), scales=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27), encoder=encoder, mean=(0.5,) * 3, std=(0.5,) * 3,
        semantic_decoder_hidden=4608, semantic_decoder_grid=27, teacher_width=1152,
    )  # fmt: skip
    return TokenFlow(replace(base, **overrides))


@register
def tokenflow_small(**overrides) -> TokenFlow:
    """For 64 px images: 1 + 4 + 16 + 64 tokens of 2,048 codes; 1.9 M parameters."""
    return TokenFlow(replace(_SMALL, **overrides))


@register
def tokenflow_tiny(**overrides) -> TokenFlow:
    """The smallest that still works, 32 px; for tests and tours."""
    encoder = SemanticEncoderConfig(kind="siglip", width=32, depth=1, num_heads=2, hidden=64, patch_size=8, table_grid=4)
    base = replace(
        _SMALL, image_size=(32, 32), scales=(1, 2, 4), encoder=encoder, codebook_size=64, semantic_dim=8, pixel_dim=4, pixel_patch=1,
        latent_channels=16, pixel_width=16, pixel_multipliers=(1, 1, 1, 1), pixel_blocks=1, decoder_width=16,
        decoder_multipliers=(1, 1, 1, 1), decoder_blocks=1, semantic_decoder_depth=1, semantic_decoder_heads=2, semantic_decoder_hidden=64,
        semantic_decoder_grid=4, teacher_width=32,
    )  # fmt: skip
    return TokenFlow(replace(base, **overrides))


_SMALL = TokenFlowConfig(
    image_size=(64, 64), scales=(1, 2, 4, 8), mean=(0.5,) * 3, std=(0.5,) * 3, codebook_size=2048, semantic_dim=16, pixel_dim=8,
    encoder=SemanticEncoderConfig(kind="siglip", width=96, depth=3, num_heads=4, hidden=256, patch_size=8, table_grid=8),
    pixel_patch=4, latent_channels=64, pixel_width=24, pixel_multipliers=(2, 3), pixel_blocks=1, decoder_width=32,
    decoder_multipliers=(2, 3), decoder_blocks=1, norm_groups=8, semantic_decoder_depth=1, semantic_decoder_heads=4,
    semantic_decoder_hidden=256, semantic_decoder_grid=8, teacher_width=64,
)  # fmt: skip
