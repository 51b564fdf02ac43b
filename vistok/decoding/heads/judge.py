"""A judge: is this draft token wrong, or only not the likeliest?

Bachmann et al. 2025, arXiv 2501.19309, section 4:

    good(x_n) = sigmoid(w . f_n+1 + b)        f_n+1: the target's feature once it has read x_n, before it decides the next token

One row of weights, trained on tokens whose worth is known (`training/tasks/judge.py`). D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vistok.modeling import VisualModel
from vistok.registry import register


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Shape of the head."""

    width: int = 192
    """D of the target."""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@register
class JudgeHead(VisualModel):
    """A linear layer on the target's features."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig):
        super().__init__(config)
        self.linear = nn.Linear(config.width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def for_target(cls, target) -> "JudgeHead":
        """A fresh head that suits a generator."""
        return cls(JudgeConfig(width=target.settings.width))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [...] that the token is good, of the target's features [..., D] at it."""
        return self.linear(features)[..., 0]
