"""RAR: next-token prediction in a random order that is annealed to the raster order while it trains.

Yu et al. 2024, arXiv 2411.00776, section 3; adaLN-zero blocks as in DiT (arXiv 2212.09748).

    sequence   [start, class, id_o0, id_o1, ...]      o: the order, o_j the position visited at step j
    input j    embedding + position(where it is) + target(where the token is that it predicts)
    c_j        class + step(j)                        conditions every norm of row j
    block      x = x + g1 attention(norm(x) (1 + s1) + b1);  x = x + g2 mlp(norm(x) (1 + s2) + b2)
               [b1, s1, g1, b2, s2, g2] from silu(c_j)
    logits     head(norm(x) (1 + s) + b)              [s, b] from silu(c_j): the other way round than in the blocks

Guidance at step i of N:  s_i = 1 + (s - 1) (1 - cos(pi (i / N)^p)) / 2.
B images, N tokens, T tokens given, D width, K codes, C classes. Rows of the table: K codes, one unused, C classes, no class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.classes import ClassConditioned, LayoutConfig, check_least
from vistok.generators.condition import Condition
from vistok.layers.attention import Attention
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import MLP
from vistok.layers.norms import modulate, plain_layer_norm
from vistok.layers.placement import PlacedCache, Placement
from vistok.modeling import VisualModel
from vistok.registry import register

NORM_EPS = 1e-6
PREFIX = 2  # start and class
SPARE_POSITIONS, SPARE_STEPS = 1024, 100  # rows that the published tables have beyond N; most are never read


@dataclass(frozen=True, kw_only=True)
class RARConfig(LayoutConfig):
    """Shape of the generator."""

    codebook_size: int = 1024
    guidance_power: float = 2.75
    """p: how late the guidance rises; 0 keeps it at its full scale throughout."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, guidance_power=0)


