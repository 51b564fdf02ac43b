"""What every quantizer returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class QuantizerOutput:
    """codes: quantized vectors [..., d], gradients pass straight through. ids: [...] int64. loss: scalar, 0 where none is needed.

    terms: the weighted parts of the loss by name; loss is their sum.
    """

    codes: Tensor
    ids: Tensor
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
