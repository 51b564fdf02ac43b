"""What every quantizer returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizerOutput:
    """codes: quantized vectors [B, N, d], gradients pass straight through. ids: [B, N] int64. loss: scalar, 0 where none is needed."""

    codes: Tensor
    ids: Tensor
    loss: Tensor
