"""FlexTok: an image as an ordered list of tokens, any prefix of which decodes to an image.

Bachmann et al. 2025, arXiv 2502.13967. In the paper's order:

    latents    z = scaling * VAE(image)                               [B, C, h, w]
    encoder    [patches of z | registers] -> transformer, registers causal -> linear -> FSQ -> ids [B, k]   (section 3.1)
    dropout    keep the first k registers, k random in training: information is ordered coarse to fine   (section 3.1)
    decoder    [patches of z_t | kept registers, rest a mask token] -> adaLN-zero transformer -> velocity v   (section 3.2)
    training   z_t = (1 - t) z + t noise;  minimise |v - (noise - z)|^2
    sampling   from noise at t = 1 to t = 0 by Euler or Heun steps, with guidance against an all-null context

Two savings over the published description change nothing in the result. A register sees only earlier ones, so k tokens need k registers.
And the R - k masked (or R null) registers of the decoder are identical inputs that stay identical in every layer, so one of them stands
for all, its attention key counted R - k times by adding log(R - k) to its logits.

B images, N = gh gw patches, R registers, k kept, D width, d = len(fsq levels), L layers, S steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.flow import SOLVERS, AdaptiveProjectedGuidance, classifier_free, interpolate, time_grid, velocity_target
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import FSQ, FSQConfig, QuantizerOutput
from vistok.registry import register
from vistok.rng import randn
from vistok.tokenizers.base import check_ids, check_images, check_num_tokens
from vistok.tokenizers.flextok_nets import FlexTokConfig, FlexTokDecoder, FlexTokEncoder
from vistok.tokenizers.quality import Quality, shortest_prefix
from vistok.tokenizers.vae import KLVAE
from vistok.tokens import TokenLayout, VisualTokens


@register
class FlexTok(VisualModel):
    """Encoder, FSQ, rectified-flow decoder, and the frozen VAE around them."""

    Config = FlexTokConfig

    def __init__(self, config: FlexTokConfig):
        super().__init__(config)
        self.vae = None if config.vae is None else KLVAE(config.vae).requires_grad_(False)
        self.encoder = FlexTokEncoder(config)
        self.quantizer = FSQ(FSQConfig(levels=config.levels))
        self.decoder = FlexTokDecoder(config)
        self.codebook_size, self.code_dim = self.quantizer.codebook_size, self.quantizer.code_dim
        self.min_tokens, self.max_tokens = 1, config.num_registers
        self.layout = TokenLayout("sequence", (config.num_registers,))
        self._initialise()

    def _initialise(self) -> None:
        """Xavier linears; modulations and the velocity head zero, so that training starts from the zero velocity (adaLN-zero)."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        decoder = self.decoder
        for linear in (*(block.modulation for block in decoder.blocks), decoder.head_modulation, decoder.head):
            nn.init.zeros_(linear.weight)
        for parameter in (self.encoder.registers, decoder.register_positions, decoder.mask_token, decoder.null_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def open_gates(self) -> None:
        """Start with every residual gate at 1 and registers of unit size: on small budgets zero gates take thousands of steps to open,
        and the encoder meanwhile collapses to one code."""
        for block in self.decoder.blocks:
            nn.init.ones_(block.modulation.bias.data.view(2, 6, -1)[:, :2])
        for parameter in (self.encoder.registers, self.decoder.register_positions, self.decoder.mask_token, self.decoder.null_token):
            nn.init.trunc_normal_(parameter, std=0.5)

    # -- images to tokens -------------------------------------------------------------------------------------------------------------

    def encode_latents(self, images: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] -> [B, C, h, w]: the VAE's scaled posterior mode, or a sample when generators are given; pixels stay."""
        check_images(images, multiple=self.settings.reduction)
        return images if self.vae is None else self.vae.encode_latents(images, generators=generators)

    def quantize(self, latents: Tensor, *, num_tokens: int | None = None) -> QuantizerOutput:
        """Codes [B, k, d] with straight-through gradients and ids [B, k] of latents; only k registers are run."""
        return self.quantizer(self.encoder(latents, self.max_tokens if num_tokens is None else num_tokens))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        num_tokens: int | None = None,
        quality: Quality | float | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> VisualTokens:
        """Tokens of images [B, 3, H, W] in [-1, 1].

        num_tokens: k for every image, 1 to R; all R by default. The first k ids do not depend on k.
        quality: instead of num_tokens, a target that chooses the shortest prefix per image: a PSNR in dB, or a `Quality`.
        generators: one per image, to sample the VAE's posterior; its mode by default, so that encoding is deterministic.
        Raises ValueError: sizes that do not divide into patches, num_tokens out of range, both num_tokens and quality.
        """
        if num_tokens is not None and quality is not None:
            raise ValueError("give num_tokens or quality, not both")
        k = check_num_tokens(num_tokens, low=1, high=self.max_tokens, name=type(self).__name__)
        ids = self.quantize(self.encode_latents(images, generators=generators), num_tokens=k).ids
        tokens = VisualTokens.from_ids(ids, self.layout)
        return tokens if quality is None else shortest_prefix(self, images, tokens, quality)

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] in [-1, 1] of ids [...]."""
        return self.quantizer.decode(ids)

    # -- tokens to images -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_to_latents(
        self,
        tokens: VisualTokens,
        *,
        generators: Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance: Literal["apg", "cfg"] = "apg",
        solver: Literal["euler", "heun"] = "euler",
        image_size: tuple[int, int] | None = None,
        folded: bool = True,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Scaled latents [B, C, h, w] of tokens; the arguments are those of `decode`."""
        ids = check_ids(tokens, self.codebook_size, type(self).__name__)
        B, k = ids.shape
        if k > self.max_tokens or not B or bool((tokens.counts < 1).any()):
            raise ValueError(f"FlexTok decodes 1 to {self.max_tokens} tokens an image, got counts {tokens.counts.tolist()}")
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r}; allowed: {', '.join(SOLVERS)}")
        if guidance not in ("apg", "cfg"):
            raise ValueError(f"guidance={guidance!r}; allowed: apg, cfg")
        scale = self.settings.decode_guidance_scale if guidance_scale is None else guidance_scale
        times = time_grid(self.settings.decode_steps if num_steps is None else num_steps).to(self.device)
        x = self._noise(B, noise, generators, image_size)
        decoder = self.decoder
        modulations = decoder.modulations(times[:-1])
        context = decoder.context(self.embed(ids.to(self.device)), tokens.counts.to(self.device), folded=folded)
        is_guided = callable(scale) or scale != 1.0
        null = decoder.null_context(B, folded=folded) if is_guided else None
        combine = AdaptiveProjectedGuidance() if guidance == "apg" else classifier_free
        moments = times.tolist()

        def velocity(x: Tensor, step: int) -> Tensor:
            m = modulations.at(step)
            conditional = decoder(x.to(self.dtype), m, context)[0].float()
            if not is_guided:
                return conditional
            unconditional = decoder(x.to(self.dtype), m, null)[0].float()
            return combine(conditional, unconditional, scale(moments[step]) if callable(scale) else scale)

        return SOLVERS[solver](velocity, x, times, on_step)

    @torch.no_grad()
    def decode(
        self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None, noise: Tensor | None = None, **options
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens; counts may differ between images.

        generators: one per image for the starting noise; seeded 0, 1, ... by default. noise: or the noise itself, [B, C, h, w].
        options, as for `decode_to_latents`: num_steps and guidance_scale (a number or a function of t; defaults in the config),
        guidance "apg" (adaptive projected) or "cfg", solver "euler" or "heun", image_size (H, W), folded=False for the written-out
        computation with all R registers, on_step(step, x_t) before each step.
        Raises ValueError: ids outside the codebook, counts outside 1..R, sizes that do not fit, unknown solver or guidance.
        """
        latents = self.decode_to_latents(tokens, generators=generators, noise=noise, **options)
        return (latents if self.vae is None else self.vae.decode_latents(latents)).float().clamp(-1, 1)

    def decode_prefixes(self, tokens: VisualTokens, counts: Sequence[int], **options) -> Tensor:
        """Images [P, B, 3, H, W] of the first counts[p] tokens of each image, every prefix from the same noise.

        tokens: at least max(counts) each. options: as for `decode`.
        """
        B = len(tokens)
        shared = self._noise(B, options.pop("noise", None), options.pop("generators", None), options.get("image_size"))
        rows = VisualTokens.stack([tokens.truncate(int(count)) for count in counts])
        return self.decode(rows, noise=shared.repeat(len(counts), 1, 1, 1), **options).unflatten(0, (len(counts), B))

    def _noise(self, B: int, noise: Tensor | None, generators, image_size: tuple[int, int] | None) -> Tensor:
        """Starting noise [B, C, h, w] float32, checked."""
        H, W = self.settings.image_size if image_size is None else image_size
        rows, columns = self.settings.reduction
        if H % rows or W % columns or H < rows or W < columns:
            raise ValueError(f"image_size={(H, W)} must be multiples of {(rows, columns)}")
        pixels = 1 if self.vae is None else self.settings.vae.reduction
        shape = (self.settings.latent_channels, H // pixels, W // pixels)
        if noise is None:
            generators = [torch.Generator().manual_seed(i) for i in range(B)] if generators is None else generators
            if len(generators) != B:
                raise ValueError(f"{B} images need {B} generators, one each, got {len(generators)}")
            noise = randn(shape, generators)
        elif noise.shape[0] != B or noise.shape[1] != shape[0] or (image_size is not None and tuple(noise.shape[1:]) != shape):
            raise ValueError(f"noise must be {(B, *shape)}, got {tuple(noise.shape)}")
        return noise.to(self.device, torch.float32)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        *,
        noise: Tensor,
        times: Tensor,
        counts: Tensor,
        num_tokens: int,
        is_dropped: Tensor | None = None,
        tap: int | None = None,
    ) -> tuple[TokenizerOutput, Tensor | None]:
        """One training pass on latents [B, C, h, w].

        noise: like latents; times: [B] in [0, 1]; counts: [B] tokens kept, at most num_tokens, which is how many registers are run;
        is_dropped: [B] bool, images decoded without any token; tap: see FlexTokDecoder.forward.
        Returns the output with the loss {"flow": mean squared error of the velocity}, and the tapped patch tokens.
        """
        quantized = self.quantize(latents, num_tokens=num_tokens)
        context = self.decoder.context(quantized.codes, counts, is_dropped=is_dropped)
        velocity, tapped = self.decoder(interpolate(latents, noise, times), self.decoder.modulations(times), context, tap=tap)
        loss = F.mse_loss(velocity.float(), velocity_target(latents, noise).float())
        return TokenizerOutput(None, VisualTokens.from_ids(quantized.ids, self.layout, counts), {"flow": loss}), tapped


@register
def flextok_d12_d12(**overrides) -> FlexTok:
    """The published d12-d12 shape (341.7 M parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(), **overrides))


@register
def flextok_d18_d18(**overrides) -> FlexTok:
    """The published d18-d18 shape (949.7 M parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(encoder_width=1152, encoder_depth=18, decoder_width=1152, decoder_depth=18), **overrides))


@register
def flextok_d18_d28(**overrides) -> FlexTok:
    """The published d18-d28 shape (2.54 B parameters with its VAE)."""
    return FlexTok(replace(FlexTokConfig(encoder_width=1152, encoder_depth=18, decoder_width=1792, decoder_depth=28), **overrides))


@register
def flextok_tiny(**overrides) -> FlexTok:
    """The smallest that still works, on the pixels of 32 px images; for tests and tours."""
    base = FlexTokConfig(
        image_size=(32, 32), vae=None, patch_size=(8, 8), max_grid=(8, 8), num_registers=16, levels=(8, 5, 5), encoder_width=64,
        encoder_depth=2, decoder_width=64, decoder_depth=2, head_width=32, decoder_head_width=32, max_time=1.0, decode_steps=8,
        decode_guidance_scale=1.0,
    )  # fmt: skip
    return FlexTok(replace(base, **overrides))
