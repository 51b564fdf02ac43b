"""FSQ: round each channel of a bounded code to a few levels; the code is its own codebook.

Mentzer et al. 2023, arXiv 2309.15505, section 3 and appendix A.

    half    = (L - 1)/2 * (1 + eps)                           L: levels of the channel
    offset  = 1/2 if L is even else 0;  shift = atanh(offset / half)
    bounded = half * tanh(z + shift) - offset
    code    = round(bounded) / floor(L/2)                     in [-1, 1]
    id      = sum_i digit_i * prod_{j<i} L_j                  mixed radix, first channel fastest; digit = round(bounded) + floor(L/2)

B images, N tokens, d = len(levels), K = prod(levels).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput, check_range

EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """Shape of a finite scalar quantizer."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """Levels per channel; their product is the codebook size (64,000 here)."""

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"every level must be at least 2, got {self.levels}")
        if math.prod(self.levels) > 2**31:
            raise ValueError(f"levels {self.levels} make {math.prod(self.levels)} codes; at most 2^31 are allowed")


class FSQ(nn.Module):
    """Finite scalar quantization; it has no parameters and no state."""

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.levels = config.levels
        self.codebook_size = math.prod(config.levels)
        self.code_dim = len(config.levels)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize with straight-through gradients.

        z: [..., d] float. Computed in float32 whatever the input, codes returned in z.dtype.
        Returns codes [..., d], ids [...] in [0, K); loss is 0: FSQ needs none.
        """
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        # a NaN image must not index outside the codebook, nor disturb its neighbours
        digits = bounded.detach().nan_to_num().round().long() + self._floor(z.device)
        return QuantizerOutput(codes=(rounded / self._floor(z.device)).to(z.dtype), ids=self._ids(digits), loss=z.new_zeros(()))

    def bound(self, z: Tensor) -> Tensor:
        """The tanh-bounded value before rounding, [..., d] float32."""
        levels = torch.tensor(self.levels, device=z.device, dtype=torch.float32)
        half = (levels - 1) * (1 + EPS) / 2
        offset = (levels % 2 == 0).float() / 2
        return torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 in [-1, 1] of ids [...].

        Raises ValueError: an id is outside [0, K).
        """
        check_range(ids, self.codebook_size)
        levels = torch.tensor(self.levels, device=ids.device)
        digits = torch.div(ids[..., None], self._basis(ids.device), rounding_mode="floor") % levels
        return (digits - levels // 2).float() / (levels // 2)

    def _ids(self, digits: Tensor) -> Tensor:
        return (digits * self._basis(digits.device)).sum(-1)

    def _floor(self, device) -> Tensor:
        return torch.tensor([level // 2 for level in self.levels], device=device)

    def _basis(self, device) -> Tensor:
        return torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))], device=device)
