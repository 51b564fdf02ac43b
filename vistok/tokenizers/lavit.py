"""LaVIT: an image as as many tokens as it needs; a selector drops patches, a merger folds them into the kept ones.

Jin et al. 2024, arXiv 2309.04669, section 3.1. In the order of the data:

    patches    x = ViT(image), class token dropped, no final norm                                   [B, N, D]
    selector   keep_n = log p(keep | x)_n >= log p(drop | x)_n;  + Gumbel noise where generators are given
    merger     kept patches attend to earlier kept ones and to the dropped ones                     [B, M, D], M ragged
    codes      z = Linear tanh Linear, z / |z|, nearest row of the codebook (rows are not normalised)
    decoder    N learned queries read the codes -> patch features -> conditioning of a diffusion model, or pixels by a small network of ours
    training   features: 1 - cos(x, decoded x);  rate: (keep_ratio - mean keep)^2;  pixels: |.| + |.|^2;  codes: commitment

The published code draws Gumbel noise at inference too, so that its tokens change from run to run; here `encode` is deterministic unless
generators are given. An image that would keep nothing keeps its likeliest patch.

B images, N patches, M kept, D width, d code width, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.vit import VisionTransformer
from vistok.modeling import VisualModel
from vistok.protocols import TokenizerOutput
from vistok.quantizers import VQ, VQConfig
from vistok.quantizers.base import check_range
from vistok.registry import register
from vistok.rng import rand
from vistok.tokenizers.base import check_ids, check_images, check_num_tokens
from vistok.tokenizers.lavit_parts import Conditioning, FeatureDecoder, Merger, PixelDecoder, Selector, gather_rows, kept_rows
from vistok.tokens import TokenLayout, VisualTokens

MAX_DEPTH = 1000  # far above any model; a config from elsewhere must not build forever
CALIBRATION_BATCH = 32  # images at a time
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class LaVITConfig:
    """Shape of the tokenizer; the defaults are those of the published one, whose pixels come from a diffusion model."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels; no other size is taken."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from colours in [0, 1] before the vision transformer."""
    image_std: tuple[float, float, float] = CLIP_STD
    """Divides them."""
    patch_size: int = 14
    vision_width: int = 1408
    """D."""
    vision_depth: int = 40
    vision_heads: int = 16
    vision_hidden: int = 6144
    vision_norm_eps: float = 1e-6
    merger_depth: int = 12
    merger_heads: int = 16
    merger_hidden: int = 6144
    merger_norm_eps: float = 1e-5
    merger_eps: float = 1e-6
    """Attention spread over all patches whether they may be seen or not; 0: none, and dropped patches need not be computed."""
    quantizer: VQConfig = VQConfig(codebook_size=16384, code_dim=32)
    """The codebook."""
    decoder_width: int = 1408
    decoder_depth: int = 12
    decoder_heads: int = 16
    decoder_hidden: int = 6144
    decoder_norm_eps: float = 1e-5
    feature_width: int = 1408
    """Width of the decoded features; vision_width where they are trained to be the patches'."""
    condition_sizes: tuple[int, ...] = ()
    """Conditioning of a diffusion model: (768,) for SD 1.5 ("lowres"), (768, 1280) for SDXL ("highres"), () for none."""
    pool_heads: int = 16
    """Heads of the attention that makes SDXL's pooled vector."""
    pixel_width: int = 0
    """Channels of our pixel decoder; 0 for none."""
    pixel_depth: int = 4
    """Its residual blocks."""
    llm_width: int = 0
    """Width of the language model that reads kept patches as they are (`encode_features`); 0 for none."""
    image_start_id: int = 32000
    """Language model ids: start of an image, end, and the first code."""
    image_end_id: int = 32001
    code_id_offset: int = 32002

    def __post_init__(self):
        if any(side % self.patch_size or side < 1 for side in self.image_size):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        for name in ("vision", "merger", "decoder"):
            width, heads = getattr(self, f"{name}_width", self.vision_width), getattr(self, f"{name}_heads")
            if heads < 1 or width % heads:
                raise ValueError(f"{name}_heads={heads} does not divide the width {width}")
            if not 1 <= getattr(self, f"{name}_depth") <= MAX_DEPTH:
                raise ValueError(f"{name}_depth={getattr(self, f'{name}_depth')} but 1 to {MAX_DEPTH} are allowed")
        if self.vision_width % 4:
            raise ValueError(f"vision_width={self.vision_width} must be a multiple of 4")
        if len(self.condition_sizes) > 2:
            raise ValueError(f"condition_sizes={self.condition_sizes} but one or two text encoders are known")
        if len(self.condition_sizes) == 2 and self.feature_width % self.pool_heads:
            raise ValueError(f"pool_heads={self.pool_heads} does not divide feature_width={self.feature_width}")
        if self.pixel_width % 8 or not 0 <= self.pixel_depth <= MAX_DEPTH:
            raise ValueError(
                f"pixel_width={self.pixel_width} must be a multiple of 8 and pixel_depth={self.pixel_depth} in 0 to {MAX_DEPTH}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True)
class LaVITOutput(TokenizerOutput):
    """TokenizerOutput with the mean share of kept patches."""

    keep_ratio: Tensor = field(default_factory=lambda: torch.zeros(()))


@register
class LaVIT(VisualModel):
    """Vision transformer, selector, merger, codebook; feature decoder with diffusion conditioning and a pixel decoder as configured."""

    Config = LaVITConfig

    def __init__(self, config: LaVITConfig):
        super().__init__(config)
        h, w = config.grid
        D, N = config.vision_width, h * w
        self.min_tokens, self.max_tokens, self.layout = 1, N, TokenLayout("sequence", (N,))
        self.vision = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=D,
            depth=config.vision_depth,
            num_heads=config.vision_heads,
            hidden=config.vision_hidden,
            norm_eps=config.vision_norm_eps,
        )
        self.selector = Selector(D)
        self.merger = Merger(
            D, config.merger_depth, config.merger_heads, config.merger_hidden, norm_eps=config.merger_norm_eps, eps=config.merger_eps
        )
        self.quantizer = VQ(config.quantizer)
        self.codebook_size, self.code_dim = self.quantizer.codebook_size, self.quantizer.code_dim
        self.to_code = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, self.code_dim))
        self.to_llm = nn.Linear(D, config.llm_width) if config.llm_width else None
        self.decoder = FeatureDecoder(
            num_patches=N,
            code_dim=self.code_dim,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            hidden=config.decoder_hidden,
            out=config.feature_width,
            norm_eps=config.decoder_norm_eps,
        )
        sizes = config.condition_sizes
        self.conditioning = Conditioning(N, config.feature_width, sizes, config.pool_heads) if sizes else None
        pixels = dict(grid=config.grid, patch_size=config.patch_size, in_width=config.feature_width)
        self.pixels = PixelDecoder(**pixels, width=config.pixel_width, depth=config.pixel_depth) if config.pixel_width else None

    # -- images to tokens -------------------------------------------------------------------------------------------------------------

    def patches(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of images [B, 3, H, W] in [-1, 1]."""
        check_images(images, multiple=self.settings.patch_size)
        if tuple(images.shape[-2:]) != tuple(self.settings.image_size):
            H, W = self.settings.image_size
            raise ValueError(f"images are {images.shape[-2]} x {images.shape[-1]} but this tokenizer takes {H} x {W}; resize them first")
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.settings.image_mean, self.settings.image_std))
        return self.vision(((images.float() / 2 + 0.5 - mean) / std).to(self.dtype))[:, 1:]

    def select(self, log_probs: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """keep [B, N] bool of log-probabilities [B, N, 2] (and Gumbel noise of that shape): the likelier of keep and drop, ties kept."""
        scores = log_probs if noise is None else log_probs + noise
        return scores[..., 0] >= scores[..., 1]

    def gumbel(self, generators: Sequence[torch.Generator] | None, device: torch.device) -> Tensor | None:
        """Standard Gumbel noise [B, N, 2], row i from generators[i]; None without generators."""
        if generators is None:
            return None
        uniforms = rand((self.max_tokens, 2), generators, device=device)
        return -(-uniforms.clamp(1e-20, 1 - 1e-7).log()).log()

    def decide(self, log_probs: Tensor, *, noise: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
        """keep [B, N] bool as `select`, but at least one patch an image, or exactly num_tokens: those most worth keeping."""
        scores = log_probs if noise is None else log_probs + noise
        best = (scores[..., 0] - scores[..., 1]).topk(num_tokens or 1, dim=1).indices
        chosen = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, True)
        keep = self.select(log_probs, noise=noise)
        return chosen if num_tokens is not None else torch.where(keep.any(1, keepdim=True), keep, chosen)

    def _merged(self, images: Tensor, num_tokens: int | None, generators: Sequence[torch.Generator] | None) -> tuple[Tensor, Tensor]:
        """Merged kept patches [B, M, D] of images, and how many of them each has [B]."""
        if num_tokens is not None:
            check_num_tokens(num_tokens, low=1, high=self.max_tokens, name="lavit")
        patches = self.patches(images)
        noise = self.gumbel(generators, patches.device)
        return self.merger.kept(patches, self.decide(self.selector(patches), noise=noise, num_tokens=num_tokens))

    def code_vectors(self, merged: Tensor) -> Tensor:
        """Unit vectors [..., d] that are looked up in the codebook, of merged patches [..., D]."""
        return F.normalize(self.to_code(merged).float(), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None) -> VisualTokens:
        """ids [B, N] of the patches kept of images [B, 3, H, W] in raster order, `counts` of them an image; rows are padded to N.

        num_tokens: so many tokens for every image, the patches most worth keeping; None: as many as the selector wants.
        generators: one an image, for Gumbel noise in the selection, as in training; None: no noise.
        Raises ValueError: images of another size, or num_tokens outside 1 to N.
        """
        merged, counts = self._merged(images, num_tokens, generators)
        ids = self.quantizer.nearest(self.code_vectors(merged))
        return VisualTokens.from_ids(F.pad(ids, (0, (num_tokens or self.max_tokens) - ids.shape[1])), self.layout, counts)

    @torch.no_grad()
    def selection(self, images: Tensor, *, num_tokens: int | None = None) -> Tensor:
        """[B, h, w] bool: which patches `encode` keeps."""
        keep = self.decide(self.selector(self.patches(images)), num_tokens=num_tokens)
        return keep.unflatten(1, self.settings.grid)

    @torch.no_grad()
    def encode_features(
        self, images: Tensor, *, num_tokens: int | None = None, generators: Sequence[torch.Generator] | None = None
    ) -> VisualTokens:
        """Kept patches as values [B, N, llm_width], not quantized: what the language model understands images by. Options as `encode`.

        Raises ValueError: the config has no llm_width.
        """
        if self.to_llm is None:
            raise ValueError("this LaVIT has no projection to a language model; set llm_width in its config")
        merged, counts = self._merged(images, num_tokens, generators)
        values = self.to_llm(merged)
        width = num_tokens or self.max_tokens
        return VisualTokens.from_values(F.pad(values, (0, 0, 0, width - values.shape[1])), self.layout, counts)

    def llm_ids(self, tokens: VisualTokens, *, frame: bool = False) -> list[Tensor]:
        """Language model ids [count] of each image; frame adds the ids for start and end of an image."""
        settings, ids = self.settings, check_ids(tokens, self.codebook_size, "lavit")
        rows = [row[:count] + settings.code_id_offset for row, count in zip(ids, tokens.counts.tolist())]
        return (
            [F.pad(F.pad(row, (1, 0), value=settings.image_start_id), (0, 1), value=settings.image_end_id) for row in rows]
            if frame
            else rows
        )

    def tokens_of_llm_ids(self, rows: Sequence[Tensor]) -> VisualTokens:
        """Tokens of language model ids, one row [count] an image, start and end ids or not.

        Raises ValueError: a row without codes or with more than N, or an id that is no code.
        """
        settings = self.settings
        rows = [row[(row != settings.image_start_id) & (row != settings.image_end_id)] - settings.code_id_offset for row in rows]
        counts = torch.tensor([len(row) for row in rows])
        if not rows or int(counts.min()) < 1 or int(counts.max()) > self.max_tokens:
            raise ValueError(f"each image has 1 to {self.max_tokens} codes, got rows of {counts.tolist()}")
        ids = torch.stack([F.pad(row, (0, self.max_tokens - len(row))) for row in rows])
        tokens = VisualTokens.from_ids(ids, self.layout, counts)
        check_ids(tokens, self.codebook_size, "lavit")
        return tokens

    # -- tokens to features, conditioning, images -------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors [..., d] of ids [...]. Raises ValueError: an id outside [0, K)."""
        check_range(ids, self.codebook_size)
        return self.quantizer.decode(ids)

    def decode_features(self, tokens: VisualTokens) -> Tensor:
        """Features [B, N, feature_width] of all patches. Raises ValueError: an id outside the codebook, or too many tokens."""
        ids = check_ids(tokens, self.codebook_size, "lavit")
        low, high = int(tokens.counts.min()), int(tokens.counts.max())
        if low < 1 or high > self.max_tokens:
            raise ValueError(f"lavit decodes 1 to {self.max_tokens} tokens an image, got {low} to {high}")
        return self.decoder(self.embed(ids[:, :high]), tokens.counts)

    @torch.no_grad()
    def condition(self, tokens: VisualTokens) -> tuple[Tensor, Tensor | None]:
        """Conditioning of a diffusion model: prompt embeddings [B, N, sum of condition_sizes] and, for SDXL, the pooled vector.

        They are `prompt_embeds` and `pooled_prompt_embeds` of a diffusers pipeline.
        Raises ValueError: the config has no condition_sizes.
        """
        if self.conditioning is None:
            raise ValueError("this LaVIT makes no diffusion conditioning; set condition_sizes in its config")
        return self.conditioning(self.decode_features(tokens))

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] by the pixel decoder; deterministic, so generators are not used.

        Raises ValueError: no pixel decoder (a converted checkpoint has none), an id outside the codebook, or too many tokens.
        """
        if self.pixels is None:
            raise ValueError(
                "this LaVIT has no pixel decoder: use condition() with a diffusion model, or set pixel_width and train one "
                "(vistok train tokenizer --recipe lavit-emoji)"
            )
        return self.pixels(self.decode_features(tokens)).float().clamp(-1, 1)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, images: Tensor, keep_ratio: float) -> None:
        """Shift the selector so that without noise it keeps this share of the patches of these images [B, 3, H, W].

        It learns its rate with Gumbel noise: one that gives every patch a chance of 0.4 keeps 0.4 of them with the noise, none without.
        """
        log_probs = torch.cat([self.selector(self.patches(part)) for part in images.split(CALIBRATION_BATCH)])
        margin = log_probs[..., 0] - log_probs[..., 1]
        self.selector.head[-1].bias[0] -= margin[margin.isfinite()].quantile(1 - keep_ratio)

    def forward(
        self,
        images: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        keep_ratio: float = 0.4,
        temperature: float = 1.0,
        quantize: bool = True,
        freeze_selection: bool = False,
    ) -> LaVITOutput:
        """Training pass; losses "features", "rate", those of the codebook (which weighs them itself), and "l1" and "mse" of the pixels.

        generators: one an image, for the Gumbel noise; without them the selection is deterministic, its gradient still that of the
        softmax at `temperature`. keep_ratio: the mean share of patches to keep. quantize: False passes the code vectors on as they are.
        freeze_selection: no noise, and no gradient to the vision transformer and the selector: images keep the patches they keep.
        """
        if self.settings.feature_width != self.settings.vision_width:
            raise ValueError(f"training needs feature_width={self.settings.feature_width} to be vision_width={self.settings.vision_width}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_selection):
            patches = self.patches(images)
            log_probs = self.selector(patches)
        noise = None if freeze_selection else self.gumbel(generators, images.device)
        soft = ((log_probs if noise is None else log_probs + noise) / temperature).softmax(-1)[..., 0]
        hard = self.decide(log_probs.detach(), noise=noise)
        keep = hard.float() if freeze_selection else hard.float() + soft - soft.detach()
        if freeze_selection:
            merged, counts = self.merger.kept(patches, hard)
        else:  # dropped rows too: the gradient of dropping a patch runs through them
            rows, counts = kept_rows(hard)
            merged = gather_rows(self.merger(patches, keep), rows)
        z = self.code_vectors(merged)
        valid = torch.arange(z.shape[1], device=z.device) < counts[:, None]
        losses = {}
        if quantize:
            quantized = self.quantizer(z[valid])
            codes = torch.zeros_like(z).masked_scatter(valid[..., None], quantized.codes.to(z.dtype))
            ids = torch.zeros_like(valid, dtype=torch.int64).masked_scatter(valid, quantized.ids)
            losses.update(quantized.terms)
        else:
            codes, ids = z, self.quantizer.nearest(z)
        decoded = self.decoder(codes, counts)
        losses["features"] = 1 - F.cosine_similarity(decoded.float(), patches.detach().float(), dim=-1).mean()
        losses["rate"] = (keep_ratio - keep.mean()).square()
        reconstruction = None
        if self.pixels is not None:
            reconstruction = self.pixels(decoded)
            difference = reconstruction.float() - images
            losses["l1"], losses["mse"] = difference.abs().mean(), difference.square().mean()
        tokens = VisualTokens.from_ids(F.pad(ids, (0, self.max_tokens - ids.shape[1])), self.layout, counts)
        return LaVITOutput(reconstruction, tokens, losses, keep_ratio=hard.float().mean())


# -- presets ------------------------------------------------------------------------------------------------------------------------------


@register
def lavit_7b_v2(**overrides) -> LaVIT:
    """The published tokenizer with the conditioning of SD 1.5: 1 to 256 tokens of 16,384 codes for a 224 px image; 1.8 B parameters."""
    return LaVIT(replace(LaVITConfig(condition_sizes=(768,), llm_width=4096), **overrides))


@register
def lavit_64(**overrides) -> LaVIT:
    """1 to 64 tokens of 1,024 codes for a 64 px image, pixels by its own decoder; 2.9 M parameters."""
    config = LaVITConfig(
        image_size=(64, 64), patch_size=8, vision_width=128, vision_depth=3, vision_heads=4, vision_hidden=512, merger_depth=2,
        merger_heads=4, merger_hidden=512, merger_eps=0.0, decoder_width=128, decoder_depth=3,
        decoder_heads=4, decoder_hidden=512, feature_width=128, pixel_width=96, pixel_depth=4,
        quantizer=VQConfig(codebook_size=1024, code_dim=16, update="ema", kmeans_iterations=10, revive_after=100),
    )  # fmt: skip
    return LaVIT(replace(config, **overrides))


@register
def lavit_tiny(**overrides) -> LaVIT:
    """The smallest that still works; for tests and tours."""
    config = LaVITConfig(
        image_size=(32, 32), patch_size=8, vision_width=32, vision_depth=1, vision_heads=2, vision_hidden=64, merger_depth=2,
        merger_heads=2, merger_hidden=64, merger_eps=0.0, decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_hidden=64,
        feature_width=32, pixel_width=16, pixel_depth=1,
        quantizer=VQConfig(codebook_size=64, code_dim=8, update="ema", kmeans_iterations=5, revive_after=20),
    )  # fmt: skip
    return LaVIT(replace(config, **overrides))
