"""SEED: an image as 32 causal tokens that mean something, for language models that read and write images.

Ge et al. 2023, arXiv 2307.08041 (SEED) and 2310.01218 (SEED-LLaMA). In the paper's order:

    features    V = norm(ViT(image))                                         [B, 1+N, C]
    causal      Q = causal Q-Former(registers, V)                            [B, R, D]      register i sees 0..i
    contrast    cos(project Q_R, project text) / temperature                 stage I, with captions
    quantize    z = W2 tanh(W1 Q);  id = argmin_k |z - e_k|                  [B, R, d]
    decode      U = W4 tanh(W3 e_id)                                         [B, R, D]
    semantic    S = blocks(U + positions);  minimise 1 - cos(S, Q)           stage II
    generation  g = head(blocks'(U + positions'));  minimise |g - CLIP|^2    [B, E], stage II; what a pixel decoder starts from

The head is an MLP over all registers (released weights) or a Reverse Q-Former with one register (training code). Causality holds among
registers only: the ViT below sees the whole image.

B images, N patches, R registers, C D E widths, d code width, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.transformer import TransformerBlock
from vistok.layers.vit import VisionTransformer
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, QuantizerOutput, VQConfig
from vistok.quantizers.base import check_range
from vistok.registry import register
from vistok.tokenizers.base import check_ids, check_images, check_num_tokens
from vistok.tokenizers.seed_pixels import EmbeddingDecoder, EmbeddingDecoderConfig, unclip_images
from vistok.tokenizers.seed_qformer import MAX_DEPTH, QFormer, QFormerConfig, bert_init
from vistok.tokens import TokenLayout, VisualTokens

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BLOCK_EPS, VISION_NORM_EPS = 1e-6, 1e-5
CODES = VQConfig(codebook_size=8192, code_dim=32, commitment_weight=1.0, codebook_weight=0.25)  # the reference's "legacy" weights


@dataclass(frozen=True, kw_only=True)
class SEEDVisionConfig:
    """Shape of the ViT; the defaults are EVA-CLIP's g without its last block."""

    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    hidden: int = 6144
    """Width of the feed-forward layers."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    """Whether queries, keys and values have biases; EVA-CLIP's do, but those of the keys."""

    def __post_init__(self):
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"vision depth={self.depth} but 1 to {MAX_DEPTH} are allowed")


@dataclass(frozen=True, kw_only=True)
class SEEDTextConfig:
    """The text branch of stage I."""

    vocab_size: int = 30523
    """Words of its own table (BERT's and one more); 0: texts come as embeddings."""
    max_words: int = 512
    """Positions of that table."""
    embedding_dim: int = 256
    """Width in which image and text are compared."""


@dataclass(frozen=True, kw_only=True)
class SEEDConfig:
    """Shape of a SEED tokenizer; the defaults are SEED-2's."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width the ViT reads; other images are resized to it, aspect ratio aside (bicubic)."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    """What the ViT's input is normalised with, on a scale of 0 to 1."""
    vision: SEEDVisionConfig = SEEDVisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    num_registers: int = 32
    """R: tokens an image."""
    is_causal: bool = True
    """Register i sees registers 0..i only. The reference code is causal at exactly 32 registers."""
    quantizer: VQConfig = CODES
    block_depth: int = 4
    """Blocks of the semantic decoder, and of the generation decoder."""
    block_heads: int = 12
    head: Literal["mlp", "reverse"] = "mlp"
    """From the decoded registers to the generation embedding: an MLP over all, or a Reverse Q-Former."""
    head_widths: tuple[int, ...] = (256, 128, 32)
    """Widths of the MLP head."""
    reverse_depth: int = 4
    """Layers of the Reverse Q-Former."""
    embedding_dim: int = 1024
    """E: width of the generation embedding (CLIP ViT-H's here)."""
    text: SEEDTextConfig | None = None
    """The text branch; released tokenizers leave it out."""
    pixels: EmbeddingDecoderConfig | None = None
    """A decoder from the generation embedding to pixels; None: `decode` needs a diffusers unCLIP pipeline."""

    def __post_init__(self):
        if any(side % self.vision.patch_size or side < 1 for side in self.image_size):
            raise ValueError(f"image_size={self.image_size} must be a multiple of the patch size {self.vision.patch_size}")
        if self.num_registers < 1:
            raise ValueError(f"num_registers={self.num_registers} but at least 1 is needed")
        if not 0 <= self.block_depth <= MAX_DEPTH or not 1 <= self.reverse_depth <= MAX_DEPTH or not self.head_widths:
            raise ValueError(
                f"block_depth={self.block_depth}, reverse_depth={self.reverse_depth} or head_widths={self.head_widths} is empty"
            )


