"""VQGAN: a 2D grid of codes; a convolutional network around a codebook of unit vectors. LlamaGen's tokenizer.

Sun et al. 2024 (LlamaGen, arXiv 2406.06525), section 2.1, after Esser et al. 2021 (VQGAN, arXiv 2012.09841) and Yu et al. 2021
(ViT-VQGAN, arXiv 2110.04627: low-dimensional, l2-normalised codes).

    z      = 1x1 conv(encoder(x))                                  [B, h, w, d]
    id     = argmax_k cos(z, e_k);   code = e_id / |e_id|
    x'     = decoder(1x1 conv(code))
    loss   = |x' - x|^2 + |code - sg z|^2 + 0.25 |sg code - z|^2   unit vectors both; LPIPS and a PatchGAN come from the training task

Attention sits at the lowest resolution of the encoder and of the decoder, after every residual block, and between both.

B images, h w = H/f W/f with f = pixel_patch 2^(levels - 1), d code_dim, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.layers.pyramid import PyramidDecoder, PyramidEncoder
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, QuantizerOutput, VQConfig
from vistok.quantizers.base import check_range
from vistok.registry import register
from vistok.tokenizers.base import check_images, check_pyramid, grid_ids, grid_tokens, pyramid_shape
from vistok.tokens import TokenLayout, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of the tokenizer; the default is LlamaGen's VQ-16."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width it was trained at, in pixels; others work too."""
    width: int = 128
    """Channels after the first convolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels a resolution, in widths; each but the last halves the grid, so five make f = 16."""
    blocks: int = 2
    """Residual blocks a resolution in the encoder; the decoder has one more."""
    pixel_patch: int = 1
    """Pixels a side that the CNNs fold into channels; 1 as published, 4 is ten times faster."""
    latent_channels: int = 256
    """Channels between the networks and the 1x1 convolutions."""
    codebook_size: int = 16384
    """K."""
    code_dim: int = 8
    """d."""
    norm_groups: int = 32
    """Groups of the group norms."""
    commitment_weight: float = 0.25
    """Weight, in training, of the pull of the vectors to their codes."""
    entropy_weight: float = 0.0
    """Weight, in training, of the term that makes choices certain and codes used alike; 0 leaves it out."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """Who moves the codes in training: the optimizer (as published), or a moving average of the vectors that chose them."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first training batch that place the codes; 0 (as published): they start random."""
    revive_after: int = 0
    """A code that no vector chose in this many training steps takes a vector of the batch; 0: never."""

    def __post_init__(self):
        for name in ("image_size", "multipliers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_pyramid(self)
        if any(side % self.reduction for side in self.image_size):
            raise ValueError(f"image_size={self.image_size} must be a multiple of {self.reduction}")

    @property
    def reduction(self) -> int:
        """f: pixels a token, along each side."""
        return self.pixel_patch * 2 ** (len(self.multipliers) - 1)


@register
class VQGAN(VisualModel):
    """Convolutional encoder, codebook of unit vectors, convolutional decoder."""

    Config = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        shape = pyramid_shape(config)
        self.encoder = PyramidEncoder(config.latent_channels, **shape)
        self.to_code = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantizer = VQ(
            VQConfig(
                codebook_size=config.codebook_size,
                code_dim=config.code_dim,
                metric="cosine",
                commitment_weight=config.commitment_weight,
                entropy_weight=config.entropy_weight,
                update=config.codebook_update,
                kmeans_iterations=config.kmeans_iterations,
                revive_after=config.revive_after,
            )
        )
        self.from_code = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = PyramidDecoder(config.latent_channels, **shape)
        self.codebook_size, self.code_dim = config.codebook_size, config.code_dim
        h, w = (side // config.reduction for side in config.image_size)
        self.layout = TokenLayout("grid", (h, w))
        self.min_tokens = self.max_tokens = h * w

    def vectors(self, images: Tensor) -> Tensor:
        """z [B, h, w, d] before quantization, not normalised."""
        images = check_images(images, multiple=self.settings.reduction)
        return self.to_code(self.encoder(images.to(self.to_code.weight.dtype))).permute(0, 2, 3, 1)

    def quantize(self, images: Tensor) -> QuantizerOutput:
        """Unit codes [B, h, w, d] with straight-through gradients, ids [B, h, w], and the quantizer's losses."""
        return self.quantizer(self.vectors(images))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W], unclamped, of codes [B, h, w, d]."""
        return self.decoder(self.from_code(codes.to(self.from_code.weight.dtype).permute(0, 3, 1, 2)))

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, h*w] in raster order; deterministic, so generators are not used.

        Raises ValueError: num_tokens is not the grid's size (a grid has no shorter form).
        """
        return grid_tokens(self.quantizer.nearest(self.vectors(images)), num_tokens)

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; deterministic, so generators are not used.

        Raises ValueError: an id outside the codebook, or rows shorter than the grid.
        """
        return self.decode_codes(self.embed(grid_ids(tokens, self.codebook_size, "vqgan"))).clamp(-1, 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Unit codes [..., d] of ids [...]. Raises ValueError: an id is outside [0, K)."""
        check_range(ids, self.codebook_size)
        return self.quantizer.decode(ids)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Training pass on images [B, 3, H, W] in [-1, 1]: "mse", the reconstruction's squared error, and the quantizer's losses."""
        out = self.quantize(images)
        reconstruction = self.decode_codes(out.codes)
        losses = {"mse": (reconstruction.float() - images).square().mean(), **out.terms}
        return TokenizerOutput(reconstruction, grid_tokens(out.ids, None), losses)


@register
def vq_16(**overrides) -> VQGAN:
    """LlamaGen's VQ-16: f16, 256 tokens of 16,384 codes for a 256 px image; 72 M parameters."""
    return VQGAN(replace(VQGANConfig(), **overrides))


@register
def vq_8(**overrides) -> VQGAN:
    """LlamaGen's VQ-8: f8, 1,024 tokens of 16,384 codes for a 256 px image; 70 M parameters."""
    return VQGAN(replace(VQGANConfig(multipliers=(1, 2, 2, 4)), **overrides))


@register
def vqgan_64(**overrides) -> VQGAN:
    """For 64 px images: 64 tokens of 1,024 codes; 1.7 M parameters."""
    base = VQGANConfig(
        image_size=(64, 64), pixel_patch=4, width=32, multipliers=(2, 3), blocks=1, latent_channels=64, codebook_size=1024, norm_groups=8,
    )  # fmt: skip
    return VQGAN(replace(base, **overrides))


@register
def vqgan_tiny(**overrides) -> VQGAN:
    """The smallest that still works, f8; for tests and tours."""
    base = VQGANConfig(
        image_size=(64, 64), width=16, multipliers=(1, 1, 2, 2), blocks=1, latent_channels=16, codebook_size=256, norm_groups=8
    )
    return VQGAN(replace(base, **overrides))
