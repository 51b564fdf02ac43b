"""xAR: flow matching of the next entity (a cell, a scale, a token: see `order.py`) given the ones before it, themselves noisy in training.

Ren et al. 2025, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388), sections 3.2 and 3.3.

    x_e,t = (1 - t_e) x_e + t_e noise                              each entity at its own time; loss = mean |v - (noise - x)|^2
    c_e   = time(floor(1000 t_e)) + class
    y     = rmsnorm(in(x) + positions);   encoder blocks, rmsnorm;   y = in'(y) + positions';   decoder blocks, rmsnorm;   v = out(y)
    block:  y = y + g1 attention(rmsnorm(y) (1 + s1) + b1);   y = y + g2 mlp(rmsnorm(y) (1 + s2) + b2)     g, s, b: linear in silu(c)
    attention: a slot sees its own entity and all before; two-dimensional rotary positions. mlp: out(gelu(gate y) * up y)

Ours: captions, as tokens in front that every entity sees, at t = 0 and unrotated; values brought to mean 0 and deviation 1 a channel; and
teacher forcing to compare with, where an entity sees those before it clean: [clean entities | noisy entities] in one pass.

Sampling (`sample`): entity after entity from noise, those before it clean at t = 0, or (ours) at a small t with as much noise.
Guidance of entity e of E: 1 + (s - 1) e / (E - 1).
Done once instead of every step, with the same result: modulations for each (class, time); keys and values of finished entities, in memory
allocated once; and nothing unconditional runs where guidance is 1.

B images, E entities, n slots of an entity, S all slots, T slots given, P caption tokens, C channels, D width, L blocks, h heads, d = D / h.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.generators.classes import ClassConfig, check_least
from vistok.generators.condition import NULL, ClassTokens, Condition, ConditionPrefix, make_condition
from vistok.generators.order import OrderConfig
from vistok.generators.xar_sampling import FlowSampling, Sampler, time_index
from vistok.layers.kv_cache import KVCache
from vistok.layers.modulated import ModulatedBlock
from vistok.layers.positions import time_features
from vistok.layers.rope import rope_table, rotate
from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.tokens import VisualTokens

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class XARConfig(ClassConfig):
    """Shape of the generator; the default is xAR-B."""

    order: OrderConfig = OrderConfig()
    """The X, and the tokens it is made of."""
    code_dim: int = 16
    """C: channels of a token."""
    encoder_depth: int = 8
    """Blocks of the first half."""
    decoder_depth: int = 8
    """Blocks of the second half."""
    hidden: int = 2048
    """Width inside the feed-forward layers."""
    text: str = "none"
    """How captions are read: "none", "hash" (words and trigrams hashed into a table), or a transformers text model, by folder or hub id."""
    caption_tokens: int = 8
    """Tokens of a caption: words, besides the token for all of them, with "hash"; the text model's tokens otherwise."""
    caption_width: int = 0
    """Width of the text model's features; not used by "hash"."""
    caption_buckets: int = 4096
    """Rows of the table of "hash"."""
    value_mean: tuple[float, ...] = ()
    """Mean of each channel of the tokens, which the network sees with mean 0; none: as they are."""
    value_deviation: tuple[float, ...] = ()
    """Standard deviation of each channel, which the network sees with deviation 1; none: as they are."""
    context_time: float = 0.0
    """Time at which sampling shows finished entities, with that much noise; 0, clean, as published. Trained with noisy context, a small
    model has hardly ever seen it clean: times of the sigmoid of a normal are below 0.1 once in 70 draws."""
    norm_eps: float = 1e-6
    """Epsilon of the norms."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, code_dim=1, encoder_depth=0, decoder_depth=0, hidden=1, caption_tokens=1, caption_buckets=1)
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 4 num_heads={4 * self.num_heads}")
        if self.text not in ("none", "hash") and self.caption_width < 1:
            raise ValueError(f"text={self.text!r} needs caption_width, the width of that model's features")
        for name in ("value_mean", "value_deviation"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
            if len(getattr(self, name)) not in (0, self.code_dim):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers, but a token {self.code_dim} channels")
        if not 0 <= self.context_time < 1:
            raise ValueError(f"context_time={self.context_time} must be at least 0 and below 1")
        if any(not value > 0 for value in self.value_deviation):
            raise ValueError(f"value_deviation must be above 0, got {min(self.value_deviation)}")

    @property
    def caption_padding(self) -> str:
        """What stands in a short caption's place: a learned vector."""
        return "learned"


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
        self.captions: ConditionPrefix | None = None
        if config.text != "none":
            how = {name: getattr(config, name) for name in ("text", "caption_tokens", "caption_width", "caption_buckets")}
            self.captions = ConditionPrefix(width=D, num_classes=0, **how)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        self.encoder_in, self.decoder_in = nn.Linear(C, D), nn.Linear(D, D)
        self.encoder_positions, self.decoder_positions = (nn.Parameter(torch.empty(self.order.num_slots, D)) for _ in range(2))
        self.in_norm, self.encoder_norm, self.decoder_norm = (nn.RMSNorm(D, eps=config.norm_eps) for _ in range(3))
        block = partial(ModulatedBlock, D, config.num_heads, config.hidden, norm_eps=config.norm_eps)
        self.encoder_blocks = nn.ModuleList(block() for _ in range(config.encoder_depth))
        self.decoder_blocks = nn.ModuleList(block() for _ in range(config.decoder_depth))
        self.out = nn.Linear(D, C)
        device, P = self.out.weight.device, self.prefix_length
        with torch.device("cpu"):  # not every device has the float64 of the table
            table = rope_table(self.order.coordinates, D // config.num_heads)
            table = torch.cat([torch.tensor([1.0, 0.0]).expand(P, table.shape[1], 2), table])  # captions stand still
            entities = nn.functional.pad(self.order.entities, (P, 0), value=-1)
        self.register_buffer("rope", table.to(device), persistent=False)  # [P + S, d/2, 2]
        self.register_buffer("entities", entities.to(device), persistent=False)  # [P + S], -1 for the caption
        mean, deviation = config.value_mean or (0.0,) * C, config.value_deviation or (1.0,) * C
        self.register_buffer("value_mean", torch.tensor(mean, device=device), persistent=False)
        self.register_buffer("value_deviation", torch.tensor(deviation, device=device), persistent=False)
        for table in (self.classes.table.weight, self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[ModulatedBlock]:
        """All blocks, in the order they run."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    @property
    def prefix_length(self) -> int:
        """P: caption tokens in front of every image."""
        return 0 if self.captions is None else self.captions.num_tokens

    def make_condition(
        self,
        batch_size: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Condition:
        """Conditions of B images on the model's device; what is not given is null. Arguments and errors: `GPT.make_condition`."""
        made = make_condition(self.settings, batch_size, labels=labels, captions=captions, features=features)
        if made.labels is None:
            made = replace(made, labels=torch.full((batch_size,), NULL))
        return made.to(self.device)

    def normalise(self, values: Tensor) -> Tensor:
        """Values [..., C] of the tokenizer as the network sees them."""
        return (values - self.value_mean) / self.value_deviation

    def denormalise(self, values: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return values * self.value_deviation + self.value_mean

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for the caption and all slots of `batch_size` rows."""
        config, length = self.settings, self.prefix_length + self.order.num_slots
        heads = dict(num_heads=config.num_heads, head_width=config.width // config.num_heads)
        where = dict(device=self.device, dtype=self.out.weight.dtype)
        return KVCache(num_layers=len(self.blocks), batch_size=batch_size, max_length=length, **heads, **where)

    def step_sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Slots of each entity that makes the first `num_tokens` tokens."""
        order = self.order
        return order.lengths if num_tokens == self.max_tokens else order.lengths[: order.entities_within(num_tokens)]

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

    def forward(
        self, slots: Tensor, condition: Condition, *, times: Tensor, cache: KVCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Velocities [B, T, C] of whole entities.

        slots: [B, T, C], of the first entities or of those behind the cache's content; each at its own time, times [B, E'] in [0, 1].
        cache: keys and values of what is new are written behind its content but not counted: who knows that the first n positions of them
        (the caption's, in an empty cache, then slots) are clean calls `cache.advance(n)`.
        keep: [L, 2, B, 1, D] factors on the residual branches, for dropout drawn outside; None for none.
        Raises ValueError: slots end inside an entity, or the times are not one an entity.
        """
        indices, prefix = time_index(times), None
        if self.captions is not None and not (cache and cache.length):
            prefix, indices = self.captions(condition, len(slots)), nn.functional.pad(indices, (1, 0))
        return self.run(slots, self.modulations(indices, condition.labels), prefix=prefix, cache=cache, keep=keep)

    def run(
        self,
        slots: Tensor,
        modulations: Sequence[Tensor],
        *,
        prefix: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`forward` with modulations of each block, [B, E', 6, D]; those of the caption first where its tokens, prefix [B, P, D], are."""
        P, T, start = self.prefix_length, slots.shape[1], 0 if cache is None else cache.length
        first = max(start - P, 0)
        end = P + first + T
        count = self.order.entities_within(first + T) - self.order.entities_within(first) + (prefix is not None)
        if any(m.shape[1] != count for m in modulations):
            raise ValueError(f"{T} slots from {first} on are {count} entities, but there are times for {modulations[0].shape[1]}")
        if cache is not None:
            cache.check(end - start)
        entities = self.entities[:end]
        groups = None if count == 1 else entities[start:] - entities[start]
        # the last entity sees all there is, so alone it needs no mask
        mask = None if count == 1 else entities[start:, None] >= entities
        return self._network(slots, modulations, slice(P + first, end), groups, mask, prefix=prefix, cache=cache, keep=keep)

    def forced(self, clean: Tensor, noisy: Tensor, condition: Condition, *, times: Tensor, keep: Tensor | None = None) -> Tensor:
        """Velocities [B, S, C] of noisy slots [B, S, C] that see the entities before their own clean, [B, S, C]: teacher forcing.

        times: [B, E]. The same as sampling's passes, all entities at once.
        """
        P, S, known = self.prefix_length, self.order.num_slots, self.order.ends[-1] - self.order.lengths[-1]  # nobody sees the last one
        device = noisy.device
        rows = torch.cat([torch.arange(P, P + known, device=device), torch.arange(P, P + S, device=device)])
        rows = rows if P == 0 else torch.cat([torch.arange(P, device=device), rows])
        entities = self.entities[rows]
        is_clean = torch.arange(len(rows), device=device) < P + known
        before = entities[:, None] > entities
        same = (entities[:, None] == entities) & (is_clean[:, None] == is_clean)
        mask = (before & is_clean) | same
        E = self.order.num_entities
        indices = nn.functional.pad(time_index(times), (E - 1 + (P > 0), 0))
        groups = torch.where(is_clean, entities, entities + E - 1) + (P > 0)
        prefix = None if self.captions is None else self.captions(condition, len(noisy))
        slots = torch.cat([clean[:, :known], noisy], dim=1)
        modulations = self.modulations(indices, condition.labels)
        return self._network(slots, modulations, rows[P:], groups, mask, prefix=prefix, keep=keep)[:, known:]

    def predict(self, slots: Tensor, condition: Condition, *, times: Tensor, sees: Tensor, keep: Tensor | None = None) -> Tensor:
        """Velocities [B, S, C] of all slots [B, S, C], each at its entity's time, times [B, E], where a table says who sees whom.

        sees: [B, S, S] bool, row n may look at slot m; all see the caption. What a plain pass is a special case of (`objectives.py`).
        """
        P, indices, prefix = self.prefix_length, time_index(times), None
        if self.captions is not None:
            prefix, indices = self.captions(condition, len(slots)), nn.functional.pad(indices, (1, 0))
        mask = (self.entities[:, None] >= self.entities).repeat(len(slots), 1, 1)
        mask[:, P:, P:] = sees
        groups = self.entities - self.entities[0]
        modulations = self.modulations(indices, condition.labels)
        return self._network(slots, modulations, slice(P, len(mask[0])), groups, mask[:, None], prefix=prefix, keep=keep)

    def _network(
        self,
        slots: Tensor,
        modulations: Sequence[Tensor],
        rows: slice | Tensor,
        groups: Tensor | None,
        mask: Tensor | None,
        *,
        prefix: Tensor | None,
        cache: KVCache | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Velocities of slots that sit at `rows` of the tables; position i has the modulations groups[i], all the same one for None."""
        P, ahead = self.prefix_length, 0 if prefix is None else self.prefix_length
        places = slice(rows.start - P, rows.stop - P) if isinstance(rows, slice) else rows - P  # of the tables without the caption
        table = self.rope[rows] if not ahead else torch.cat([self.rope[:P], self.rope[rows]])
        x = self.in_norm(self.encoder_in(slots) + self.encoder_positions[places])
        x = x if prefix is None else torch.cat([prefix.to(x.dtype), x], dim=1)
        between = nn.functional.pad(self.decoder_positions[places], (0, 0, ahead, 0))
        for number, (block, modulation) in enumerate(zip(self.blocks, modulations)):
            if number == len(self.encoder_blocks):
                x = self.decoder_in(self.encoder_norm(x)) + between
            per_position = modulation if groups is None else modulation[:, groups]
            layer, factors = None if cache is None else cache.layer(number), None if keep is None else keep[number]
            x = block(x, per_position, keep=factors, mask=mask, rotate=partial(rotate, table=table), cache=layer)
        if not self.decoder_blocks:
            x = self.decoder_in(self.encoder_norm(x)) + between
        return self.out(self.decoder_norm(x[:, ahead:]))

    def add_noise(self, slots: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t [B, S, C] of clean slots and noise [B, S, C], each entity at its time, times [B, E]."""
        t = times[:, self.entities[self.prefix_length :], None].to(slots.dtype)
        return (1 - t) * slots + t * noise

    def denoising_loss(
        self,
        slots: Tensor,
        condition: Condition,
        *,
        noise: Tensor,
        times: Tensor,
        context: Literal["noisy", "clean"] = "noisy",
        keep: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, [B]: an image's own.

        slots, noise: [B, S, C], clean (`normalise`, `order.pack`) and standard normal. times: [B, E]; the paper's are sigmoids of
        standard normals. context: how an entity sees those before it: "noisy", each at its own time, or "clean" (teacher forcing).
        """
        noisy = self.add_noise(slots, noise, times)
        if context == "noisy":
            velocity = self(noisy, condition, times=times, keep=keep)
        else:
            velocity = self.forced(slots, noisy, condition, times=times, keep=keep)
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
        num_slots: int | None = None,
        snap: Callable[[Tensor], Tensor] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> VisualTokens:
        """New images of the conditions, as the tokenizer's values.

        generators: one an image. noise: instead of them, a function of entity and draw (0 is where the entity starts, k > 0 the noise of
        step k - 1; the last, where context_time is above 0, its noise as context) that gives [B, n, C]. One of the two.
        sampling: steps and solver, those of xAR-B by default.
        guidance_scale: 1 is off; a number is what the last entity gets (`guidance_schedule`), a function gives that of each entity.
        prefix: [B, n, C] values of the first entities' slots, kept as they are; the same generators continue them as an unbroken run would.
        num_slots: make only the first entities, up to so many slots, of an order that runs through a sequence; all by default.
        snap: values [B, n, C] of a finished entity to those of the nearest codes, so that what follows sees codes as in training.
        on_step: called with (entity, values of all slots so far [B, n, C]) after each entity; that is what `prefix` takes, and
        `PredictionOrder.partial` shows.
        Memory beside the cache: 6 D numbers a block for every pair of a class in the batch and a distinct time.
        Raises ValueError: no noise or two sources of it, guidance below 1, or a prefix or num_slots that is no whole entities.
        """
        sampler = Sampler(self, condition, generators, noise, sampling or FlowSampling(), guidance_scale, prefix, num_slots, snap)
        return sampler.run(on_step)


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