class Block(nn.Module):
    """Attention and feed-forward behind norms with weights, modulated row by row."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config.width, config.num_heads, qk_norm="learned", bias=True)
        self.mlp_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.hidden)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(self, x: Tensor, c: Tensor, **attention) -> Tensor:
        """x: [B, T, D]. c: [B, T, D], activated."""
        b1, s1, g1, b2, s2, g2 = self.modulation(c).chunk(6, dim=-1)
        x = x + g1 * self.attention(modulate(self.attention_norm(x), b1, s1), **attention)
        return x + g2 * self.mlp(modulate(self.mlp_norm(x), b2, s2))


@register
class RAR(ClassConditioned, VisualModel):
    """A causal transformer over visual token ids that knows which position it is asked for."""

    Config = RARConfig

    def __init__(self, config: RARConfig):
        super().__init__(config)
        self.layout, self.vocab_size = config.layout, config.codebook_size
        self.max_tokens = N = self.layout.num_tokens
        D = config.width
        self.embedding = nn.Embedding(config.codebook_size + config.num_classes + 2, D)
        self.start = nn.Parameter(torch.empty(D))
        self.positions = nn.Parameter(torch.empty(N + SPARE_POSITIONS, D))  # start, class, then the N positions
        self.targets = nn.Parameter(torch.empty(N + SPARE_POSITIONS, D))  # likewise
        self.steps = nn.Parameter(torch.empty(N + SPARE_STEPS, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, config.codebook_size)
        self._initialise()

    def _initialise(self) -> None:
        """Small everywhere; modulations zero, so that training starts from the identity (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.start, self.positions, self.targets, self.steps):
            nn.init.trunc_normal_(table, std=0.02)
        for linear in (*(block.modulation for block in self.blocks), self.head_modulation):
            nn.init.zeros_(linear.weight)

    def guidance_schedule(self, scale: float) -> Callable[[int], float]:
        """Guidance of each step: rises from 1 to the scale by a powered cosine, constant where the power is 0."""
        N, power = self.max_tokens, self.settings.guidance_power
        if not power:
            return lambda step: scale
        return lambda step: 1 + (scale - 1) * (1 - math.cos(math.pi * (step / N) ** power)) / 2

    def new_cache(self, batch_size: int, max_tokens: int | None = None) -> "RARCache":
        """An empty cache for the prefix and `max_tokens` tokens (all by default) of `batch_size` rows."""
        config = self.settings
        return RARCache(
            num_layers=config.depth,
            batch_size=batch_size,
            num_heads=config.num_heads,
            max_length=PREFIX + (max_tokens or self.max_tokens),
            head_width=config.width // config.num_heads,
            device=self.device,
            dtype=self.dtype,
        )

    def forward(
        self, ids: Tensor, condition: Condition | None = None, *, cache: "RARCache | None" = None, orders: Tensor | None = None
    ) -> Tensor:
        """Logits of next tokens, in the order they are visited.

        ids: [B, T] int64 as visited, T may be 0. condition: of the B images; None: null, or that of a filled cache.
        orders: [B, N] int64, row j the position visited at step j; None: raster. A cache is for the raster order.
        Without a cache, or with an empty one, the prefix comes first: returns [B, T + 1, K], row j predicts the token of step j (row N
        predicts nothing). With a filled cache ids continue what it holds: returns [B, T, K]; the cache grows by T.
        """
        return self.head(self.features(ids, condition, cache=cache, orders=orders))

    def features(
        self, ids: Tensor, condition: Condition | None = None, *, cache: "RARCache | None" = None, orders: Tensor | None = None
    ) -> Tensor:
        """What the head reads: as `forward`, but [B, T + 1, D], or [B, T, D] behind a filled cache."""
        (B, T), N = ids.shape, self.max_tokens
        if orders is not None and cache is not None:
            raise ValueError("a cache is for the raster order; give orders without one")
        filled = 0 if cache is None else cache.length
        first = max(filled - PREFIX, 0)  # the step that ids[:, 0] was visited at
        if first + T > N:
            raise ValueError(f"token {first + T - 1} is asked for but this generator knows {N} tokens")
        if filled and condition is None:
            classes = cache.classes
        else:
            classes = self.embedding(self._class_rows(condition or self.make_condition(B)))[:, None]  # [B, 1, D]
        if orders is None:
            orders = torch.arange(N, device=ids.device).expand(B, -1)
        x = self.embedding(ids) + self.positions[PREFIX + orders[:, first : first + T]]
        if not filled:
            start = (self.start + self.positions[0]).expand(B, 1, -1)
            x = torch.cat([start, classes + self.positions[1], x], dim=1)
        # the class row asks for step 0, the token of step j for step j + 1; the start and the last token ask for nothing
        asks = self.targets[PREFIX + orders[:, first + bool(filled) : first + T + 1]]
        x = x + F.pad(asks, (0, 0, 0 if filled else 1, int(first + T == N)))
        c = F.silu(classes + self.steps[filled : filled + x.shape[1]])
        return self._run(x, c, classes, cache)

    def _class_rows(self, condition: Condition) -> Tensor:
        labels = condition.labels
        return torch.where(labels < 0, self.settings.num_classes, labels) + self.vocab_size + 1

    def _run(self, x: Tensor, c: Tensor, classes: Tensor, cache: "RARCache | None") -> Tensor:
        """The blocks on x [B, T, D], which sits behind the cache's content; what the head reads."""
        filled, T = (0 if cache is None else cache.length), x.shape[1]
        mask = None
        if cache is not None:
            cache.check(T)
            cache.classes = classes
        if filled and T > 1:
            mask = torch.ones(T, filled + T, dtype=torch.bool, device=x.device).tril(filled)
        for i, block in enumerate(self.blocks):
            x = block(x, c, mask=mask, is_causal=not filled, cache=None if cache is None else cache.layer(i))
        if cache is not None:
            cache.advance(T)
        if not filled:
            x, c = x[:, 1:], c[:, 1:]
        return self._modulated(x, c)

    def _modulated(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.head_modulation(c).chunk(2, dim=-1)
        return modulate(plain_layer_norm(x, NORM_EPS), shift, scale)

    def extend(self, ids: Tensor, placement: Placement, cache: PlacedCache, *, layers: Sequence[int] | None = None) -> Tensor:
        """Features [B, M, D] of inputs ids [B, M] that stand where the placement says, in raster order, behind the cache's prefix.

        Positions beyond the image count as its last; what is predicted there means nothing. layers: blocks that are run, all by default.
        """
        positions = placement.positions.clamp(max=self.max_tokens - 1)
        asks = torch.where((positions < self.max_tokens - 1)[..., None], self.targets[PREFIX + positions + 1], 0)
        x = self.embedding(ids) + self.positions[PREFIX + positions] + asks
        c = F.silu(cache.prefix.classes + self.steps[PREFIX + positions])
        for i in range(len(self.blocks)) if layers is None else layers:
            x = self.blocks[i](x, c, mask=placement.mask, cache=cache.layer(i, placement))
        return self._modulated(x, c)


class RARCache(KVCache):
    """Keys and values, and the class vectors [B, 1, D] that later steps need again."""

    classes: Tensor | None = None

    def keep_rows(self, num_rows: int) -> None:
        """Forget all rows but the first ones."""
        super().keep_rows(num_rows)
        self.classes = None if self.classes is None else self.classes[:num_rows]


@register
def rar_tiny(**overrides) -> RAR:
    """The smallest that still works; for tests and tours."""
    base = RARConfig(codebook_size=200, layout_shape=(4, 4), width=64, depth=2, num_heads=2, hidden=128, num_classes=0)
    return RAR(replace(base, **overrides))


@register
def rar_b(**overrides) -> RAR:
    """RAR-B: 261 M parameters, 256 tokens of 1,024 codes, 1,000 classes."""
    return RAR(replace(RARConfig(), **overrides))
