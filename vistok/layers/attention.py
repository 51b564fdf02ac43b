"""Multi-head self-attention on PyTorch's fused kernel, with an optional key/value cache and rotary positions.

Shapes: B batch, T tokens, D width, h heads, d = D / h.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.norms import plain_layer_norm


class Attention(nn.Module):
    """softmax(scale q k^T + mask) v, projected.

    width: D. num_heads: h. qk_norm: LayerNorm over each head's q and k, without parameters, or with when "learned".
    scale: of the products; 1/sqrt(d) by default. bias: in all projections.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool | Literal["learned"] = False,
        scale: float | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.qk_norm, self.scale = num_heads, qk_norm, scale
        if qk_norm == "learned":
            self.q_norm, self.k_norm = (nn.LayerNorm(width // num_heads, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x: [B, T, D].

        mask: boolean (True attends) or additive float, broadcastable to [B, h, T, S] for S keys.
        rotate: maps q and k, [2, B, h, T, d], to their rotated values. cache: takes the new k, v [B, h, T, d], returns all S of them.
        """
        B, T, D = x.shape
        parts = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        qk, v = parts[:2], parts[2]
        if self.qk_norm == "learned":
            qk = torch.stack([self.q_norm(qk[0]), self.k_norm(qk[1])])
        elif self.qk_norm:
            qk = plain_layer_norm(qk)
        q, k = (qk if rotate is None else rotate(qk)).unbind()
        if cache is not None:
            k, v = cache(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v of queries [B, T, D] over a context [B, S, C], projected; biases everywhere.

    width: D. context_width: C.
    """

    def __init__(self, width: int, context_width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: boolean (True attends) or additive float, broadcastable to [B, h, T, S]."""
        B, T, D = x.shape
        q = self.query(x).view(B, T, self.num_heads, -1).transpose(1, 2)
        k, v = self.key_value(context).view(B, context.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))
