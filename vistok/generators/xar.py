"""xAR: flow matching of the next entity (a cell, a scale, a token: see `order.py`) given the ones before it, themselves noisy in training.

Ren et al. 2025, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388), sections 3.2 and 3.3.

    x_e,t = (1 - t_e) x_e + t_e noise                              each entity at its own time; loss = mean |v - (noise - x)|^2
    c_e   = time(floor(1000 t_e)) + class
    y     = rmsnorm(in(x) + positions);   encoder blocks, rmsnorm;   y = in'(y) + positions';   decoder blocks, rmsnorm;   v = out(y)
    block:  y = y + g1 attention(rmsnorm(y) (1 + s1) + b1);   y = y + g2 mlp(rmsnorm(y) (1 + s2) + b2)     g, s, b: linear in silu(c)
    attention: a slot sees its own entity and all before; two-dimensional rotary positions. mlp: out(gelu(gate y) * up y)

Sampling (`sample`): entity after entity from noise, those before it clean at t = 0. Guidance of entity e of E: 1 + (s - 1) e / (E - 1).
Done once instead of every step, with the same result: modulations for each (class, time); keys and values of finished entities, in memory
allocated once; and nothing unconditional runs where guidance is 1.

B images, E entities, n slots of an entity, S all slots, T slots given, C channels, D width, h heads, d = D / h.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vistok.generators.condition import ClassTokens, Condition, check_classes, class_condition
from vistok.generators.order import OrderConfig
from vistok.generators.xar_sampling import FlowSampling, Sampler, time_index
from vistok.layers.attention import Attention
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import GEGLU
from vistok.layers.norms import modulate
from vistok.layers.positions import time_features
from vistok.layers.rope import rope_table, rotate
from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.tokens import VisualTokens

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class XARConfig:
    """Shape of the generator; the default is xAR-B."""

    order: OrderConfig = OrderConfig()
    """The X, and the tokens it is made of."""
    code_dim: int = 16
    """C: channels of a token."""
    width: int = 768
    """D."""
    encoder_depth: int = 8
    """Blocks of the first half."""
    decoder_depth: int = 8
    """Blocks of the second half."""
    num_heads: int = 12
    """h."""
    hidden: int = 2048
    """Width inside the feed-forward layers."""
    num_classes: int = 1000
    """Classes a picture can be asked of; 0: unconditional."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they have names."""
    norm_eps: float = 1e-6
    """Epsilon of the norms."""

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))
        least = dict(code_dim=1, width=1, encoder_depth=0, decoder_depth=0, num_heads=1, hidden=1, num_classes=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 4 num_heads={4 * self.num_heads}")
        check_classes(self.classes, self.num_classes)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have the same name")

    @property
    def text(self) -> str:
        """How captions are read: they are not."""
        return "none"


class Block(nn.Module):
    """Attention and feed-forward, modulated by gains g1, g2, scales s1, s2 and shifts b1, b2, in this order."""

    def __init__(self, config: XARConfig):
        super().__init__()
        D = config.width
        self.norm = nn.RMSNorm(D, eps=config.norm_eps, elementwise_affine=False)
        self.attention = Attention(D, config.num_heads, bias=True)
        self.mlp = GEGLU(D, config.hidden)
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x: Tensor, modulations: Tensor, **attention) -> Tensor:
        """x: [B, T, D]. modulations: [B, T or 1, 6, D]."""
        g1, g2, s1, s2, b1, b2 = modulations.unbind(2)
        x = x + g1 * self.attention(modulate(self.norm(x), b1, s1), **attention)
        return x + g2 * self.mlp(modulate(self.norm(x), b2, s2))


