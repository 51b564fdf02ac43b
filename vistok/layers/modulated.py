"""A transformer block whose branches are scaled, shifted and gated by a vector: adaptive normalisation.

Peebles and Xie 2022 (arXiv 2212.09748), with the order of parts, the norm and the feed-forward layers of VAR and xAR:

    y = y + g1 attention(rmsnorm(y) (1 + s1) + b1);   y = y + g2 mlp(rmsnorm(y) (1 + s2) + b2)         g, s, b: linear in the vector

Shapes: B batch, T tokens, D width.
"""

from torch import Tensor, nn

from vistok.layers.attention import Attention
from vistok.layers.mlp import GEGLU
from vistok.layers.norms import modulate


class ModulatedBlock(nn.Module):
    """Attention and feed-forward, modulated by gains g1, g2, scales s1, s2 and shifts b1, b2, in this order; biases everywhere."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, norm_eps: float = 1e-6):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=norm_eps, elementwise_affine=False)
        self.attention = Attention(width, num_heads, bias=True)
        self.mlp = GEGLU(width, hidden)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, modulations: Tensor, *, keep: Tensor | None = None, **attention) -> Tensor:
        """x: [B, T, D]. modulations: [B, T or 1, 6, D]. keep: [2, B, 1, D] factors on both branches (dropout), or None."""
        g1, g2, s1, s2, b1, b2 = modulations.unbind(2)
        if keep is not None:
            g1, g2 = g1 * keep[0], g2 * keep[1]
        x = x + g1 * self.attention(modulate(self.norm(x), b1, s1), **attention)
        return x + g2 * self.mlp(modulate(self.norm(x), b2, s2))
