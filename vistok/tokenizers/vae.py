"""KL-VAE: images to a small continuous grid and back; the space FlexTok works in.

Kingma and Welling 2013 (arXiv 1312.6114), in the convolutional form of Rombach et al. 2022 (arXiv 2112.10752), built by diffusers.

    posterior = N(mean(x), exp(logvar(x)));   latents = scaling_factor * (mean or a sample);   x' = decode(latents / scaling_factor)

B images, C latent channels, f = stem 2^(levels - 1) the reduction, h w = H/f W/f.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.rng import randn
from vistok.tokenizers.base import check_images
from vistok.tokens import TokenLayout, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of a KL-VAE."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width it was trained at, in pixels; others work too."""
    stem: int = 1
    """Pixels folded into channels before the network and unfolded after it, along each side; more than 1 makes small VAEs quick."""
    latent_channels: int = 4
    """Channels of the latent grid."""
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels a resolution; each but the last halves the grid, so four make f = 8 (without a stem)."""
    layers_per_block: int = 2
    """Residual blocks a resolution."""
    norm_groups: int = 32
    """Groups of the group norms."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    encoder_attention: bool = False
    """Self-attention after each of the encoder's residual blocks at the lowest resolution too, as in LDM's and MAR's VAEs of f = 16."""
    scaling_factor: float = 1.0
    """Latents are multiplied by this; 1 / their standard deviation makes them unit-sized."""

    def __post_init__(self):
        bad = [channels for channels in self.block_channels if channels % self.norm_groups]
        if bad or not self.block_channels:
            raise ValueError(f"block_channels={self.block_channels} must all be multiples of norm_groups={self.norm_groups}")
        if not 1 <= self.layers_per_block <= 100:
            raise ValueError(f"layers_per_block={self.layers_per_block} but 1 to 100 are allowed")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor={self.scaling_factor} must be positive")

    @property
    def reduction(self) -> int:
        """f: pixels a latent, along each side."""
        return self.stem * 2 ** (len(self.block_channels) - 1)


def encoder_blocks(config: VAEConfig) -> tuple[str, ...]:
    """diffusers' name of the encoder's block at each resolution."""
    last = "AttnDownEncoderBlock2D" if config.encoder_attention else "DownEncoderBlock2D"
    return ("DownEncoderBlock2D",) * (len(config.block_channels) - 1) + (last,)


@register
class KLVAE(VisualModel):
    """A continuous tokenizer: one value [C] a grid cell."""

    Config = VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        levels = len(config.block_channels)
        channels = 3 * config.stem**2
        self.vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=config.block_channels,
            down_block_types=encoder_blocks(config),
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
        )
        self.codebook_size = None
        self.code_dim = config.latent_channels
        h, w = (side // config.reduction for side in config.image_size)
        self.layout = TokenLayout("grid", (h, w))
        self.min_tokens = self.max_tokens = h * w

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]), each [B, C, h, w], unscaled."""
        images = check_images(images, multiple=self.settings.reduction)
        distribution = self.vae.encode(F.pixel_unshuffle(images.to(self.vae.dtype), self.settings.stem)).latent_dist
        return distribution.mean, distribution.logvar

    def encode_latents(self, images: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W]: the posterior's mode, or a sample when generators are given."""
        mean, logvar = self.posterior(images)
        if generators is not None:
            mean = mean + torch.exp(0.5 * logvar) * randn(mean.shape[1:], generators, device=mean.device, dtype=mean.dtype)
        return mean * self.settings.scaling_factor

    @torch.no_grad()
    def encode_posterior(self, images: Tensor, *, num_tokens: int | None = None) -> tuple[VisualTokens, Tensor]:
        """What `encode` gives without generators, and each value's standard deviation [B, h*w, C], scaled alike. Raises as `encode`."""
        mean, logvar = self.posterior(images)
        means, deviations = mean * self.settings.scaling_factor, torch.exp(0.5 * logvar) * self.settings.scaling_factor
        return _as_tokens(means, num_tokens), deviations.flatten(2).transpose(1, 2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], unclamped, of scaled latents [B, C, h, w]."""
        folded = self.vae.decode(latents.to(self.vae.dtype) / self.settings.scaling_factor).sample
        return F.pixel_shuffle(folded, self.settings.stem)

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """Values [B, h*w, C] in raster order; deterministic unless generators are given.

        Raises ValueError: num_tokens is not the grid's size (a VAE has no shorter form).
        """
        return _as_tokens(self.encode_latents(images, generators=generators), num_tokens)

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; deterministic, so generators are not used."""
        if tokens.values is None:
            raise ValueError("a VAE decodes continuous values, but these tokens hold ids")
        h, w = tokens.layout.shape
        return self.decode_latents(tokens.values.transpose(1, 2).unflatten(2, (h, w))).clamp(-1, 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Raises ValueError: a continuous tokenizer has no ids."""
        raise ValueError("a KL-VAE has no codebook, so there are no ids to embed")


def _as_tokens(latents: Tensor, num_tokens: int | None) -> VisualTokens:
    """Values [B, h*w, C] of latents [B, C, h, w]. Raises ValueError: another number of tokens is asked for."""
    h, w = latents.shape[-2:]
    if num_tokens not in (None, h * w):
        raise ValueError(f"num_tokens={num_tokens} but this VAE makes exactly {h * w} tokens of such an image")
    return VisualTokens.from_values(latents.flatten(2).transpose(1, 2), TokenLayout("grid", (h, w)))


@register
def vae_f8c16(**overrides) -> KLVAE:
    """The published FlexTok VAEs' shape: f8, 16 channels, 256 px."""
    return KLVAE(replace(VAEConfig(latent_channels=16), **overrides))


@register
def vae_kl16(**overrides) -> KLVAE:
    """KL-16, the VAE under MAR and xAR: f16, 16 channels, 256 px, 66 M parameters; latents times 0.2325 are unit-sized."""
    channels = (128, 128, 256, 256, 512)
    base = VAEConfig(latent_channels=16, block_channels=channels, encoder_attention=True, scaling_factor=0.2325)
    return KLVAE(replace(base, **overrides))


@register
def vae_small(**overrides) -> KLVAE:
    """A small VAE for 64 px images: f8, 8 channels, 2 M parameters."""
    base = VAEConfig(
        image_size=(64, 64), latent_channels=8, block_channels=(32, 64, 96, 128), layers_per_block=1, norm_groups=16, mid_attention=False
    )
    return KLVAE(replace(base, **overrides))