@register
class XAR(VisualModel):
    """A velocity of entities of continuous tokens, given the entities before them."""

    Config = XARConfig

    def __init__(self, config: XARConfig):
        super().__init__(config)
        D, C = config.width, config.code_dim
        self.order = config.order.build()
        self.layout, self.max_tokens, self.code_dim = self.order.layout, self.order.layout.num_tokens, C
        self.classes = ClassTokens(config.num_classes, D)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        self.encoder_in, self.decoder_in = nn.Linear(C, D), nn.Linear(D, D)
        self.encoder_positions, self.decoder_positions = (nn.Parameter(torch.empty(self.order.num_slots, D)) for _ in range(2))
        self.in_norm, self.encoder_norm, self.decoder_norm = (nn.RMSNorm(D, eps=config.norm_eps) for _ in range(3))
        self.encoder_blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_depth))
        self.decoder_blocks = nn.ModuleList(Block(config) for _ in range(config.decoder_depth))
        self.out = nn.Linear(D, C)
        device = self.out.weight.device
        self.register_buffer("rope", rope_table(self.order.coordinates.to(device), D // config.num_heads), persistent=False)
        self.register_buffer("entities", self.order.entities.to(device), persistent=False)
        for table in (self.classes.table.weight, self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order they run."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def make_condition(
        self, batch_size: int, *, labels: Tensor | Sequence[int] | None = None, captions: Sequence[str] | None = None, features=None
    ) -> Condition:
        """Conditions of B images on the model's device: labels [B], -1 for none; all none without them.

        Raises ValueError: a label is no class, or captions are given, which this generator does not read.
        """
        options = {"labels": labels, "captions": captions, "features": features}
        return class_condition(batch_size, self.settings.num_classes, self.device, **options)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for all slots of `batch_size` rows."""
        config = self.settings
        return KVCache(
            num_layers=len(self.blocks),
            batch_size=batch_size,
            num_heads=config.num_heads,
            max_length=self.order.num_slots,
            head_width=config.width // config.num_heads,
            device=self.device,
            dtype=self.out.weight.dtype,
        )

    def guidance_schedule(self, scale: float) -> Callable[[int], float]:
        """Guidance of each entity where a number is asked for: rising from 1 at the first to `scale` at the last."""
        last = self.order.num_entities - 1
        return lambda entity: 1 + (scale - 1) * entity / last if last else scale

    def time_embedding(self, indices: Tensor) -> Tensor:
        """[..., D] of whole numbers from `time_index` [...]."""
        features = time_features(indices.flatten(), width=TIME_FEATURES, max_period=10000.0)
        return self.time_mlp(features.to(self.out.weight.dtype)).unflatten(0, indices.shape)

    def modulations(self, indices: Tensor, labels: Tensor) -> list[Tensor]:
        """Of each block, [B, E', 6, D], for times [B, E'] as whole numbers and classes [B]."""
        vector = nn.functional.silu(self.time_embedding(indices) + self.classes(labels))
        return [block.modulation(vector).unflatten(-1, (6, -1)) for block in self.blocks]

    def forward(self, slots: Tensor, condition: Condition, *, times: Tensor, cache: KVCache | None = None) -> Tensor:
        """Velocities [B, T, C] of whole entities.

        slots: [B, T, C], of the first entities or of those behind the cache's content; each at its own time, times [B, E'] in [0, 1].
        cache: keys and values of the new slots are written behind its content but not counted: who knows that the first n of them are
        clean calls `cache.advance(n)`.
        Raises ValueError: slots end inside an entity, or the times are not one an entity.
        """
        return self.run(slots, self.modulations(time_index(times), condition.labels), cache=cache)

    def run(self, slots: Tensor, modulations: Sequence[Tensor], *, cache: KVCache | None = None) -> Tensor:
        """`forward` with modulations of each block, [B, E', 6, D]."""
        start, T = (0 if cache is None else cache.length), slots.shape[1]
        count = self.order.entities_within(start + T) - self.order.entities_within(start)
        if any(m.shape[1] != count for m in modulations):
            raise ValueError(f"{T} slots from {start} on are {count} entities, but there are times for {modulations[0].shape[1]}")
        if cache is not None:
            cache.check(T)
        rows = slice(start, start + T)
        entities = self.entities[: start + T]
        # the last entity sees all there is, so alone it needs no mask
        mask = None if count == 1 else entities[start:, None] >= entities
        attention = dict(mask=mask, rotate=partial(rotate, table=self.rope[rows]))
        x = self.in_norm(self.encoder_in(slots) + self.encoder_positions[rows])
        for number, (block, modulation) in enumerate(zip(self.blocks, modulations)):
            if number == len(self.encoder_blocks):
                x = self._between(x, rows)
            per_slot = modulation if count == 1 else modulation[:, entities[start:] - entities[start]]
            x = block(x, per_slot, cache=None if cache is None else cache.layer(number), **attention)
        if not self.decoder_blocks:
            x = self._between(x, rows)
        return self.out(self.decoder_norm(x))

    def _between(self, x: Tensor, rows: slice) -> Tensor:
        return self.decoder_in(self.encoder_norm(x)) + self.decoder_positions[rows]

    def add_noise(self, slots: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t [B, S, C] of clean slots and noise [B, S, C], each entity at its time, times [B, E]."""
        t = times[:, self.entities, None].to(slots.dtype)
        return (1 - t) * slots + t * noise

    def denoising_loss(self, slots: Tensor, condition: Condition, *, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error of the velocity with noisy context, [B]: an image's own.

        slots, noise: [B, S, C], clean (`order.pack`) and standard normal. times: [B, E]; the paper's are sigmoids of standard normals.
        """
        velocity = self(self.add_noise(slots, noise, times), condition, times=times)
        return (velocity - (noise - slots)).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        generators: Sequence[torch.Generator] | None = None,
        noise: Callable[[int, int], Tensor] | None = None,
        sampling: FlowSampling | None = None,
        guidance_scale: float | Callable[[int], float] = 1.0,
        prefix: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> VisualTokens:
        """New images of the conditions, as values.

        generators: one an image. noise: instead of them, a function of entity and draw (0 is where the entity starts, k > 0 the noise of
        step k - 1) that gives [B, n, C]. One of the two.
        sampling: steps and solver, those of xAR-B by default.
        guidance_scale: 1 is off; a number is what the last entity gets (`guidance_schedule`), a function gives that of each entity.
        prefix: [B, n, C] slots of the first entities, kept as they are; the same generators continue them as an unbroken run would.
        on_step: called with (entity, values so far [B, N, C], see `PredictionOrder.partial`) after each entity.
        Memory beside the cache: 6 D numbers a block for every pair of a class in the batch and a distinct time.
        Raises ValueError: no noise or two sources of it, guidance below 1, or a prefix that is no whole entities.
        """
        return Sampler(self, condition, generators, noise, sampling or FlowSampling(), guidance_scale, prefix).run(on_step)


def _preset(overrides: dict, **fields) -> XAR:
    return XAR(replace(XARConfig(**fields), **overrides))


@register
def xar_tiny(**overrides) -> XAR:
    """The smallest that still works: cells of 2 x 2 on a 4 x 4 grid of 4 channels; for tests and tours."""
    order = OrderConfig(kind="cell", layout_shape=(4, 4), size=2)
    return _preset(overrides, order=order, code_dim=4, width=32, encoder_depth=1, decoder_depth=1, num_heads=2, hidden=64, num_classes=9)


@register
def xar_b(**overrides) -> XAR:
    """xAR-B, 173 M parameters, over the 16 x 16 x 16 latents of a 256 px image."""
    return _preset(overrides)


@register
def xar_l(**overrides) -> XAR:
    """xAR-L, 608 M parameters."""
    return _preset(overrides, width=1024, encoder_depth=16, decoder_depth=16, num_heads=16, hidden=2730)


@register
def xar_h(**overrides) -> XAR:
    """xAR-H, 1.2 B parameters."""
    return _preset(overrides, width=1280, encoder_depth=20, decoder_depth=20, num_heads=16, hidden=3413)
