"""Q-Former: learned queries read an image through cross-attention, layer by layer; a text branch shares the self-attention.

Li et al. 2023, arXiv 2301.12597 (BLIP-2), on BERT's post-norm layers; with a causal mask it is SEED's tokenizer (Ge et al. 2023,
arXiv 2310.01218).

    queries  x = norm(registers);   text  x = norm(words + positions)
    layer    x = norm(x + self(x));  queries of every n-th layer: x = norm(x + cross(x, image));  x = norm(x + mlp(x))
    mask     causal among the queries, none on text
    mlp      one for queries, one for text

B images, S image tokens, R registers, T text tokens, D width, C width of the image tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.layers.attention import Attention, CrossAttention
from vistok.layers.mlp import MLP

MAX_DEPTH = 1000


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Shape of a Q-Former."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    """Width of the feed-forward layers."""
    cross_every: int = 2
    """Layers 0, n, 2n, ... read the image."""
    norm_eps: float = 1e-12
    dropout: float = 0.0
    """After each sublayer, in training; 0.1 in the paper's long runs."""

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if not 1 <= self.depth <= MAX_DEPTH or self.cross_every < 1:
            raise ValueError(f"depth={self.depth} must be in 1 to {MAX_DEPTH} and cross_every={self.cross_every} at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


class Residual(nn.Module):
    """norm(x + dropout(update)): how every sublayer of BERT ends."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return self.norm(x + self.dropout(update))


class QFormerLayer(nn.Module):
    """One layer; it holds the text branch's feed-forward layer only where has_text."""

    def __init__(self, config: QFormerConfig, *, context_width: int | None, has_text: bool):
        super().__init__()
        self.attention, self.attention_end = Attention(config.width, config.num_heads, bias=True), Residual(config)
        self.cross, self.cross_end = None, None
        if context_width is not None:
            self.cross, self.cross_end = CrossAttention(config.width, context_width, config.num_heads), Residual(config)
        self.mlp, self.mlp_end = MLP(config.width, config.hidden), Residual(config)
        self.text_mlp, self.text_mlp_end = (MLP(config.width, config.hidden), Residual(config)) if has_text else (None, None)

    def forward(self, x: Tensor, context: Tensor, *, is_causal: bool) -> Tensor:
        """Queries x [B, R, D] over image tokens [B, S, C]."""
        x = self.attention_end(x, self.attention(x, is_causal=is_causal))
        if self.cross is not None:
            x = self.cross_end(x, self.cross(x, context))
        return self.mlp_end(x, self.mlp(x))

    def read_text(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Text x [B, T, D]; mask: [B, 1, 1, T] bool, True is a word."""
        x = self.attention_end(x, self.attention(x, mask=mask))
        return self.text_mlp_end(x, self.text_mlp(x))


class QFormer(nn.Module):
    """Registers and the layers that fill them.

    num_registers: R. context_width: C. is_causal: register i sees registers 0..i only.
    has_text: with the text branch (`read_text`), which only contrastive training needs.
    """

    def __init__(self, config: QFormerConfig, *, num_registers: int, context_width: int, is_causal: bool, has_text: bool = False):
        super().__init__()
        self.is_causal = is_causal
        self.registers = nn.Parameter(torch.empty(num_registers, config.width).normal_(std=0.02))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(config, context_width=context_width if i % config.cross_every == 0 else None, has_text=has_text)
            for i in range(config.depth)
        )

    def forward(self, context: Tensor) -> Tensor:
        """Filled registers [B, R, D] of image tokens [B, S, C]."""
        x = self.dropout(self.norm(self.registers).expand(len(context), -1, -1))
        for layer in self.layers:
            x = layer(x, context, is_causal=self.is_causal)
        return x

    def read_text(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text states [B, T, D] of word embeddings [B, T, D], positions included; mask: [B, T] bool, True is a word.

        Raises ValueError: this Q-Former has no text branch.
        """
        if self.layers[0].text_mlp is None:
            raise ValueError("this Q-Former has no text branch; build it with has_text=True (released tokenizers leave it out)")
        x = self.dropout(self.norm(embeddings))
        keys = None if mask is None else mask[:, None, None]
        for layer in self.layers:
            x = layer.read_text(x, keys)
        return x


def bert_init(module: nn.Module) -> None:
    """BERT's start at any width: every matrix normal with deviation 0.02 sqrt(768 / width of its input), every bias 0.

    The plain 0.02 is made for a width of 768; in a small model it leaves so little of the image that all images get the same tokens.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02 * (768 / part.in_features) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
