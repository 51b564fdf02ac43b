"""Medusa: several tokens ahead from one feature, each by a head of its own.

Cai et al. 2024, arXiv 2401.10774, section 2.1.1:

    q_n+1+i = softmax(W_i resblock_i(f_n)),  i = 0 ... g - 1         f_n: what the target's output layer reads to decide token n

The heads do not see which token n became, nor each other's draws. W_i starts as the target's output layer.

B rows, T positions, D width, g heads, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.decoding.heads.parts import ResidualBlock, output_weight
from vistok.modeling import VisualModel
from vistok.registry import register


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Shape of the heads."""

    width: int = 192
    """D of the target."""
    codebook_size: int = 1000
    """K."""
    num_drafts: int = 4
    """g: heads, and so draft tokens in a row."""

    def __post_init__(self):
        if min(self.width, self.codebook_size, self.num_drafts) < 1:
            raise ValueError(f"width, codebook_size and num_drafts must be at least 1, got {self}")


@register
class MedusaHeads(VisualModel):
    """g heads on the target's last feature."""

    Config = MedusaConfig

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.num_drafts))
        self.heads = nn.ModuleList(nn.Linear(config.width, config.codebook_size, bias=False) for _ in range(config.num_drafts))

    @classmethod
    def for_target(cls, target, *, num_drafts: int = 4) -> "MedusaHeads":
        """Fresh heads that suit a generator and say what it says."""
        made = cls(MedusaConfig(width=target.settings.width, codebook_size=target.vocab_size, num_drafts=num_drafts))
        for head in made.heads:
            head.weight.data.copy_(output_weight(target))
        return made

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, T, g, K] of the tokens n + 1 ... n + g, of features f_n [B, T, D]."""
        return torch.stack([head(block(features)) for block, head in zip(self.blocks, self.heads)], dim=2)
