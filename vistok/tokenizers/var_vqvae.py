"""VAR's tokenizer: an image as grids of codes from one to full size, each what the coarser ones left out.

Tian et al. 2024 (VAR, arXiv 2404.02905), section 3.2 and algorithms 1 and 2, on the network of VQGAN (Esser et al. 2021, arXiv 2012.09841).

    f     = 3x3 conv(encoder(x))                                   [B, d, h, w]
    r = f; F_0 = 0; for each scale k:                              quantizers/multiscale.py
        id_k = nearest(area(r, s_k));  F_k = F_k-1 + phi_k(bicubic(code of id_k, h w));  r = f - F_k
    x'    = decoder(3x3 conv(F_S));  any F_k decodes: that is a prefix of scales
    loss  = |x' - x|^2 + mean over k of |F_k - sg f|^2 + beta |sg F_k - f|^2       LPIPS and a PatchGAN come from the training task

B images, s_k side of scale k, S scales, h = w = s_S, N = sum of s_k^2 tokens, d code_dim, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.layers.pyramid import PyramidDecoder, PyramidEncoder
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, VQConfig
from vistok.quantizers.base import check_range
from vistok.quantizers.multiscale import MultiScaleResidual
from vistok.quantizers.phi import PhiConvs
from vistok.registry import register
from vistok.tokenizers.base import check_ids, check_images, check_pyramid, pyramid_shape
from vistok.tokens import TokenLayout, VisualTokens

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
USAGE_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class ScaleCodesConfig:
    """Codes over scales: what the tokenizer and its generator must have in common."""

    scales: tuple[int, ...] = SCALES_256
    """Side of each square grid of tokens, coarse to fine."""
    codebook_size: int = 4096
    """K."""
    code_dim: int = 32
    """d."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """How the nearest code is found; codes keep their length either way."""
    num_phis: int = 4
    """Convolutions that the scales share by their place; 1 for all, 0 for one a scale."""
    phi_ratio: float = 0.5
    """r: phi(h) = (1 - r) h + r conv(h)."""

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or self.scales[0] < 1 or any(a >= b for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales={self.scales} must be rising sides of at least 1")
        if self.scales[-1] > 1024 or not 0 <= self.num_phis <= 64:
            raise ValueError(f"scales={self.scales} must not pass 1024 and num_phis={self.num_phis} must be 0 to 64")
        if self.codebook_size < 1 or self.code_dim < 1:
            raise ValueError(f"codebook_size={self.codebook_size} and code_dim={self.code_dim} must be positive")

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens sit."""
        return TokenLayout("scales", tuple((side, side) for side in self.scales))

    def build(self, **training) -> MultiScaleResidual:
        """The codebook and its phis, ready to quantize and to sum up. training: further fields of the codebook's VQConfig."""
        codes = VQConfig(codebook_size=self.codebook_size, code_dim=self.code_dim, metric=self.metric, unit_codes=False, **training)
        phis = PhiConvs(self.code_dim, len(self.scales), count=self.num_phis, ratio=self.phi_ratio)
        return MultiScaleResidual(VQ(codes), self.layout.shape, refine=phis)


