"""GPT: predict the next visual token from the condition and the tokens before it.

Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (LlamaGen, arXiv 2406.06525), the network;
over any tokenizer's ids: a grid in raster order, or a 1D sequence of which every prefix is an image (FlexTok, arXiv 2502.13967).

    sequence = [condition tokens (P)] [token 0] [token 1] ...    the output at token n-1, or at the last condition token, predicts token n
    x = x + attention(rmsnorm(x));  x = x + swiglu(rmsnorm(x));  logits = head(rmsnorm(x))        no biases
    positions: 2D rotary on a grid, learned absolute on a sequence

B images, N tokens, T tokens given, P prefix tokens, D width, h heads, d = D / h, L layers, K codebook size.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.condition import Condition, ConditionPrefix, check_classes, make_condition
from vistok.layers.attention import Attention
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import SwiGLU
from vistok.layers.norms import RMSNorm
from vistok.layers.pattention import Pattention, PattentionAttention
from vistok.layers.placement import PlacedCache, Placement
from vistok.layers.rope import rope_table, rotate
from vistok.modeling import VisualModel
from vistok.registry import register
from vistok.tokens import TokenLayout


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the generator and of what it is conditioned on."""

    codebook_size: int = 1000
    """K of the tokenizer."""
    layout_kind: Literal["grid", "sequence"] = "grid"
    """Where the tokenizer's tokens sit; decides the positions: rotary on a grid, learned on a sequence."""
    layout_shape: tuple[int, ...] = (8, 8)
    """(h, w) of a grid, (N,) of a sequence."""
    max_tokens: int = 0
    """Tokens predicted, from the first on; 0 means all of the layout."""
    width: int = 192
    """D."""
    depth: int = 4
    """L."""
    num_heads: int = 6
    """h."""
    hidden: int = 0
    """Width inside the feed-forward layers; 0 means 8/3 of the width, rounded up to a multiple of 256."""
    mixing: Literal["linear", "pattention"] = "linear"
    """What the blocks are made of: matrices, or parameter tokens that can be added to (`grow`; TokenFormer, arXiv 2410.23168)."""
    parameter_tokens: int = 0
    """With "pattention": tokens of each query, key, value and projection layer; 0 means the width."""
    mlp_parameter_tokens: int = 0
    """With "pattention": tokens of each feed-forward layer, which has no hidden width; 0 means four times the width."""
    num_classes: int = 0
    """Classes a picture can be asked of; 0 means no class token."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they have names."""
    text: str = "none"
    """How captions are read: "none", "hash" (words and trigrams hashed into a table), or a transformers text model, by folder or hub id."""
    caption_tokens: int = 8
    """Tokens of a caption: words, besides the token for all of them, with "hash"; the text model's tokens otherwise."""
    caption_width: int = 0
    """Width of the text model's features; not used by "hash"."""
    caption_padding: Literal["learned", "hidden"] = "learned"
    """With a text model: "learned" puts a learned vector into the padding, on the right, and adds positions; "hidden" puts the padding on
    the left and hides it from attention, as LlamaGen's weights expect."""
    caption_buckets: int = 4096
    """Rows of the table of "hash"."""
    condition_attention: Literal["learned", "uniform"] = "learned"
    """On a grid: "learned" leaves condition tokens unrotated; "uniform" zeroes their queries and keys, as LlamaGen's weights expect."""
    has_query: bool = False
    """A learned query stands where a token is not shown: random and next-all prediction (`objectives.py`)."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""

    def __post_init__(self):
        object.__setattr__(self, "layout_shape", tuple(self.layout_shape))
        object.__setattr__(self, "classes", tuple(self.classes))
        full = self.layout.num_tokens
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if not 0 <= self.max_tokens <= full:
            raise ValueError(f"max_tokens={self.max_tokens} but the layout {self.layout_shape} has {full} tokens")
        check_classes(self.classes, self.num_classes)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have the same name")
        if self.text not in ("none", "hash") and self.caption_width < 1:
            raise ValueError(f"text={self.text!r} needs caption_width, the width of that model's features")
        if self.text in ("none", "hash") and self.caption_padding != "learned":
            raise ValueError(f"caption_padding={self.caption_padding!r} needs a text model, but text={self.text!r}")
        for name in ("codebook_size", "depth", "num_heads", "caption_tokens", "caption_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.parameter_tokens, self.mlp_parameter_tokens) < 0:
            raise ValueError(f"parameter tokens cannot be negative: {self.parameter_tokens}, {self.mlp_parameter_tokens}")
        if self.mixing == "linear" and (self.parameter_tokens or self.mlp_parameter_tokens):
            raise ValueError('parameter tokens are for mixing="pattention"')

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens of a full image sit."""
        return TokenLayout(self.layout_kind, self.layout_shape)

    @property
    def num_tokens(self) -> int:
        """N: the most tokens the model predicts."""
        return self.max_tokens or self.layout.num_tokens

    @property
    def hidden_width(self) -> int:
        """Width inside the feed-forward layers."""
        return self.hidden or -(-int(self.width * 8 / 3) // 256) * 256


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        D, heads = config.width, config.num_heads
        self.attention_norm = RMSNorm(D, eps=config.norm_eps)
        self.mlp_norm = RMSNorm(D, eps=config.norm_eps)
        if config.mixing == "pattention":
            self.attention = PattentionAttention(D, heads, num_tokens=config.parameter_tokens or D)
            self.mlp = Pattention(D, D, config.mlp_parameter_tokens or 4 * D)
        else:
            self.attention = Attention(D, heads)
            self.mlp = SwiGLU(D, config.hidden_width)

    def forward(self, x: Tensor, *, keep: Tensor | None = None, **attention) -> Tensor:
        """x: [B, T, D]. keep: [2, B, 1, D] factors on both branches (dropout), or None."""
        branch = self.attention(self.attention_norm(x), **attention)
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.mlp(self.mlp_norm(x))
        return x + (branch if keep is None else branch * keep[1])


@register
class GPT(VisualModel):
    """A Llama-style decoder over visual token ids."""

    Config = GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.layout, self.max_tokens, self.vocab_size = config.layout, config.num_tokens, config.codebook_size
        self.prefix = ConditionPrefix(
            width=config.width,
            num_classes=config.num_classes,
            text=config.text,
            caption_tokens=config.caption_tokens,
            caption_width=config.caption_width,
            caption_buckets=config.caption_buckets,
            caption_padding=config.caption_padding,
        )
        self.embedding = nn.Embedding(config.codebook_size, config.width)
        self.query = nn.Parameter(torch.empty(config.width)) if config.has_query else None
        self.positions = nn.Parameter(torch.empty(self.max_tokens, config.width)) if config.layout_kind == "sequence" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        table = None
        if config.layout_kind == "grid":
            h, w = config.layout_shape
            cells = torch.cartesian_prod(torch.arange(h), torch.arange(w))[: self.max_tokens]
            cells = rope_table(cells, config.width // config.num_heads, base=config.rope_base)
            still = torch.tensor([1.0, 0.0] if config.condition_attention == "learned" else [0.0, 0.0], device=cells.device)
            table = torch.cat([still.expand(self.prefix.num_tokens, cells.shape[1], 2), cells])
        self.register_buffer("rotations", table, persistent=False)  # [P + N, d/2, 2]
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        is_linear = self.settings.mixing == "linear"
        for block in self.blocks:  # the residual stream keeps its scale at any depth
            ends = (block.attention.proj.weight, block.mlp.out.weight) if is_linear else (block.attention.proj.values, block.mlp.values)
            for out in ends:
                nn.init.normal_(out, std=0.02 / math.sqrt(2 * len(self.blocks)))
        for table in (self.positions, self.query):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def grow(
        self,
        num_new: int,
        mlp_new: int | None = None,
        *,
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Append parameter tokens to all blocks: the model computes what it did before, up to rounding, and can learn more.

        num_new: for each attention layer. mlp_new: for each feed-forward layer; None: in proportion. generator, optimizer: see
        `Pattention.grow`. The config grows with it, so that it saves and loads. Raises ValueError: mixing="linear", or nothing new.
        """
        if self.settings.mixing != "pattention":
            raise ValueError('only a generator with mixing="pattention" can grow')
        n, m = self.blocks[0].attention.query.num_tokens, self.blocks[0].mlp.num_tokens
        mlp_new = round(num_new * m / n) if mlp_new is None else mlp_new
        for block in self.blocks:
            block.attention.grow(num_new, generator=generator, optimizer=optimizer)
            block.mlp.grow(mlp_new, generator=generator, optimizer=optimizer)
        self.settings = replace(self.settings, parameter_tokens=n + num_new, mlp_parameter_tokens=m + mlp_new)
        self.register_to_config(**asdict(self.settings))

    @property
    def prefix_length(self) -> int:
        """P: condition tokens in front of every image."""
        return self.prefix.num_tokens

    def make_condition(
        self,
        batch_size: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Condition:
        """Conditions of B images on the model's device; what is not given is null.

        labels: [B], -1 for none. captions: B texts, hashed here when `text` is "hash"; "" for none.
        features: [B, T, F] and mask [B, T] of the captions, when `text` is a text model (`TextEncoder` makes them).
        Raises ValueError: a label is no class, or a condition is given that the model was not built for.
        """
        return make_condition(self.settings, batch_size, labels=labels, captions=captions, features=features).to(self.device)

    def new_cache(self, batch_size: int, max_tokens: int | None = None) -> KVCache:
        """An empty cache for the prefix and `max_tokens` tokens (all by default) of `batch_size` rows."""
        config = self.settings
        return KVCache(
            num_layers=config.depth,
            batch_size=batch_size,
            num_heads=config.num_heads,
            max_length=self.prefix_length + (max_tokens or self.max_tokens),
            head_width=config.width // config.num_heads,
            device=self.device,
            dtype=self.dtype,
        )

    def forward(
        self, ids: Tensor, condition: Condition | None = None, *, cache: KVCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Logits of next tokens.

        ids: [B, T] int64, T may be 0. condition: of the B images; None for tokens that continue a filled cache.
        keep: [L, 2, B, 1, D] factors on the residual branches, for dropout drawn outside; None for none.
        Without a cache, or with an empty one, the prefix comes first: returns [B, T + 1, K], row n predicts token n.
        With a filled cache ids continue what it holds: returns [B, T, K], row n predicts the token after ids[:, n]; the cache grows by T.
        """
        return self.head(self.features(ids, condition, cache=cache, keep=keep))

    def features(
        self, ids: Tensor, condition: Condition | None = None, *, cache: KVCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """What the head reads: as `forward`, but [B, T + 1, D], or [B, T, D] behind a filled cache."""
        B, T = ids.shape
        start = 0 if cache is None else cache.length
        first = max(start - self.prefix_length, 0)  # the token that ids[:, 0] is
        if first + T > self.max_tokens:
            raise ValueError(f"token {first + T - 1} is asked for but this generator knows {self.max_tokens} tokens")
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions[first : first + T]
        visible = None if cache is None else cache.visible
        if not start:
            condition = condition or self.make_condition(B)
            x = torch.cat([self.prefix(condition, B).to(x.dtype), x], dim=1)
            visible = self.prefix.visible(condition)
            if cache is not None:
                cache.visible = visible
        x = self._run(x, cache, keep, visible)
        return self.norm(x if start else x[:, self.prefix_length - 1 :])

    def extend(self, ids: Tensor, placement: Placement, cache: PlacedCache, *, layers: Sequence[int] | None = None) -> Tensor:
        """Features [B, M, D] of inputs ids [B, M] that stand where the placement says, behind a prefix that the cache holds.

        Positions beyond the image count as its last; what is predicted there means nothing. layers: blocks that are run, all by default.
        """
        x, positions = self.embedding(ids), placement.positions.clamp(max=self.max_tokens - 1)
        turn = None
        if self.positions is not None:
            x = x + self.positions[positions]
        if self.rotations is not None:
            rows = self.rotations[self.prefix_length + positions][:, None]  # [B, 1, M, d/2, 2]
            turn = lambda q: rotate(q, rows)  # noqa: E731
        for i in range(len(self.blocks)) if layers is None else layers:
            x = self.blocks[i](x, mask=placement.mask, rotate=turn, cache=cache.layer(i, placement))
        return self.norm(x)

    def _run(self, x: Tensor, cache: KVCache | None, keep: Tensor | None, visible: Tensor | None) -> Tensor:
        """The blocks on x [B, T, D], which sits behind the cache's content. visible: [B, P] bool, see KVCache."""
        start, T = (0 if cache is None else cache.length), x.shape[1]
        if cache is not None:
            cache.check(T)
        turn = None
        if self.rotations is not None:
            rows = self.rotations[start : start + T]
            turn = lambda q: rotate(q, rows)  # noqa: E731
        mask = None
        if T > 1 and (start or visible is not None):
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        if visible is not None:
            seen = F.pad(visible, (0, start + T - visible.shape[1]), value=True)[:, None, None]  # [B, 1, 1, S]
            itself = torch.eye(T, dtype=torch.bool, device=x.device)  # hidden tokens too, or their rows would be empty
            mask = (seen if mask is None else mask & seen) | F.pad(itself, (start, 0))
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                keep=None if keep is None else keep[i],
                mask=mask,
                is_causal=mask is None and T > 1,
                rotate=turn,
                cache=None if cache is None else cache.layer(i),
            )
        if cache is not None:
            cache.advance(T)
        return x

    def predict(self, ids: Tensor, condition: Condition, *, sees: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of tokens at their own places, from any of the others: [B, N, K], row n predicts token n where a query stands.

        ids: [B, N] int64, all tokens, -1 where a query stands. sees: [B, N, N] bool, row n may look at token m; all see the condition.
        keep: as in `forward`. Raises ValueError: ids are not all tokens, or the model was built without a query.
        """
        B, N = ids.shape
        if self.query is None:
            raise ValueError("this generator has no query: build it with has_query=True")
        if N != self.max_tokens:
            raise ValueError(f"{N} tokens are given, but a prediction at their own places takes all {self.max_tokens}")
        x = torch.where(ids[..., None] < 0, self.query, self.embedding(ids.clamp(min=0)))
        if self.positions is not None:
            x = x + self.positions
        x = torch.cat([self.prefix(condition, B).to(x.dtype), x], dim=1)
        P = self.prefix_length
        mask = torch.ones(P + N, P + N, dtype=torch.bool, device=x.device).tril().repeat(B, 1, 1)
        mask[:, P:, P:] = sees
        visible = self.prefix.visible(condition)
        if visible is not None:
            mask[:, :, :P] &= visible[:, None]
            mask |= torch.eye(P + N, dtype=torch.bool, device=x.device)
        turn = None if self.rotations is None else partial(rotate, table=self.rotations)
        for i, block in enumerate(self.blocks):
            x = block(x, keep=None if keep is None else keep[i], mask=mask[:, None], rotate=turn)
        return self.head(self.norm(x[:, P:]))


@register
def gpt_tiny(**overrides) -> GPT:
    """The smallest that still works; for tests and tours."""
    return GPT(replace(GPTConfig(codebook_size=200, width=64, depth=2, num_heads=4, hidden=128, caption_buckets=512), **overrides))


@register
def gpt_emoji(**overrides) -> GPT:
    """For a few thousand small pictures with captions; 2.5 M parameters with 1,000 codes."""
    return GPT(replace(GPTConfig(text="hash", caption_tokens=7, caption_buckets=2048, hidden=512), **overrides))
