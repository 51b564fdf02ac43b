"""Pattention: a linear layer whose weights are tokens that the input attends to, so that it can grow by appending tokens.

Wang et al. 2024, "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters" (arXiv 2410.23168), section 3.

    s = scale x K^T;   y = a V;   tau = sqrt(n)
    l2_norm_gelu   a = gelu(s / |s| tau)           all released models; the norm is over the n tokens
    gelu_l2_norm   a = gelu(s) / |gelu(s)| tau
    softmax        a = softmax(s) tau^2

Growing by m tokens: with zero keys s is zero there, gelu(0) = 0, and |s| stays, so y stays if tau keeps the n it was trained with. The
released code takes n + m instead, which changes y by a quarter. New values are random: with zeros both gradients would be zero for ever.

T tokens, I O input and output width, n parameter tokens, D width, h heads, d = D / h.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.kv_cache import KVCache
from vistok.layers.norms import plain_layer_norm
from vistok.layers.rope import rotate

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


class Pattention(nn.Module):
    """x [..., T, I] to [..., T, O].

    num_tokens: n. activation: how scores become weights. scale: of the products, 1 in all released models.
    The state dict carries `norm_tokens`, the n in tau, beside keys [n, I] and values [n, O]: a grown layer needs it to be itself.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_tokens: int,
        *,
        activation: Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"] = "l2_norm_gelu",
        scale: float = 1.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}; allowed: {', '.join(ACTIVATIONS)}")
        if min(in_width, out_width, num_tokens) < 1:
            raise ValueError(f"in_width={in_width}, out_width={out_width} and num_tokens={num_tokens} must be at least 1")
        self.activation, self.scale = activation, scale
        self.keys = nn.Parameter(torch.empty(num_tokens, in_width).normal_(std=0.02))
        self.values = nn.Parameter(torch.empty(num_tokens, out_width).normal_(std=0.02))
        self.register_buffer("norm_tokens", torch.tensor(num_tokens))

    @property
    def num_tokens(self) -> int:
        """n, those of all growth included."""
        return len(self.keys)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """mask: bool, broadcastable to the scores [..., T, n]; False makes a score 0 (not minus infinity) before the norm.
        tokens: [m] int64, the parameter tokens to use, all by default; tau then counts those (a router's choice of experts).
        """
        keys, values, count = self.keys, self.values, self.norm_tokens
        if tokens is not None:
            count = count * len(tokens) / len(keys)
            keys, values = keys[tokens], values[tokens]
        return self.weigh(F.linear(x, keys), mask=mask, count=count).to(values.dtype) @ values

    def weigh(self, scores: Tensor, *, mask: Tensor | None = None, count: Tensor | None = None) -> Tensor:
        """Weights a [..., T, n] of the values, from unscaled scores of the same shape. count: tau squared, this layer's by default."""
        count, scores = self.norm_tokens if count is None else count, scores * self.scale
        if mask is not None:
            scores = scores * mask
        if self.activation == "softmax":
            return scores.softmax(-1) * count
        if self.activation == "l2_norm_gelu":
            return F.gelu(_unit(scores) * count.sqrt().to(scores.dtype))
        return _unit(F.gelu(scores)) * count.sqrt().to(scores.dtype)

    @torch.no_grad()
    def grow(
        self,
        num_new: int,
        *,
        generator: torch.Generator | None = None,
        std: float = 0.02,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Append parameter tokens; the layer computes what it did before, up to the rounding of its sums, and all of them can learn.

        generator: draws the new values, normal with this std (on the CPU); None: the global one. The parameters are new objects: give the
        optimizer that holds the old ones (its moments stay, those of new tokens are zero), or build one afterwards.
        Raises ValueError: fewer than one, or the softmax, which zero keys change.
        """
        if num_new < 1:
            raise ValueError(f"num_new={num_new} must be at least 1")
        if self.activation == "softmax":
            raise ValueError("a softmax over tokens cannot grow and stay as it is; use l2_norm_gelu or gelu_l2_norm")
        values = torch.randn(num_new, self.values.shape[1], generator=generator) * std
        old = self.keys, self.values
        self.keys = nn.Parameter(torch.cat([self.keys, self.keys.new_zeros(num_new, self.keys.shape[1])]))
        self.values = nn.Parameter(torch.cat([self.values, values.to(self.values)]))
        if optimizer is not None:
            for before, after in zip(old, (self.keys, self.values)):
                _hand_over(optimizer, before, after)


def _hand_over(optimizer: torch.optim.Optimizer, before: nn.Parameter, after: nn.Parameter) -> None:
    """Put `after`, which has more rows, in the place of `before`; state shaped like the parameter gets rows of zeros."""
    for group in optimizer.param_groups:
        group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
    missing = len(after) - len(before)
    if before in optimizer.state:
        optimizer.state[after] = {
            key: torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
            if isinstance(value, Tensor) and value.shape == before.shape
            else value
            for key, value in optimizer.state.pop(before).items()
        }


def _unit(x: Tensor) -> Tensor:
    """x [..., n] at unit length; zeros stay zeros, where the reference divides by zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


class PattentionAttention(nn.Module):
    """Self-attention whose query, key, value and projection are one Pattention each; takes what `layers.attention.Attention` takes.

    width: D. num_tokens: parameter tokens of each of the four; proj_tokens: those of the projection, where they are not as many.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_tokens: int,
        proj_tokens: int | None = None,
        activation: Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"] = "l2_norm_gelu",
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.query, self.key, self.value = (Pattention(width, width, num_tokens, activation=activation) for _ in range(3))
        self.proj = Pattention(width, width, num_tokens if proj_tokens is None else proj_tokens, activation=activation)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x: [B, T, D]; the rest as in Attention."""
        B, T, D = x.shape
        q, k, v = (part(x).view(B, T, self.num_heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))

    def grow(self, num_new: int, **options) -> None:
        """`Pattention.grow` of all four."""
        for part in (self.query, self.key, self.value, self.proj):
            part.grow(num_new, **options)


class PattentionBlock(nn.Module):
    """TokenFormer's block: queries, keys, values, projection and feed-forward layer are one Pattention each.

        x = x + attention(norm(x));  x = x + mlp(norm(x))          causal; norms without parameters

    width: D. num_tokens: parameter tokens of each of the four (proj_tokens: of the projection, where they are not as many), mlp_tokens: of
    the last. rotary_share: part of each head that turns with the position, halves paired (not neighbours).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_tokens: int,
        mlp_tokens: int,
        proj_tokens: int | None = None,
        activation: Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"] = "l2_norm_gelu",
        rotary_share: float = 0.25,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.attention = PattentionAttention(width, num_heads, num_tokens=num_tokens, proj_tokens=proj_tokens, activation=activation)
        self.norm_eps, self.rotary_base = norm_eps, rotary_base
        self.rotary_width = int(width // num_heads * rotary_share)
        if self.rotary_width % 2:
            raise ValueError(f"rotary_share={rotary_share} of a head of {width // num_heads} is an odd number of channels")
        self.mlp = Pattention(width, width, mlp_tokens, activation=activation)

    def forward(self, x: Tensor, *, start: int = 0, cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """x: [B, T, D], at the positions from `start` on. cache: takes the new k, v [B, h, T, d], returns those of all start + T."""
        T = x.shape[1]
        positions = torch.arange(start + T, device=x.device)
        mask = positions[start:, None] >= positions
        turn = partial(self._turn, table=self._rotations(start, T, x.device))
        x = x + self.attention(plain_layer_norm(x, self.norm_eps), mask=mask, rotate=turn, cache=cache)
        return x + self.mlp(plain_layer_norm(x, self.norm_eps))

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache of this block alone."""
        values, heads = self.attention.query.values, self.attention.num_heads
        shape = dict(num_layers=1, batch_size=batch_size, num_heads=heads, max_length=max_tokens, head_width=values.shape[1] // heads)
        return KVCache(**shape, device=values.device, dtype=values.dtype)

    def grow(self, num_new: int, mlp_new: int, **options) -> None:
        """`Pattention.grow` of all five layers: num_new tokens for each of the four, mlp_new for the feed-forward layer."""
        self.attention.grow(num_new, **options)
        self.mlp.grow(mlp_new, **options)

    def _rotations(self, start: int, num: int, device: torch.device) -> Tensor:
        """[T, r/2, 2] cosine and sine of each pair at each position."""
        r = self.rotary_width
        frequencies = self.rotary_base ** (-torch.arange(0, r, 2, dtype=torch.float32, device=device) / max(r, 1))
        angles = torch.arange(start, start + num, device=device)[:, None] * frequencies
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def _turn(self, x: Tensor, table: Tensor) -> Tensor:
        """q or k [B, h, T, d] with its first r channels turned; they come out as pairs of neighbours, in both alike."""
        r = self.rotary_width
        pairs = x[..., :r].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat([rotate(pairs, table), x[..., r:]], dim=-1)
