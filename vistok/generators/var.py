"""VAR: predict all tokens of the next scale at once from the coarser scales.

Tian et al. 2024, "Visual Autoregressive Modeling" (arXiv 2404.02905), section 3; over the tokens of `tokenizers/var_vqvae.py`.

    F_k = sum over scales up to k of phi(bicubic(codes of scale))          the picture as far as scale k knows it
    input of scale 0:  class + start;  of scale k:  word(area(F_k-1, s_k));  both + position + level k
    x = x + g1 attention(norm(x) (1 + c1) + b1);  x = x + g2 mlp(norm(x) (1 + c2) + b2)          g, c, b: from the class
    attention: q, k of unit length, q times a learned exp(temperature); a token sees its own scale and all coarser ones
    logits = head(norm(x) (1 + c) + b): row n predicts token n, from the scales before that token's

Guidance at scale k of S:  s_k = 1 + (s - 1) k / (S - 1);  the paper's t is s - 1.
The sums need codes, so the model carries its tokenizer's codebook and phis, frozen (`read_codes_of`).

B images, s_k side of scale k, S scales, N tokens, T tokens given, D width, h heads, d = D / h, L layers, K codebook size, C code width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.classes import ClassConditioned, ClassConfig, check_least
from vistok.generators.condition import ClassTokens, Condition
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import MLP
from vistok.layers.norms import modulate, plain_layer_norm
from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.tokenizers.var_vqvae import SCALES_512, ScaleCodesConfig

MAX_TEMPERATURE = math.log(100)
PLAIN_SCALE = 0.25  # without unit lengths the products are scaled by 0.25/sqrt(d), not 1/sqrt(d): so were the weights trained


@dataclass(frozen=True, kw_only=True)
class VARConfig(ClassConfig):
    """Shape of the generator and of its tokenizer's codes; the default is VAR-d16."""

    codes: ScaleCodesConfig = ScaleCodesConfig()
    """The tokenizer's codebook, scales and phis."""
    width: int = 1024
    depth: int = 16
    """L."""
    num_heads: int = 16
    mlp_ratio: float = 4.0
    """Width inside the feed-forward layers, in D."""
    shared_modulation: bool = False
    """One modulation layer for all blocks, each adding its own offsets; False: a layer a block."""
    unit_attention: bool = True
    """Queries and keys of unit length with a learned temperature a head; False: plain products."""
    norm_eps: float = 1e-6
    """Epsilon of the norms."""

    text = "none"  # what a pipeline asks a generator: this one reads no captions

    def __post_init__(self):
        super().__post_init__()
        check_least(self, depth=1)

    @property
    def hidden_width(self) -> int:
        """Width inside the feed-forward layers."""
        return round(self.width * self.mlp_ratio)