@dataclass(frozen=True, kw_only=True)
class SEEDLossWeights:
    """Weights of stage II's losses; the defaults are the reference's."""

    vq: float = 5.0
    semantic: float = 2.0
    generation: float = 0.5
    """Of |generation embedding - target|^2."""
    pixels: float = 1.0
    """Of |x' - x| + |x' - x|^2, where there is a pixel decoder."""


class MLPHead(nn.Module):
    """Each register through ReLU layers without biases, all flattened, one linear layer: [B, R, D] -> [B, E]."""

    def __init__(self, config: SEEDConfig):
        super().__init__()
        widths = (config.qformer.width, *config.head_widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:]))
        self.proj = nn.Linear(config.num_registers * widths[-1], config.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return self.proj(x.flatten(1))


class ReverseHead(nn.Module):
    """A Q-Former of one register reads all decoded registers, one linear layer: [B, R, D] -> [B, E]."""

    def __init__(self, config: SEEDConfig):
        super().__init__()
        shape = replace(config.qformer, depth=config.reverse_depth)
        self.qformer = QFormer(shape, num_registers=1, context_width=shape.width, is_causal=False)
        self.proj = nn.Linear(shape.width, config.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qformer(x)[:, 0])


class SEEDText(nn.Module):
    """What stage I adds to the Q-Former: word and position tables, the projections to the common space, the temperature."""

    def __init__(self, config: SEEDTextConfig, width: int):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.positions = nn.Embedding(config.max_words, width) if config.vocab_size else None
        self.image_proj = nn.Linear(width, config.embedding_dim)
        self.text_proj = nn.Linear(width, config.embedding_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def embed(self, ids: Tensor) -> Tensor:
        """Word and position embeddings [B, T, D] of word ids [B, T] int64. Raises ValueError: texts come as embeddings, or too long."""
        if self.words is None or ids.shape[1] > self.positions.num_embeddings:
            limit = "this text branch has no word table" if self.words is None else f"at most {self.positions.num_embeddings} words fit"
            raise ValueError(f"cannot embed {ids.shape[1]} word ids: {limit}")
        return self.words(ids) + self.positions.weight[: ids.shape[1]]


@register
class SEED(VisualModel):
    """ViT, causal Q-Former, codebook, semantic decoder, generation embedding, and what may follow: pixels and text."""

    Config = SEEDConfig

    def __init__(self, config: SEEDConfig):
        super().__init__(config)
        width, vision, codes = config.qformer.width, config.vision, config.quantizer
        self.vision = VisionTransformer(
            image_size=config.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            depth=vision.depth,
            num_heads=vision.num_heads,
            hidden=vision.hidden,
            norm_eps=vision.norm_eps,
            qkv_bias=vision.qkv_bias,
        )
        self.vision_norm = nn.LayerNorm(vision.width, eps=VISION_NORM_EPS)
        self.qformer = QFormer(
            config.qformer,
            num_registers=config.num_registers,
            context_width=vision.width,
            is_causal=config.is_causal,
            has_text=config.text is not None,
        )
        self.to_code = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, codes.code_dim))
        self.quantizer = VQ(codes)
        self.from_code = nn.Sequential(nn.Linear(codes.code_dim, codes.code_dim), nn.Tanh(), nn.Linear(codes.code_dim, width))
        self.semantic_positions = nn.Parameter(torch.empty(config.num_registers, width).normal_(std=0.02))
        self.semantic_blocks = self._blocks(config)
        self.generation_positions = nn.Parameter(torch.empty(config.num_registers, width).normal_(std=0.02))
        self.generation_blocks = self._blocks(config)
        self.head = MLPHead(config) if config.head == "mlp" else ReverseHead(config)
        self.text = None if config.text is None else SEEDText(config.text, width)
        bert_init(self)
        self.pixels = None
        if config.pixels is not None:
            self.pixels = EmbeddingDecoder(config.pixels, embedding_dim=config.embedding_dim, image_size=config.image_size)
        self.codebook_size, self.code_dim = codes.codebook_size, codes.code_dim
        self.min_tokens = self.max_tokens = config.num_registers
        self.layout = TokenLayout("sequence", (config.num_registers,))

    @staticmethod
    def _blocks(config: SEEDConfig) -> nn.ModuleList:
        width = config.qformer.width
        return nn.ModuleList(
            TransformerBlock(width, config.block_heads, hidden=4 * width, norm_eps=BLOCK_EPS) for _ in range(config.block_depth)
        )

    # -- images to tokens -------------------------------------------------------------------------------------------------------------

    def normalize(self, images: Tensor) -> Tensor:
        """What the ViT reads of images [B, 3, H, W] in [-1, 1]: resized, and normalised with the config's mean and deviation."""
        images = check_images(images, multiple=1)
        if tuple(images.shape[-2:]) != self.settings.image_size:
            images = F.interpolate(images.float(), size=self.settings.image_size, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.settings.image_mean, self.settings.image_std))
        return ((images / 2 + 0.5 - mean) / std).to(self.vision.patches.weight.dtype)

    def features(self, normalized: Tensor) -> Tensor:
        """Image tokens [B, 1+N, C], class token first, of normalised images."""
        return self.vision_norm(self.vision(normalized))

    def causal_embeddings(self, images: Tensor) -> Tensor:
        """Continuous registers [B, R, D] of images [B, 3, H, W]: what the semantic loss reconstructs and stage I compares."""
        return self.qformer(self.features(self.normalize(images)))

    def quantize(self, embeddings: Tensor) -> QuantizerOutput:
        """Codes [B, R, d] with straight-through gradients, ids [B, R] and the VQ loss of causal embeddings [B, R, D]."""
        return self.quantizer(self.to_code(embeddings))

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, R]; deterministic, so generators are not used.

        Raises ValueError: num_tokens is not R (SEED has no shorter form).
        """
        check_num_tokens(num_tokens, low=self.min_tokens, high=self.max_tokens, name="SEED")
        return VisualTokens.from_ids(self.quantize(self.causal_embeddings(images)).ids, self.layout)

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., d] of ids [...]. Raises ValueError: an id is outside [0, K)."""
        check_range(ids, self.codebook_size)
        return self.quantizer.decode(ids)

    # -- tokens to meaning and to images ----------------------------------------------------------------------------------------------

    def decoded_registers(self, codes: Tensor) -> Tensor:
        """U [B, R, D] of codes [B, R, d]."""
        return self.from_code(codes.to(self.from_code[0].weight.dtype))

    def semantic_reconstruction(self, codes: Tensor) -> Tensor:
        """S [B, R, D] of codes [B, R, d]: the causal embeddings as far as the tokens tell."""
        x = self.decoded_registers(codes) + self.semantic_positions
        for block in self.semantic_blocks:
            x = block(x)
        return x

    def generation_embedding(self, codes: Tensor) -> Tensor:
        """g [B, E] of codes [B, R, d]: an image embedding for an unCLIP-like decoder."""
        x = self.decoded_registers(codes) + self.generation_positions
        for block in self.generation_blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None, unclip: Any = None, **options) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens.

        unclip: a diffusers StableUnCLIPImg2ImgPipeline that starts from the generation embedding; it draws from the generators (options:
        num_steps, guidance_scale, image_size). Without it the tokenizer's own pixel decoder, which is deterministic.
        Raises ValueError: ids outside the codebook, counts other than R, or neither decoder is there.
        """
        if bool((tokens.counts != self.max_tokens).any()):
            raise ValueError(f"SEED decodes exactly {self.max_tokens} tokens an image, got counts {tokens.counts.tolist()}")
        ids = check_ids(tokens, self.codebook_size, "SEED")
        embedding = self.generation_embedding(self.embed(ids.to(self.device)))
        if unclip is not None:
            return unclip_images(unclip, embedding, generators=generators, **options)
        if options:
            raise TypeError(f"{sorted(options)[0]} is an option of the unclip pipeline, and none was given")
        if self.pixels is None:
            raise ValueError(
                "this SEED has no pixel decoder: give unclip=, a diffusers StableUnCLIPImg2ImgPipeline "
                "(stabilityai/stable-diffusion-2-1-unclip for SEED-2's weights), or train a pixel decoder with a seed recipe"
            )
        return self.pixels(embedding).float().clamp(-1, 1)

    # -- stage I ----------------------------------------------------------------------------------------------------------------------

    def image_direction(self, embeddings: Tensor) -> Tensor:
        """Unit vectors [B, e] to compare with texts, from the last register of causal embeddings [B, R, D]."""
        return F.normalize(self._text_branch().image_proj(embeddings[:, -1]), dim=-1)

    def text_states(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text states [B, T, D] of word embeddings [B, T, D] (`text.embed` makes them of ids); mask [B, T] bool, True is a word."""
        return self.qformer.read_text(embeddings, mask)

    def text_direction(self, states: Tensor) -> Tensor:
        """Unit vectors [B, e] to compare with images, from the first of the text states [B, T, D]."""
        return F.normalize(self._text_branch().text_proj(states[:, 0]), dim=-1)

    def _text_branch(self) -> SEEDText:
        if self.text is None:
            raise ValueError("this SEED has no text branch (config.text is None); released tokenizers leave it out")
        return self.text

    # -- stage II ---------------------------------------------------------------------------------------------------------------------

    def reconstruct(
        self,
        embeddings: Tensor,
        *,
        images: Tensor | None = None,
        target: Tensor | None = None,
        weights: SEEDLossWeights = SEEDLossWeights(),
    ) -> TokenizerOutput:
        """Stage II from causal embeddings [B, R, D]; the weighted losses sum to what is minimised.

        images: [B, 3, H, W] at the config's size, for the pixel decoder's loss. target: [B, E] image embeddings of a frozen teacher.
        The semantic loss has the embeddings as a fixed target.
        """
        quantized = self.quantize(embeddings)
        semantic = 1 - F.cosine_similarity(self.semantic_reconstruction(quantized.codes), embeddings.detach(), dim=-1).mean()
        losses = {"vq": weights.vq * quantized.loss, "semantic": weights.semantic * semantic}
        reconstruction = None
        if target is not None or (self.pixels is not None and images is not None):
            embedding = self.generation_embedding(quantized.codes)
            if target is not None:
                losses["generation"] = weights.generation * F.mse_loss(embedding.float(), target.float())
            if self.pixels is not None and images is not None:
                reconstruction = self.pixels(embedding)
                difference = reconstruction.float() - images
                losses["pixels"] = weights.pixels * (difference.abs().mean() + difference.square().mean())
        return TokenizerOutput(reconstruction, VisualTokens.from_ids(quantized.ids, self.layout), losses)

    def forward(self, images: Tensor, *, target: Tensor | None = None, weights: SEEDLossWeights = SEEDLossWeights()) -> TokenizerOutput:
        """Training pass of stage II on images [B, 3, H, W] at the config's size; target and weights as for `reconstruct`."""
        return self.reconstruct(self.causal_embeddings(images), images=images, target=target, weights=weights)


