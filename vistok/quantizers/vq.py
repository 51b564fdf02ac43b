"""Vector quantization: each vector becomes the nearest row of a learned codebook.

van den Oord et al. 2017, arXiv 1711.00937 (equations 1-3, appendix A.1).

    n     = z, or z / |z| under the cosine metric                 (codes e_k alike)
    id    = argmin_k |n - e_k|^2                                  the lowest of equals
    codes = n + sg(e_id - n)                                      straight-through
    loss  = codebook_weight mean (e_id - sg n)^2                  learned codebooks only
          + commitment_weight mean (n - sg e_id)^2

N vectors of width d, K codes. Everything is computed in float32, outside autocast; the codebook stays float32 when the model is cast.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.groups import CodeGroup, normalize_groups, weigh_groups


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape and training of a codebook."""

    codebook_size: int = 8192
    """K."""
    code_dim: int = 32
    """d."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """"cosine" compares, and returns, unit vectors."""
    groups: tuple[CodeGroup, ...] = ()
    """Slices that share the index, each with its weight and metric; code_dim must be their sum. None: one group of `metric`."""
    update: Literal["gradient", "ema"] = "gradient"
    """Who moves the codes: the optimizer (codebook is a parameter) or a moving average of the vectors (a buffer)."""
    commitment_weight: float = 0.25
    """Weight of the pull of the vectors to their codes."""
    codebook_weight: float = 1.0
    """Weight of the pull of the codes to their vectors (update="gradient")."""

    def __post_init__(self):
        if self.groups and sum(group.dim for group in self.groups) != self.code_dim:
            raise ValueError(f"code_dim {self.code_dim} is not the sum of the groups' {[group.dim for group in self.groups]}")


class VQ(nn.Module):
    """A codebook of K vectors."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.code_dim = config.codebook_size, config.code_dim
        self.groups = config.groups or (CodeGroup(dim=config.code_dim, metric=config.metric),)
        K = config.codebook_size
        codebook = normalize_groups(torch.empty(K, config.code_dim).uniform_(-1 / K, 1 / K), self.groups)
        if config.update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [..., d] float -> codes [..., d] in z.dtype, ids [...] int64, loss (float32 scalar)."""
        with torch.autocast(z.device.type, enabled=False):
            n = normalize_groups(z.float(), self.groups)
            ids = self.nearest(n)
            picked = self.decode(ids)
            terms = {"commitment": self.config.commitment_weight * (n - picked.detach()).square().mean()}
            if self.config.update == "gradient":
                terms["codebook"] = self.config.codebook_weight * (picked - n.detach()).square().mean()
            codes = n + (picked - n).detach()
        return QuantizerOutput(codes=codes.to(z.dtype), ids=ids, loss=sum(terms.values()), terms=terms)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] int64 of the codes nearest to z [..., d]."""
        prepared = weigh_groups(normalize_groups(z.float(), self.groups), self.groups)
        return nearest_codes(prepared, weigh_groups(normalize_groups(self.codebook.float(), self.groups), self.groups))

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 of ids [...]; unit vectors under the cosine metric."""
        return normalize_groups(nn.functional.embedding(ids, self.codebook).float(), self.groups)