@dataclass(frozen=True, kw_only=True)
class VARVQVAEConfig:
    """Shape of the tokenizer; the default is VAR's."""

    codes: ScaleCodesConfig = ScaleCodesConfig()
    """The codebook, the scales and the phis."""
    width: int = 160
    """Channels after the first convolution."""
    pixel_patch: int = 1
    """Pixels a side that the CNNs fold into channels; 1 as published, 4 is ten times faster."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels a resolution, in widths; each but the last halves the grid, so five make f = 16."""
    blocks: int = 2
    """Residual blocks a resolution in the encoder; the decoder has one more."""
    norm_groups: int = 32
    """Groups of the group norms."""
    commitment_weight: float = 0.25
    """beta: weight, in training, of the pull of the features to the codes."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """Who moves the codes in training: the optimizer (as published), or a moving average of the vectors that chose them."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first training batch that place the codes; 0 (as published): they start random."""
    revive_after: int = 0
    """A code that no vector chose in this many training steps takes a vector of the batch; 0: never."""

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        check_pyramid(self)

    @property
    def reduction(self) -> int:
        """f: pixels a cell of the last grid, along each side."""
        return self.pixel_patch * 2 ** (len(self.multipliers) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels; the last scale decides them."""
        return (self.codes.scales[-1] * self.reduction,) * 2


@register
class VARVQVAE(VisualModel):
    """Convolutional encoder, one codebook over all scales, convolutional decoder."""

    Config = VARVQVAEConfig

    def __init__(self, config: VARVQVAEConfig):
        super().__init__(config)
        d = config.codes.code_dim
        shape = pyramid_shape(config)
        self.encoder = PyramidEncoder(d, **shape)
        self.to_code = nn.Conv2d(d, d, 3, padding=1)
        self.quantizer = config.codes.build(
            update=config.codebook_update, kmeans_iterations=config.kmeans_iterations, revive_after=config.revive_after
        )
        self.from_code = nn.Conv2d(d, d, 3, padding=1)
        self.decoder = PyramidDecoder(d, **shape)
        # how often each code was chosen lately, an image, by scale: kept by training, published with the weights
        self.register_buffer("usage", torch.zeros(len(config.codes.scales), config.codes.codebook_size))
        self.codebook_size, self.code_dim = config.codes.codebook_size, d
        self.layout = config.codes.layout
        self.min_tokens, self.max_tokens = self.quantizer.sizes[0], self.quantizer.num_tokens

    def features(self, images: Tensor) -> Tensor:
        """f [B, d, h, w] float32 before quantization. Raises ValueError: images of another size."""
        H, W = self.settings.image_size
        images = check_images(images, multiple=(H, W))
        if tuple(images.shape[-2:]) != (H, W):
            raise ValueError(f"images are {images.shape[-2]} x {images.shape[-1]} but the scales of this tokenizer are made for {H} x {W}")
        return self.to_code(self.encoder(images.to(self.to_code.weight.dtype))).float()

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, N], coarse to fine, row by row in a scale; deterministic, so generators are not used.

        num_tokens: a prefix of whole scales. Raises ValueError: it ends inside a scale; where scales end is said.
        """
        scales = self.quantizer.num_scales(self.max_tokens if num_tokens is None else num_tokens)
        return VisualTokens.from_ids(self.quantizer.encode(self.features(images), num_scales=scales).ids, self.layout)

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; deterministic, so generators are not used.

        tokens: of each image a prefix of whole scales; fewer scales make a smoother picture of full size.
        Raises ValueError: an id outside the codebook, a layout of other scales, or a row that ends inside a scale.
        """
        if tokens.layout != self.layout:
            raise ValueError(f"these tokens lie on {tokens.layout.shape}, this tokenizer decodes {self.layout.shape}")
        numbers = torch.tensor([self.quantizer.num_scales(count) for count in tokens.counts.tolist()], device=tokens.counts.device)
        totals = torch.stack(self.quantizer.totals(check_ids(tokens, self.codebook_size, "var_vqvae")))  # [S', B, d, h, w]
        return self.decode_features(totals[numbers - 1, torch.arange(len(numbers), device=numbers.device)]).float().clamp(-1, 1)

    def decode_features(self, total: Tensor) -> Tensor:
        """Images [B, 3, H, W], unclamped, of summed codes F [B, d, h, w]."""
        return self.decoder(self.from_code(total.to(self.from_code.weight.dtype)))

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] of ids [...]. Raises ValueError: an id is outside [0, K)."""
        check_range(ids, self.codebook_size)
        return self.quantizer.quantizer.decode(ids)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Training pass on images [B, 3, H, W] in [-1, 1]: "mse" of the reconstruction, and "codebook" and "commitment", the pulls between
        features and codes after every scale."""
        f = self.features(images)
        if self.training:
            self.quantizer.start(f)
        quantized = self.quantizer.encode(f.detach())
        totals = torch.stack(self.quantizer.totals(quantized.ids))  # [S, B, d, h, w]
        reconstruction = self.decode_features(f + (totals[-1] - f).detach())
        losses = {
            "mse": (reconstruction.float() - images).square().mean(),
            "codebook": (totals - f.detach()).square().mean(),  # the codes' where they learn by gradient, the phis' always
            "commitment": self.settings.commitment_weight * (f - totals.detach()).square().mean(),
        }
        if self.training:
            self._count(quantized.ids)
            vectors = torch.cat([part.flatten(2).transpose(1, 2) for part in quantized.inputs], dim=1)  # [B, N, d]
            self.quantizer.quantizer.observe(vectors, quantized.ids)
        return TokenizerOutput(reconstruction, VisualTokens.from_ids(quantized.ids, self.layout), losses)

    @torch.no_grad()
    def _count(self, ids: Tensor) -> None:
        for number, part in enumerate(ids.split(self.quantizer.sizes, dim=1)):
            hits = torch.bincount(part.flatten(), minlength=self.codebook_size) / len(ids)
            self.usage[number].lerp_(hits.to(self.usage.dtype), 1 - USAGE_DECAY)


def _preset(base: VARVQVAEConfig, overrides: dict) -> VARVQVAE:
    """A config with some fields replaced, its own or those of its codes."""
    inner = {name: overrides.pop(name) for name in list(overrides) if name in ScaleCodesConfig.__dataclass_fields__}
    return VARVQVAE(replace(replace(base, codes=replace(base.codes, **inner)), **overrides))


def scales_up_to(side: int) -> tuple[int, ...]:
    """The published sides below `side`, then `side`: a list of scales for any grid."""
    return (*(scale for scale in SCALES_256 if scale < side), side)


@register
def var_vqvae(**overrides) -> VARVQVAE:
    """VAR's own: 680 tokens of 4,096 codes over 10 scales for a 256 px image; 109 M parameters."""
    return _preset(VARVQVAEConfig(), overrides)


@register
def var_vqvae_64(**overrides) -> VARVQVAE:
    """For 64 px images: 94 tokens of 1,024 codes over 5 scales; 1.7 M parameters."""
    codes = ScaleCodesConfig(scales=(1, 2, 3, 4, 8), codebook_size=1024, code_dim=16)
    base = VARVQVAEConfig(codes=codes, pixel_patch=4, width=32, multipliers=(2, 3), blocks=1, norm_groups=8)
    return _preset(base, overrides)


@register
def var_vqvae_tiny(**overrides) -> VARVQVAE:
    """The smallest that still works: 30 tokens over 4 scales for a 32 px image; for tests and tours."""
    codes = ScaleCodesConfig(scales=(1, 2, 3, 4), codebook_size=128, code_dim=8)
    return _preset(VARVQVAEConfig(codes=codes, width=16, multipliers=(1, 1, 2, 2), blocks=1, norm_groups=8), overrides)