@register
def seed_2(**overrides) -> SEED:
    """The released SEED-2 tokenizer's shape: 32 tokens of 8,192 codes, 1.15 B parameters; pixels by unCLIP."""
    return SEED(replace(SEEDConfig(), **overrides))


@register
def seed_64(**overrides) -> SEED:
    """A SEED for 64 px images with a pixel decoder of its own: 32 tokens of 1,024 codes; 2.5 M parameters."""
    base = SEEDConfig(
        image_size=(64, 64),
        vision=SEEDVisionConfig(patch_size=8, width=112, depth=3, num_heads=4, hidden=320),
        qformer=QFormerConfig(width=112, depth=4, num_heads=4, hidden=320),
        quantizer=replace(CODES, codebook_size=1024, code_dim=16),
        block_depth=1,
        block_heads=4,
        head_widths=(64, 24),
        embedding_dim=256,
        pixels=EmbeddingDecoderConfig(channels=(96, 80, 48), blocks=1),
    )
    return SEED(replace(base, **overrides))


@register
def seed_tiny(**overrides) -> SEED:
    """The smallest that still works, for 32 px images; for tests and tours."""
    base = SEEDConfig(
        image_size=(32, 32),
        vision=SEEDVisionConfig(patch_size=8, width=48, depth=1, num_heads=4, hidden=96),
        qformer=QFormerConfig(width=48, depth=2, num_heads=4, hidden=96),
        num_registers=8,
        quantizer=replace(CODES, codebook_size=128, code_dim=8),
        block_depth=1,
        block_heads=4,
        head_widths=(32, 16),
        embedding_dim=64,
        pixels=EmbeddingDecoderConfig(channels=(32, 16), blocks=1),
    )
    return SEED(replace(base, **overrides))
