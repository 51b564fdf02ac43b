"""TiTok: an image as a short fixed sequence of tokens, read off learned registers and painted back through masked patches.

Yu et al. 2024, arXiv 2406.07550 (TiTok); Kim et al. 2025, arXiv 2501.07730 (TA-TiTok: single stage, text-aware, VQ or KL).

    encoder   [cls, patches, registers] -> blocks -> last N -> head -> z [B, N, d]
    tokens    VQ: nearest codes (unit vectors where cosine);  VAE: mean, logvar = z, a sample or the mode
    decoder   [cls, mask x grid, codes, (text)] -> blocks -> the mask positions
              "pixels": patches of pixels, then a 3x3 convolution
              "proxy" : logits over the codes of a 2D tokenizer (stage 1), painted by its decoder (stage 2, `PixelDecoder`)

The network works on images in [0, 1]; outside, as everywhere, they are in [-1, 1].
B images, N registers, d code_dim, D width, g = gh gw patches, K codes, K' proxy codes, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, QuantizerOutput, VQConfig
from vistok.quantizers.base import check_range
from vistok.quantizers.clustered import ClusteredVQ
from vistok.registry import register
from vistok.rng import randn
from vistok.tokenizers.base import check_ids, check_images, check_num_tokens
from vistok.tokenizers.maskgit_vqgan import PixelDecoder, PixelDecoderConfig
from vistok.tokenizers.titok_nets import TiTokConfig, TiTokDecoder, TiTokEncoder
from vistok.tokens import TokenLayout, VisualTokens

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads


@register
class TiTok(VisualModel):
    """Encoder with registers, quantizer, masked decoder, and for two-stage models the pixel decoder behind it."""

    Config = TiTokConfig

    def __init__(self, config: TiTokConfig):
        super().__init__(config)
        self.encoder, self.decoder = TiTokEncoder(config), TiTokDecoder(config)
        self.quantizer = None
        if config.quantizer != "vae":
            codebook = VQConfig(
                codebook_size=config.codebook_size,
                code_dim=config.code_dim,
                metric="cosine" if config.cosine else "euclidean",
                commitment_weight=config.commitment_weight,
                entropy_weight=config.entropy_weight,
                update=config.codebook_update,
                kmeans_iterations=config.kmeans_iterations,
                revive_after=config.revive_after,
            )
            self.quantizer = VQ(codebook) if config.quantizer == "vq" else ClusteredVQ(codebook)
        self.pixel_decoder = None
        if config.pixel_decoder is not None:
            self.pixel_decoder = PixelDecoder(config.pixel_decoder, config.proxy_codebook_size)
        self.codebook_size = None if self.quantizer is None else config.codebook_size
        self.code_dim = config.code_dim
        self.min_tokens = self.max_tokens = config.num_registers
        self.layout = TokenLayout("sequence", (config.num_registers,))
        self._initialise()

    def _initialise(self) -> None:
        """Embeddings of norm 1, linears that keep the size of their input."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                    nn.init.zeros_(module.bias)
            for name, parameter in part.named_parameters():
                if name.endswith(("registers", "positions", "_token")):
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    # -- images to tokens -------------------------------------------------------------------------------------------------------------

    def encode_registers(self, images: Tensor) -> Tensor:
        """What the encoder reads off its registers, [B, N, d], or [B, N, 2 d] for a VAE, of images [B, 3, H, W] in [-1, 1]."""
        check_images(images, multiple=1)
        if tuple(images.shape[-2:]) != tuple(self.settings.image_size):
            raise ValueError(f"images are {images.shape[-2]} x {images.shape[-1]} but this TiTok reads {self.settings.image_size} only")
        return self.encoder((images.to(self.dtype) + 1) / 2)

    def quantize(self, images: Tensor) -> QuantizerOutput:
        """Codes [B, N, d] with straight-through gradients, and ids [B, N]. Raises ValueError: a VAE has no codes."""
        if self.quantizer is None:
            raise ValueError("this TiTok is a VAE: it has a posterior, no codes")
        return self.quantizer(self.encode_registers(images))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]), each [B, N, d]. Raises ValueError: not a VAE."""
        if self.quantizer is not None:
            raise ValueError("this TiTok has a codebook, no posterior")
        mean, logvar = self.encode_registers(images).chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """N ids of images [B, 3, H, W] in [-1, 1]; of a VAE N values: the posterior's mode, or a sample when generators are given.

        Raises ValueError: images of another size, or num_tokens other than N.
        """
        check_num_tokens(num_tokens, low=self.min_tokens, high=self.max_tokens, name=type(self).__name__)
        if self.quantizer is not None:
            return VisualTokens.from_ids(self.quantizer.nearest(self.encode_registers(images)), self.layout)
        return VisualTokens.from_values(self._sampled(*self.posterior(images), generators), self.layout)

    @torch.no_grad()
    def encode_posterior(self, images: Tensor, *, num_tokens: int | None = None) -> tuple[VisualTokens, Tensor]:
        """Of a VAE what `encode` gives without generators, and each value's standard deviation [B, N, d]. Raises as `encode`."""
        check_num_tokens(num_tokens, low=self.min_tokens, high=self.max_tokens, name=type(self).__name__)
        mean, logvar = self.posterior(images)
        return VisualTokens.from_values(mean, self.layout), torch.exp(0.5 * logvar)

    @staticmethod
    def _sampled(mean: Tensor, logvar: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        if generators is None:
            return mean
        return mean + torch.exp(0.5 * logvar) * randn(mean.shape[1:], generators, device=mean.device, dtype=mean.dtype)

    # -- tokens to images -------------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 of ids [...]. Raises ValueError: an id outside the codebook, or no codebook."""
        if self.quantizer is None:
            raise ValueError("this TiTok is a VAE: it has no codebook, so there are no ids to embed")
        check_range(ids, self.codebook_size)
        return self.quantizer.decode(ids)

    def proxy_logits(self, codes: Tensor) -> Tensor:
        """Logits [B, K', gh, gw] over the proxy codes, of codes [B, N, d]. Raises ValueError: the decoder predicts pixels."""
        if self.settings.target != "proxy":
            raise ValueError('this TiTok predicts pixels; only target="proxy" has proxy codes')
        return self.decoder(codes.to(self.dtype), None)

    def decode_codes(self, codes: Tensor, *, text: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W], unclamped, of codes [B, N, d].

        text: [B, T, F] features of a caption's T tokens, for a text-aware TiTok.
        Raises ValueError: text is missing or of another shape, or the model has no pixel decoder yet.
        """
        settings = self.settings
        wanted = (len(codes), settings.text_tokens, settings.text_width) if settings.text_width else None
        got = None if text is None else tuple(text.shape)
        if got != wanted:
            kind = f"reads text features of shape {wanted}" if wanted else "reads no text"
            raise ValueError(f"this TiTok {kind}, got {'none' if got is None else got}")
        if settings.target == "proxy":
            if self.pixel_decoder is None:
                raise ValueError("this TiTok predicts proxy codes and has no pixel decoder: train its second stage first")
            unit = self.pixel_decoder(self.proxy_logits(codes))
        else:
            unit = self.decoder(codes.to(self.dtype), None if text is None else text.to(self.dtype))
        return unit * 2 - 1

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None, text: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; deterministic, so generators are not used. text: as in `decode_codes`.

        Raises ValueError: an id outside the codebook, or a row that has not exactly N tokens.
        """
        if bool((tokens.counts != self.max_tokens).any()):
            raise ValueError(f"this TiTok decodes exactly {self.max_tokens} tokens, got {tokens.counts.tolist()}")
        if self.quantizer is not None:
            codes = self.embed(check_ids(tokens, self.codebook_size, type(self).__name__))
        elif tokens.values is None:
            raise ValueError("a VAE decodes continuous values, but these tokens hold ids")
        else:
            codes = tokens.values
        return self.decode_codes(codes, text=text).clamp(-1, 1)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def tokenize(self, images: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> tuple[Tensor, TokenizerOutput]:
        """Codes [B, N, d] that carry gradients, and an output without reconstruction: tokens, and the quantizer's or the VAE's losses."""
        if self.quantizer is not None:
            out = self.quantize(images)
            return out.codes, TokenizerOutput(None, VisualTokens.from_ids(out.ids, self.layout), dict(out.terms))
        mean, logvar = self.posterior(images)
        values = self._sampled(mean, logvar, generators)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float()
        losses = {"kl": self.settings.kl_weight * divergence.sum((1, 2)).mean()}
        return values, TokenizerOutput(None, VisualTokens.from_values(values.detach(), self.layout), losses)

    def forward(
        self, images: Tensor, *, generators: Sequence[torch.Generator] | None = None, text: Tensor | None = None
    ) -> TokenizerOutput:
        """Training pass of a single-stage model: mean squared error of the image in [0, 1] units, and the losses of `tokenize`."""
        codes, out = self.tokenize(images, generators=generators)
        reconstruction = self.decode_codes(codes, text=text)
        mse = ((reconstruction.float() - images) / 2).square().mean()
        return replace(out, reconstruction=reconstruction, losses={"mse": mse, **out.losses})


def _shape(encoder: str, decoder: str) -> dict:
    names = [f"{part}_{field}" for part in ("encoder", "decoder") for field in ("width", "depth", "heads")]
    return dict(zip(names, SIZES[encoder] + SIZES[decoder]))


def _two_stage(size: str, num_registers: int, overrides: dict) -> TiTok:
    base = TiTokConfig(
        **_shape(size, size),
        num_registers=num_registers,
        cosine=True,
        target="proxy",
        pixel_decoder=PixelDecoderConfig(),
        interleaved_head=True,
    )
    return TiTok(replace(base, **overrides))


@register
def titok_s128(**overrides) -> TiTok:
    """Two-stage, small: 128 tokens of 4,096 codes for a 256 px image."""
    return _two_stage("small", 128, overrides)


@register
def titok_b64(**overrides) -> TiTok:
    """Two-stage, base: 64 tokens of 4,096 codes for a 256 px image."""
    return _two_stage("base", 64, overrides)


@register
def titok_l32(**overrides) -> TiTok:
    """Two-stage, large: 32 tokens of 4,096 codes for a 256 px image."""
    return _two_stage("large", 32, overrides)


@register
def titok_bl64(**overrides) -> TiTok:
    """Single stage, base encoder and large decoder: 64 tokens of 8,192 codes for a 256 px image."""
    base = TiTokConfig(**_shape("base", "large"), num_registers=64, code_dim=64, codebook_size=8192)
    return TiTok(replace(base, **overrides))


@register
def titok_bl64_vae(**overrides) -> TiTok:
    """Single stage, base encoder and large decoder: 64 continuous tokens of width 16 for a 256 px image."""
    base = TiTokConfig(**_shape("base", "large"), num_registers=64, code_dim=16, quantizer="vae")
    return TiTok(replace(base, **overrides))


@register
def ta_titok_bl64(**overrides) -> TiTok:
    """Text-aware: 64 tokens of 8,192 codes for a 256 px image; the decoder also reads 77 CLIP text features of width 768."""
    base = TiTokConfig(**_shape("base", "large"), num_registers=64, code_dim=64, codebook_size=8192, quantizer="clustered", text_width=768)
    return TiTok(replace(base, **overrides))


@register
def titok_tiny(**overrides) -> TiTok:
    """The smallest that still works: 16 tokens of 256 codes for a 32 px image; for tests and tours."""
    base = TiTokConfig(
        image_size=(32, 32), patch_size=8, decoder_patch_size=8, num_registers=16, encoder_width=64, encoder_depth=2, encoder_heads=2,
        decoder_width=64, decoder_depth=2, decoder_heads=2, code_dim=8, codebook_size=256, quantizer="clustered", cosine=True,
        commitment_weight=0.1, entropy_weight=0.1,
    )  # fmt: skip
    return TiTok(replace(base, **overrides))
