"""LFQ and BSQ: the sign of each channel is one bit of the id; there is no codebook to learn or to search.

    n     = z (LFQ), or z / |z| (BSQ)
    code  = s sign(n)                             s = 1, or 1/sqrt(d) so that codes lie on the unit sphere too; sign(0) = -1
    id    = sum_i [n_i > 0] 2^i                   first channel fastest, as in FSQ
    codes = n + sg(code - n)
    loss  = commitment_weight mean (n - sg code)^2
          + entropy_weight (mean H(p) - diversity H(mean p)),   p = softmax_k(-|n - c_k|^2 / temperature)

Yu et al. 2023 (MAGVIT-2), arXiv 2310.05737, section 3; Zhao et al. 2024 (BSQ), arXiv 2406.07548, section 4.

Over all 2^d codes p is a product over the channels, so H(p) is a sum over any split of them: exact. H(mean p) is not; summed over groups of
`joint_bits` channels it is an upper bound (equal where the groups are independent), as BSQ trains. joint_bits >= d is exact.
B images, d channels = bits, K = 2^d codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput, check_range
from vistok.quantizers.entropy import assignment_entropies


@dataclass(frozen=True, kw_only=True)
class LFQConfig:
    """Shape and losses of a lookup-free quantizer."""

    bits: int = 14
    """d: channels; the codebook size is 2^bits."""
    spherical: bool = False
    """BSQ: vectors and codes on the unit sphere."""
    commitment_weight: float = 0.25
    """Weight of the pull of the vectors to their codes."""
    entropy_weight: float = 0.1
    """Weight of the entropy terms; without them most codes stay unused. The loss may be negative."""
    diversity: float = 1.0
    """Weight of H(mean p), that all codes be used, against H(p), that each vector be sure."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignment."""
    joint_bits: int = 12
    """Channels whose joint use is evened out; time grows with 2^joint_bits."""

    def __post_init__(self):
        if not 1 <= self.bits <= 62:
            raise ValueError(f"bits must be in [1, 62], got {self.bits}")
        if not 1 <= self.joint_bits <= 20 or self.entropy_temperature <= 0:
            raise ValueError(f"joint_bits={self.joint_bits} must be in [1, 20] and entropy_temperature={self.entropy_temperature} positive")


class LFQ(nn.Module):
    """Lookup-free quantization; no parameters, no state."""

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.config = config
        self.code_dim, self.codebook_size = config.bits, 2**config.bits
        self.scale = config.bits**-0.5 if config.spherical else 1.0

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [..., d] float with straight-through gradients; computed in float32 whatever the input."""
        with torch.autocast(z.device.type, enabled=False):
            n = self.place(z)
            ids = self.nearest(z)
            picked = self.decode(ids)
            terms = {"commitment": self.config.commitment_weight * F.mse_loss(n, picked)}
            if self.config.entropy_weight:
                terms["entropy"] = self.config.entropy_weight * self._entropy(n.reshape(-1, self.code_dim))
            codes = n + (picked - n).detach()
        return QuantizerOutput(codes=codes.to(z.dtype), ids=ids, loss=sum(terms.values()), terms=terms)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] int64 of vectors z [..., d]; NaN counts as negative."""
        return ((z > 0).long() << torch.arange(self.code_dim, device=z.device)).sum(-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 of ids [...].

        Raises ValueError: an id is outside [0, K).
        """
        check_range(ids, self.codebook_size)
        return signs(ids, self.code_dim) * self.scale

    def place(self, z: Tensor) -> Tensor:
        """Vectors [..., d] float32 where codes live: on the unit sphere for BSQ."""
        return F.normalize(z.float(), dim=-1) if self.config.spherical else z.float()

    def _entropy(self, n: Tensor) -> Tensor:
        """H(p) - diversity H(mean p) of vectors [N, d], summed over groups of channels."""
        total = n.new_zeros(())
        for part in n.split(self.config.joint_bits, dim=1):
            table = signs(torch.arange(2 ** part.shape[1], device=n.device), part.shape[1]) * self.scale
            certain, even = assignment_entropies(part, table, temperature=self.config.entropy_temperature, log_eps=1e-10)
            total = total + certain - self.config.diversity * even
        return total


def signs(ids: Tensor, bits: int) -> Tensor:
    """Bits of ids [...] as -1 or 1, [..., bits] float32, lowest first."""
    return ((ids[..., None] >> torch.arange(bits, device=ids.device)) & 1).float() * 2 - 1
