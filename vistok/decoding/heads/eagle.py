"""EAGLE: draft in the space of the target's features, one decoder layer, one feature after another.

Li et al. 2024, arXiv 2401.15077, section 4.1; the drafter of LANTERN, 2410.03355:

    f_n    = what the target's output layer W reads to decide token n
    f^_n+1 = layer([e(x_n) ; f_n], all pairs before)         e: the target's embedding, frozen
    q_n+1  = softmax(W f^_n+1)                                W: the target's output layer, frozen

Behind the root the features are the head's own predictions. Under guidance conditional and unconditional rows are drafted as two rows.

B rows, T positions, D width.
"""

from dataclasses import dataclass

from torch import Tensor

from vistok.decoding.heads.parts import LayerConfig, PairLayer, layer_fields
from vistok.layers.placement import PlacedCache, Placement
from vistok.modeling import VisualModel
from vistok.registry import register


@dataclass(frozen=True, kw_only=True)
class EagleConfig(LayerConfig):
    """Shape of the head: that of one of the target's layers."""


@register
class EagleHead(VisualModel):
    """Predicts the target's next feature from its last ones and the tokens that were drawn."""

    Config = EagleConfig

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.layer = PairLayer(config)

    @classmethod
    def for_target(cls, target) -> "EagleHead":
        """A fresh head that suits a generator."""
        return cls(EagleConfig(**layer_fields(target)))

    def forward(
        self, features: Tensor, embeddings: Tensor, *, placement: Placement | None = None, cache: PlacedCache | None = None
    ) -> Tensor:
        """f^ [B, T, D], the feature after each pair: features f_n [B, T, D] and embeddings e(x_n) [B, T, D] of positions n."""
        return self.layer(features, embeddings, placement=placement, cache=cache)
