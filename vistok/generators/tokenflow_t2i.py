"""TokenFlow's text-to-image model: a language model that predicts an image scale by scale, and may look at a scale again.

Qu et al. 2024, arXiv 2412.03069, section 3.3; after VAR (Tian et al. 2024, arXiv 2404.02905) for the order of prediction.

    sequence   [prompt (P), the last one starts the image] [features of scale 1] ... [features of scale S-1], scales counted from 0
    features   f = bicubic(f + codes of scale i-1, size of scale i), through Linear, GELU, Linear; the output there predicts scale i
    embedding  + level row (0 for text, i+1 for scale i) + a learned position for each of the N image slots, from the last prompt token on
    attention  causal over text; an image slot sees the text and all slots of its own and of earlier scales
    layer      x = x + rmsnorm(attention(x));  x = x + rmsnorm(swiglu(x))            norms behind the branches, unlike Llama's
    q, k       RMSNorm over each head, then rotary positions that count every slot
    another pass over scale i: its features are replaced by f + codes of scale i, which the first pass drew, and it is drawn again

Published prompts are a language model's tokens. Ours, where there is no language model: [class, words of the caption, start], each word and
class a row of the table, what is not there padding. Rows of the table: hashed words, padding, classes, start, codes.

B images, P prompt tokens, N image tokens, T slots, D width, h heads, d = D / h, K codes, V vocabulary, L layers, S scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.classes import ClassConfig
from vistok.generators.condition import class_condition, fnv1a, split_words
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import SwiGLU
from vistok.modeling import VisualModel
from vistok.quantizers import VQ, CodeGroup, VQConfig
from vistok.quantizers.multiscale import MultiScaleResidual
from vistok.registry import register
from vistok.tokens import TokenLayout


@dataclass(frozen=True, kw_only=True)
class TokenFlowT2IConfig(ClassConfig):
    """Shape of the model; the default is the published 7B one for TokenFlow-B at 256 px."""

    vocab_size: int = 64771
    """V: text, padding, codes and marks."""
    image_token_start: int = 32001
    """Row of code 0."""
    pad_token: int = 32000
    """Fills prompts on the left; never looked at."""
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    """Sides of the tokenizer's grids; the first must be 1."""
    codebook_size: int = 32768
    """K."""
    group_dims: tuple[int, ...] = (32, 8)
    """Channels of the tokenizer's semantic and pixel codes."""
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    hidden: int = 11008
    """Width inside the feed-forward layers."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    """Epsilon of the norms behind branches and at the end; that of queries and keys is 1e-6."""
    text: str = "none"
    """How captions become prompts: "hash" (`make_condition`); "none": prompts are another model's tokens (`Prompt`), as published."""
    caption_tokens: int = 8
    """Words of a caption that are read, with "hash"."""
    num_classes: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("scales", "group_dims"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.text not in ("none", "hash") or (self.text == "none" and self.num_classes):
            raise ValueError(f'text={self.text!r} with num_classes={self.num_classes}; allowed: "hash", or "none" without classes')
        if self.text == "hash" and (self.pad_token < 1 or self.image_token_start < self.start_token + 1):
            raise ValueError(
                f"words take rows 0 to {self.pad_token - 1}, padding, classes and start {self.num_classes + 2} more: codes cannot start "
                f"at image_token_start={self.image_token_start}"
            )
        if self.scales[:1] != (1,):
            raise ValueError(f"scales={self.scales} must begin with 1: the prompt's last token predicts the first scale")
        if not 0 <= self.image_token_start <= self.vocab_size - self.codebook_size:
            raise ValueError(f"{self.codebook_size} codes from {self.image_token_start} on do not fit in a vocabulary of {self.vocab_size}")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of twice num_heads={self.num_heads}")

    @property
    def start_token(self) -> int:
        """With "hash": the row of the prompt's last token."""
        return self.pad_token + 1 + self.num_classes

    @property
    def prompt_length(self) -> int:
        """With "hash": P, the same for all prompts."""
        return bool(self.num_classes) + self.caption_tokens + 1


@dataclass(frozen=True)
class Prompt:
    """ids: [B, P] int64 text tokens, padded on the left, the last one starts the image. null: [B, P], the unconditional prompts.

    class_tokens: how many of the first are a class; the rest is the caption.
    """

    ids: Tensor
    null: Tensor
    class_tokens: int = 0

    def and_null(self) -> "Prompt":
        """Twice as many rows: the prompts, then the unconditional ones."""
        return replace(self, ids=torch.cat([self.ids, self.null]), null=torch.cat([self.null, self.null]))

    def drop(self, classes: Tensor, captions: Tensor) -> "Prompt":
        """Without classes and captions where these [B] bool are True; they may be on any device."""
        classes, captions = (part.to(self.ids.device)[:, None] for part in (classes, captions))
        is_class = torch.arange(self.ids.shape[1], device=self.ids.device) < self.class_tokens
        return replace(self, ids=torch.where(torch.where(is_class, classes, captions), self.null, self.ids))

    def __getitem__(self, rows: slice | Tensor) -> "Prompt":
        """The prompts of some of the images."""
        return replace(self, ids=self.ids[rows], null=self.null[rows])


class ScaleCache(KVCache):
    """A key/value cache that also keeps the codes of finished scales, [B, n], because features are made of all of them."""

    codes: Tensor | None = None

    def keep_rows(self, num_rows: int) -> None:
        super().keep_rows(num_rows)
        self.codes = None if self.codes is None else self.codes[:num_rows]


class _Layer(nn.Module):
    """One decoder layer, norms behind the branches."""

    def __init__(self, config: TokenFlowT2IConfig):
        super().__init__()
        D, d = config.width, config.width // config.num_heads
        self.num_heads = config.num_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attention_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.mlp = SwiGLU(D, config.hidden)
        self.mlp_norm = nn.RMSNorm(D, eps=config.norm_eps)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, cache: Callable | None, keep: Tensor | None) -> Tensor:
        """x: [B, T, D]; turns: [2, T, d] cosines and sines; mask: [B, 1, T, S] bool; keep: [2, B, 1, D] factors on both branches."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _turn(self.q_norm(q), turns), _turn(self.k_norm(k), turns)
        if cache is not None:
            k, v = cache(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        branch = self.attention_norm(self.proj(out.transpose(1, 2).flatten(2)))
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.mlp_norm(self.mlp(x))
        return x + (branch if keep is None else branch * keep[1])


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions as Llama's weights expect them: channel j turns with channel j + d/2."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * turns[0] + torch.cat([-second, first], dim=-1) * turns[1]).to(x.dtype)


@register
class TokenFlowT2I(VisualModel):
    """A post-norm Llama over prompts and image scales. The tokenizer's codes are part of it, frozen."""

    Config = TokenFlowT2IConfig

    def __init__(self, config: TokenFlowT2IConfig):
        super().__init__(config)
        D, groups = config.width, tuple(CodeGroup(dim=dim, metric="cosine") for dim in config.group_dims)
        vq = VQConfig(codebook_size=config.codebook_size, code_dim=sum(config.group_dims), groups=groups, update="frozen")
        self.quantizer = MultiScaleResidual(VQ(vq), [(side, side) for side in config.scales])
        self.layout = TokenLayout("scales", self.quantizer.scales)
        self.max_tokens, self.vocab_size = self.layout.num_tokens, config.codebook_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.projector = nn.Sequential(nn.Linear(vq.code_dim, D), nn.GELU(), nn.Linear(D, D))
        self.levels = nn.Embedding(len(config.scales) + 1, D)
        self.positions = nn.Parameter(torch.empty(self.max_tokens, D).normal_(std=0.02))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        for table in (self.embedding, self.levels, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def read_codes_of(self, tokenizer) -> "TokenFlowT2I":
        """Take over the codebook of a TokenFlow; returns self. Raises ValueError: its codes are of another shape."""
        ours = self.quantizer.quantizer.codebook
        theirs, scales = tokenizer.quantizer.quantizer.codebook.detach(), tokenizer.quantizer.scales
        if theirs.shape != ours.shape or scales != self.quantizer.scales:
            shapes = [list(shape) for shape in (theirs.shape, ours.shape)]
            raise ValueError(
                f"the tokenizer has codes {shapes[0]} at {scales}, this generator was built for {shapes[1]} at {self.quantizer.scales}"
            )
        ours.data.copy_(theirs)
        return self

    # -- inputs ------------------------------------------------------------------------------------------------------------------------

    def make_condition(
        self,
        batch_size: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Prompt:
        """Prompts of B images on the model's device, for text="hash"; labels [B], -1 for none, captions "" for none.

        Raises ValueError: a label is no class, or the model reads another model's tokens.
        """
        config = self.settings
        if config.text == "none" or features is not None:
            raise ValueError("this generator reads the tokens of a language model: make a Prompt of them")
        labels = class_condition(batch_size, config.num_classes, torch.device("cpu"), labels=labels).labels
        null = torch.full((batch_size, config.prompt_length), config.pad_token)
        null[:, -1] = config.start_token
        ids = null.clone()
        if config.num_classes:
            ids[:, 0] = config.pad_token + torch.where(labels < 0, 0, 1 + labels)
        for row, caption in zip(ids, captions or ()):
            words = [fnv1a(word) % config.pad_token for word in split_words(caption)[: config.caption_tokens]]
            row[len(row) - 1 - len(words) : -1] = torch.tensor(words, dtype=torch.int64)
        return Prompt(ids.to(self.device), null.to(self.device), class_tokens=int(config.num_classes > 0))

    def prompt_inputs(self, ids: Tensor) -> Tensor:
        """[B, P, D] of prompts [B, P]; the last token is the first image slot."""
        x = self.embedding(ids) + self.levels.weight[0]
        return torch.cat([x[:, :-1], x[:, -1:] + self.positions[0]], dim=1)

    def scale_inputs(self, codes: Tensor, *, refined: int | None = None) -> list[Tensor]:
        """[B, s^2, D] of every scale but the first that codes [B, n] of whole scales tell; refined: see `next_scale_inputs`."""
        inputs, start = [], 1
        for number, features in enumerate(self.quantizer.next_scale_inputs(codes, refined=refined), start=1):
            size = self.quantizer.sizes[number]
            x = self.projector(features.flatten(2).transpose(1, 2).to(self.dtype))
            inputs.append(x + self.levels.weight[number + 1] + self.positions[start : start + size])
            start += size
        return inputs

    def sequence(self, prompt: Tensor, codes: Tensor, after: Tensor) -> Tensor:
        """Inputs [B, P + N + A, D] for teacher forcing: prompts [B, P], codes [B, N] or all but the last scale's, text behind [B, A].

        One slot fewer than codes is needed, because a slot predicts the next one; the last of the N is empty.
        """
        rest = self.embedding(after) + self.levels.weight[0]
        empty = self.levels.weight[0].expand(len(prompt), 1, -1)
        return torch.cat([self.prompt_inputs(prompt), *self.scale_inputs(codes), empty, rest], dim=1)

    def mask(self, prompt: Tensor, num_after: int) -> Tensor:
        """[B, 1, T, T] bool of a whole sequence: who may look (rows) at whom (columns). Nobody looks at padding."""
        P, N = prompt.shape[1], self.max_tokens
        T = P + N + num_after
        order = torch.arange(T, device=prompt.device)
        scale = torch.repeat_interleave(torch.tensor(self.quantizer.sizes, device=prompt.device))
        order[P - 1 : P - 1 + N] = P - 1 + scale  # slots of one scale share a rank
        order[P - 1 + N :] += len(self.quantizer.sizes)
        is_text = F.pad(prompt != self.settings.pad_token, (0, T - P), value=True)
        return (order[:, None] >= order)[None, None] & is_text[:, None, None]

    # -- the network -------------------------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, mask: Tensor, *, cache: ScaleCache | None = None, keep: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of inputs [B, T, D] behind what the cache holds; mask [B, 1, T, S] bool (a slot always sees itself).

        keep: [L, 2, B, 1, D] factors on the branches, for dropout drawn outside; None for none.
        """
        start, T = (0 if cache is None else cache.length), x.shape[1]
        mask = mask | F.pad(torch.eye(T, dtype=torch.bool, device=x.device), (start, 0))
        d = self.settings.width // self.settings.num_heads
        frequencies = self.settings.rope_base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
        angles = torch.arange(start, start + T, device=x.device)[:, None] * frequencies
        turns = torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(x, turns, mask, None if cache is None else cache.layer(i), None if keep is None else keep[i])
        if cache is not None:
            cache.advance(T)
        return self.head(self.norm(x))

    def code_logits(self, logits: Tensor) -> Tensor:
        """[..., K] of logits [..., V]: the codes' part."""
        start = self.settings.image_token_start
        return logits[..., start : start + self.settings.codebook_size]

    # -- generation --------------------------------------------------------------------------------------------------------------------

    def new_cache(self, batch_size: int, max_tokens: int | None = None, *, prompt_length: int | None = None) -> ScaleCache:
        """An empty cache for a prompt (128 tokens where nothing says how many) and `max_tokens` image tokens, all by default."""
        config = self.settings
        prompt_length = prompt_length or (128 if config.text == "none" else config.prompt_length)
        return ScaleCache(
            num_layers=config.depth, batch_size=batch_size, num_heads=config.num_heads,
            max_length=prompt_length + (max_tokens or self.max_tokens) - 1, head_width=config.width // config.num_heads, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip

    def step_sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens of each decoding step: a scale. Raises ValueError: num_tokens ends inside a scale."""
        return self.quantizer.sizes[: self.quantizer.num_scales(num_tokens)]

    def guidance_schedule(self, scale: float) -> Callable[[int], float]:
        """Guidance of each scale, rising from 1 at the first to `scale` at the last. The reference's cfg c is scale = 1 + c."""
        last = max(len(self.quantizer.sizes) - 1, 1)
        return lambda step: 1 + (scale - 1) * step / last

    def forward(
        self, ids: Tensor, condition: Prompt | None = None, *, cache: ScaleCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Logits of codes.

        Without a cache: teacher forcing, ids are all codes [B, N], of which those of the last scale are not read and may be missing;
        returns [B, N, K], row n predicts code n. keep: see `run`.
        With an empty cache: ids [B, 0]; returns [B, 1, K], the first scale. With a filled one: the codes [B, n] of the scale before;
        returns [B, s^2, K], the next scale.
        """
        if cache is None:
            P, known = condition.ids.shape[1], self.max_tokens - self.quantizer.sizes[-1]
            if not known <= ids.shape[1] <= self.max_tokens:
                raise ValueError(f"{ids.shape[1]} codes an image, but this generator learns from {known} to {self.max_tokens}")
            x = self.sequence(condition.ids, ids[:, :known], ids.new_zeros(len(ids), 0))
            return self.code_logits(self.run(x, self.mask(condition.ids, 0), keep=keep)[:, P - 1 : P - 1 + self.max_tokens])
        if not cache.length:
            prompt = condition.ids
            cache.visible, cache.codes = prompt != self.settings.pad_token, ids
            causal = torch.ones(prompt.shape[1], prompt.shape[1], dtype=torch.bool, device=prompt.device).tril()
            return self.code_logits(self.run(self.prompt_inputs(prompt), causal & cache.visible[:, None, None], cache=cache)[:, -1:])
        cache.codes = torch.cat([cache.codes, ids], dim=1)
        return self._next_scale(self.scale_inputs(cache.codes)[-1], cache)

    def look_again(self, ids: Tensor, *, cache: ScaleCache) -> Tensor:
        """Logits [B, s^2, K] of the scale that was just predicted, now that its codes ids [B, s^2] are drawn."""
        number, end = self.quantizer.num_scales(cache.codes.shape[1]), cache.length
        slots = slice(end - ids.shape[1], end)
        first_look = cache.keys[:, :, :, slots].clone(), cache.values[:, :, :, slots].clone()
        cache.rollback(slots.start)
        x = self.scale_inputs(torch.cat([cache.codes, ids], dim=1), refined=number)[number - 1]
        logits = self._next_scale(x, cache)
        # later scales look at the first look's slots, as in the reference, which computes all of them anew for every scale
        cache.keys[:, :, :, slots], cache.values[:, :, :, slots] = first_look
        return logits

    def _next_scale(self, x: Tensor, cache: ScaleCache) -> Tensor:
        seen = F.pad(cache.visible, (0, cache.length + x.shape[1] - cache.visible.shape[1]), value=True)
        return self.code_logits(self.run(x, seen[:, None, None].expand(-1, 1, x.shape[1], -1), cache=cache))


@register
def tokenflow_t2i_7b(**overrides) -> TokenFlowT2I:
    """The published text-to-image model on Llama 2 7B."""
    return TokenFlowT2I(replace(TokenFlowT2IConfig(), **overrides))


@register
def tokenflow_t2i_tiny(**overrides) -> TokenFlowT2I:
    """The smallest that still works, for tokenflow-tiny's tokens; for tests and tours."""
    base = TokenFlowT2IConfig(
        vocab_size=40 + 64, image_token_start=40, pad_token=39, scales=(1, 2, 4), codebook_size=64, group_dims=(8, 4), width=32, depth=2,
        num_heads=2, hidden=64,
    )  # fmt: skip
    return TokenFlowT2I(replace(base, **overrides))