class ScaleCache(KVCache):
    """Keys and values of whole scales, and what later scales need besides: F after each scale, and the class's modulations.

    totals: [B, C, h, w] each, one a scale whose tokens are known. modulations: of each block [B, 6, 1, D], then of the head [B, 2, 1, D].
    """

    def __init__(self, ends: Sequence[int], **shape):
        super().__init__(**shape)
        self.ends = tuple(ends)
        self.totals: list[Tensor] = []
        self.modulations: list[Tensor] = []

    @property
    def num_scales(self) -> int:
        """Scales whose keys and values are here."""
        return self.ends.index(self.length) + 1 if self.length else 0

    def rollback(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError: there are not that many, or no scale ends there."""
        if length not in (0, *self.ends):
            raise ValueError(f"cannot go back to {length} positions: scales end at {', '.join(map(str, self.ends))}")
        super().rollback(length)
        del self.totals[max(self.num_scales - 1, 0) :]

    def keep_rows(self, num_rows: int) -> None:
        """Forget all rows but the first ones."""
        super().keep_rows(num_rows)
        self.totals = [total[:num_rows] for total in self.totals]
        self.modulations = [modulation[:num_rows] for modulation in self.modulations]


class ScaleAttention(nn.Module):
    """Self-attention with biases on queries and values only, over unit queries and keys unless `unit` is False."""

    def __init__(self, width: int, num_heads: int, *, unit: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.temperature = nn.Parameter(torch.full((num_heads,), math.log(4))) if unit else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, mask: Tensor | None, cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None) -> Tensor:
        """x: [B, T, D]. mask: [T, keys] bool, True attends. cache: takes the new k, v [B, h, T, d], returns all of them."""
        B, T, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = PLAIN_SCALE / math.sqrt(D // self.num_heads)
        if self.temperature is not None:
            scale = 1.0
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=MAX_TEMPERATURE).exp()[:, None, None]
            k = F.normalize(k, dim=-1)
        if cache is not None:
            k, v = cache(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Attention and feed-forward, modulated by the class: gains g1, g2, scales c1, c2 and shifts b1, b2, in this order."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.attention = ScaleAttention(config.width, config.num_heads, unit=config.unit_attention)
        self.mlp = MLP(config.width, config.hidden_width, approximate="tanh")
        self.modulation = None if config.shared_modulation else nn.Linear(config.width, 6 * config.width)
        self.offsets = nn.Parameter(torch.randn(6, config.width) / config.width**0.5) if config.shared_modulation else None

    def modulations(self, class_vector: Tensor, shared: Tensor | None) -> Tensor:
        """[B, 6, 1, D] of the activated class vector [B, D], or of what the shared layer made of it [B, 6 D]."""
        made = self.modulation(class_vector) if shared is None else shared
        made = made.unflatten(1, (6, -1))
        return (made if self.offsets is None else made + self.offsets)[:, :, None]

    def forward(self, x: Tensor, modulations: Tensor, *, keep: Tensor | None = None, **attention) -> Tensor:
        """x: [B, T, D]. keep: [2, B, 1, D] factors on both branches (dropout), or None."""
        g1, g2, c1, c2, b1, b2 = modulations.unbind(1)
        branch = g1 * self.attention(modulate(plain_layer_norm(x, self.eps), b1, c1), **attention)
        x = x + (branch if keep is None else branch * keep[0])
        branch = g2 * self.mlp(modulate(plain_layer_norm(x, self.eps), b2, c2))
        return x + (branch if keep is None else branch * keep[1])


@register
class VAR(ClassConditioned, VisualModel):
    """A transformer over scales of visual token ids."""

    Config = VARConfig

    def __init__(self, config: VARConfig):
        super().__init__(config)
        codes, D = config.codes, config.width
        self.layout, self.vocab_size = codes.layout, codes.codebook_size
        self.quantizer = codes.build().requires_grad_(False)
        self.sizes, self.max_tokens = self.quantizer.sizes, self.quantizer.num_tokens
        self.ends = tuple(sum(self.sizes[: i + 1]) for i in range(len(self.sizes)))
        self.classes = ClassTokens(config.num_classes, D)
        self.start = nn.Parameter(torch.empty(self.sizes[0], D))
        self.word = nn.Linear(codes.code_dim, D)
        self.positions = nn.Parameter(torch.empty(self.max_tokens, D))
        self.levels = nn.Embedding(len(self.sizes), D)
        self.shared_modulation = nn.Linear(D, 6 * D) if config.shared_modulation else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, codes.codebook_size)
        numbers = torch.cat([torch.full((size,), number) for number, size in enumerate(self.sizes)])
        self.register_buffer("scale_numbers", numbers, persistent=False)  # [N]: the scale of each token
        self._initialise()

    def _initialise(self) -> None:
        std = math.sqrt(1 / self.settings.width / 3)
        for table in (self.classes.table.weight, self.start, self.positions, self.levels.weight):
            nn.init.trunc_normal_(table, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # the residual stream keeps its scale at any depth
            for out in (block.attention.proj, block.mlp.out):
                out.weight.data.div_(math.sqrt(2 * len(self.blocks)))

    def read_codes_of(self, tokenizer) -> "VAR":
        """Take over the codebook and the phis of a VARVQVAE; returns self. Raises ValueError: its codes are of another shape."""
        if tokenizer.settings.codes != self.settings.codes:
            raise ValueError(f"the tokenizer's codes are {tokenizer.settings.codes}, this generator was built for {self.settings.codes}")
        state = tokenizer.quantizer.state_dict()  # may hold more: what a codebook in training counts
        self.quantizer.load_state_dict({key: state[key] for key in self.quantizer.state_dict()})
        return self

    def new_cache(self, batch_size: int, max_tokens: int | None = None) -> ScaleCache:
        """An empty cache for `max_tokens` tokens (all by default) of `batch_size` rows."""
        config = self.settings
        return ScaleCache(
            self.ends,
            num_layers=config.depth,
            batch_size=batch_size,
            num_heads=config.num_heads,
            max_length=max_tokens or self.max_tokens,
            head_width=config.width // config.num_heads,
            device=self.device,
            dtype=self.word.weight.dtype,
        )

    def step_sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens of each decoding step: a scale. Raises ValueError: num_tokens ends inside a scale."""
        return self.sizes[: self.quantizer.num_scales(num_tokens)]

    def guidance_schedule(self, scale: float) -> Callable[[int], float]:
        """Guidance of each step where a number is asked for: rising from 1 at the first scale to `scale` at the last."""
        last = max(len(self.sizes) - 1, 1)
        return lambda step: 1 + (scale - 1) * step / last

    def forward(
        self, ids: Tensor, condition: Condition | None = None, *, cache: ScaleCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Logits of all scales up to the one behind the last whole scale given.

        ids: [B, T] int64, T may be 0. condition: of the B images; None for tokens that continue a filled cache.
        keep: [L, 2, B, 1, D] factors on the residual branches, for dropout drawn outside; None for none.
        Without a cache, or with an empty one: returns [B, N', K], row n predicts token n, N' the end of that scale; the tokens of an
        unfinished scale are not read. With a filled cache ids continue what it holds, by whole scales: returns the new scales' rows.
        Raises ValueError: too many ids, or ids that end inside a scale behind a filled cache.
        """
        first = 0 if cache is None else cache.num_scales  # of the scales to run
        known = max(first - 1, 0)  # scales whose ids came before
        begin = self.ends[known - 1] if known else 0
        through = begin + ids.shape[1]
        last = sum(end <= through for end in self.ends)  # scales whose ids are known now
        continues = known < last < len(self.ends) and self.ends[last - 1] == through
        if through > self.max_tokens or (first and not continues):
            ends = ", ".join(map(str, self.ends))
            raise ValueError(f"{ids.shape[1]} ids behind {begin} are no whole scales with another one behind them; scales end at {ends}")
        totals = [] if cache is None else cache.totals
        if first == 0:
            condition = condition or self.make_condition(len(ids))
            modulations = self._modulations(condition)
        else:
            modulations = cache.modulations
        x = self._inputs(ids, known, last, first, totals, condition)
        if cache is not None:
            cache.check(x.shape[1])
            cache.modulations = modulations
        return self._head(self._run(x, modulations, cache, keep), modulations[-1])

    def _modulations(self, condition: Condition) -> list[Tensor]:
        """Of each block [B, 6, 1, D], then of the head [B, 2, 1, D]: they depend on the class alone."""
        vector = F.silu(self.classes(condition.labels)[:, 0])
        shared = None if self.shared_modulation is None else self.shared_modulation(vector)
        return [*(block.modulations(vector, shared) for block in self.blocks), self.head_modulation(vector).unflatten(1, (2, 1, -1))]

    def _inputs(self, ids: Tensor, known: int, last: int, first: int, totals: list[Tensor], condition: Condition | None) -> Tensor:
        """What the blocks read in place of the scales from `first` on, [B, T', D]; ids are those of the scales `known` to `last` - 1.

        totals: F after the scales before `known`; those of the new ones are appended.
        """
        parts = [] if first else [self.classes(condition.labels) + self.start]
        offset = 0
        for number in range(known, last):
            part = ids[:, offset : offset + self.sizes[number]]
            offset += self.sizes[number]
            totals.append(self.quantizer.add(totals[-1] if totals else 0.0, part, number))
            if number + 1 < len(self.sizes):
                reduced = F.interpolate(totals[-1], size=self.layout.shape[number + 1], mode="area")
                parts.append(self.word(reduced.flatten(2).transpose(1, 2).to(self.word.weight.dtype)))
        x = torch.cat(parts, dim=1)
        start = self.ends[first - 1] if first else 0
        rows = slice(start, start + x.shape[1])
        return x + self.positions[rows] + self.levels(self.scale_numbers[rows])

    def _run(self, x: Tensor, modulations: list[Tensor], cache: ScaleCache | None, keep: Tensor | None) -> Tensor:
        """The blocks on x [B, T', D], which sits behind the cache's content."""
        start, T = (0 if cache is None else cache.length), x.shape[1]
        scales = self.scale_numbers[: start + T]
        # one scale sees all there is, so it needs no mask
        mask = None if start + T in self.ends and T == self.sizes[self.ends.index(start + T)] else scales[start:, None] >= scales
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                modulations[i],
                keep=None if keep is None else keep[i],
                mask=mask,
                cache=None if cache is None else cache.layer(i),
            )
        if cache is not None:
            cache.advance(T)
        return x

    def _head(self, x: Tensor, modulations: Tensor) -> Tensor:
        scale, shift = modulations.unbind(1)
        return self.head(modulate(plain_layer_norm(x, self.settings.norm_eps), shift, scale))


def _preset(depth: int, overrides: dict, **fields) -> VAR:
    """VAR-d{depth}: 64 channels and one head a layer."""
    return VAR(replace(VARConfig(width=64 * depth, depth=depth, num_heads=depth, **fields), **overrides))


@register
def var_tiny(**overrides) -> VAR:
    """The smallest that still works, for var-vqvae-tiny; for tests and tours."""
    codes = ScaleCodesConfig(scales=(1, 2, 3, 4), codebook_size=128, code_dim=8)
    return VAR(replace(VARConfig(codes=codes, width=64, depth=2, num_heads=4, num_classes=9), **overrides))


@register
def var_d16(**overrides) -> VAR:
    """VAR-d16, 310 M parameters."""
    return _preset(16, overrides)


@register
def var_d20(**overrides) -> VAR:
    """VAR-d20, 600 M parameters."""
    return _preset(20, overrides)


@register
def var_d24(**overrides) -> VAR:
    """VAR-d24, 1.0 B parameters."""
    return _preset(24, overrides)


@register
def var_d30(**overrides) -> VAR:
    """VAR-d30, 2.0 B parameters."""
    return _preset(30, overrides)


@register
def var_d36_512(**overrides) -> VAR:
    """VAR-d36-s for 512 px, with one modulation layer for all blocks."""
    return _preset(36, overrides, codes=ScaleCodesConfig(scales=SCALES_512), shared_modulation=True)
