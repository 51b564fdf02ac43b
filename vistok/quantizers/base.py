"""What every quantizer returns, and how it refuses ids that are not its own."""

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


def check_range(ids: Tensor, codebook_size: int) -> None:
    """Raise ValueError: one of ids [...] is outside [0, codebook_size)."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= codebook_size):
        raise ValueError(f"ids must be in [0, {codebook_size}), got {int(ids.min())} to {int(ids.max())}")
