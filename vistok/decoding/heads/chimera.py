"""Chimera: the far past from the target's features, the near past from the last three tokens.

Zeng et al. 2024, arXiv 2402.15758, section 3:

    g_n     = linear(resblock([e(x_n-2) ; e(x_n-1) ; e(x_n)]))       of the last three tokens; where there are fewer, the first repeats
    c_n     = layer([f_n ; g_n], all pairs before)                    the context, once a step of the target
    q_n+1+i = softmax(W_i [c_n ; g_n+i])                              g_n+i reads the draft tokens

f_n: what the target's output layer reads to decide token n; e: its embedding, frozen. W_i starts as the target's output layer, twice.

B rows, T positions, D width, g heads, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.decoding.heads.parts import LayerConfig, PairLayer, ResidualBlock, layer_fields, output_weight
from vistok.layers.placement import PlacedCache, Placement
from vistok.modeling import VisualModel
from vistok.registry import register


@dataclass(frozen=True, kw_only=True)
class ChimeraConfig(LayerConfig):
    """Shape of the heads; the context layer is like one of the target's."""

    codebook_size: int = 1000
    """K."""
    num_drafts: int = 4
    """g: heads, and so draft tokens in a row."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.codebook_size, self.num_drafts) < 1:
            raise ValueError(f"codebook_size={self.codebook_size} and num_drafts={self.num_drafts} must be at least 1")


@register
class ChimeraHeads(VisualModel):
    """A context layer, a trigram encoder and g output layers."""

    Config = ChimeraConfig

    def __init__(self, config: ChimeraConfig):
        super().__init__(config)
        D, K = config.width, config.codebook_size
        self.trigram = nn.Sequential(ResidualBlock(3 * D), nn.Linear(3 * D, D))
        self.layer = PairLayer(config)
        self.heads = nn.ModuleList(nn.Linear(2 * D, K, bias=False) for _ in range(config.num_drafts))

    @classmethod
    def for_target(cls, target, *, num_drafts: int = 4) -> "ChimeraHeads":
        """Fresh heads that suit a generator."""
        made = cls(ChimeraConfig(codebook_size=target.vocab_size, num_drafts=num_drafts, **layer_fields(target)))
        for head in made.heads:
            head.weight.data.copy_(output_weight(target).repeat(1, 2))
        return made

    def trigrams(self, embeddings: Tensor) -> Tensor:
        """g [..., D] of the embeddings [..., 3, D] of three tokens in a row."""
        return self.trigram(embeddings.flatten(-2))

    def context(
        self, features: Tensor, trigrams: Tensor, *, placement: Placement | None = None, cache: PlacedCache | None = None
    ) -> Tensor:
        """c [B, T, D] of features f_n and trigrams g_n [B, T, D]."""
        return self.layer(features, trigrams, placement=placement, cache=cache)

    def logits(self, context: Tensor, trigrams: Tensor, index: int) -> Tensor:
        """Logits [B, T, K] of the token behind the trigrams [B, T, D], by head `index`; context: [B, T or 1, D]."""
        return self.heads[index](torch.cat([context.expand_as(trigrams), trigrams], dim=-1))


def in_threes(ids: Tensor) -> Tensor:
    """[B, T, 3]: each token and the two before it; in front the first repeats. ids: [B, T]."""
    padded = torch.cat([ids[:, :1], ids[:, :1], ids], dim=1)
    return padded.unfold(1, 3, 1)
