"""The classic transformer block: attention, then a feed-forward layer, each with a residual and a LayerNorm.

pre-norm     x = x + attention(norm(x));  x = x + mlp(norm(x))      (ViT, CLIP)
post-norm    x = norm(x + attention(x));  x = norm(x + mlp(x))      (BERT)
"""

from torch import Tensor, nn

from vistok.layers.attention import Attention
from vistok.layers.mlp import MLP


class TransformerBlock(nn.Module):
    """Self-attention and GELU MLP with biases; x: [B, T, D].

    width: D. hidden: width inside the MLP. post_norm: BERT's order instead of ViT's. approximate: of the GELU, "none", "tanh" or "sigmoid".
    """

    def __init__(
        self, width: int, num_heads: int, *, hidden: int, norm_eps: float = 1e-5, post_norm: bool = False, approximate: str = "none"
    ):
        super().__init__()
        self.post_norm = post_norm
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, bias=True)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden, approximate=approximate)

    def forward(self, x: Tensor, **attention) -> Tensor:
        """attention: options of Attention.forward (mask, is_causal, rotate, cache)."""
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, **attention))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attention(self.attention_norm(x), **attention)
        return x + self.mlp(self.mlp_norm(x))
