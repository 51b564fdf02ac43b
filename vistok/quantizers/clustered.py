"""Online clustered codebook: VQ whose unused codes move onto the vectors they are nearest to.

Zheng and Vedaldi 2023, arXiv 2307.15139, equations 4-6, with the nearest vector as the anchor.

    usage_k = decay usage_k + (1 - decay) n_k / N             n_k: vectors of the batch whose code is k
    alpha_k = exp(-10 K usage_k / (1 - decay) - eps)          near 1 for a code nobody uses, 0 for one in use
    e_k     = (1 - alpha_k) e_k + alpha_k argmin_z |z - e_k|^2

N vectors of width d, K codes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.shared import normalize_groups
from vistok.quantizers.vq import VQ, VQConfig

EPS = 1e-3


class ClusteredVQ(VQ):
    """A codebook of K vectors that revives its dead codes in every training step. usage: [K] buffer, 0 at the start."""

    def __init__(self, config: VQConfig, *, decay: float = 0.99):
        super().__init__(config)
        if config.update != "gradient":
            raise ValueError(f"a clustered codebook learns by gradient, got update={config.update!r}")
        self.decay = decay
        self.register_buffer("usage", torch.zeros(config.codebook_size))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """As VQ; in training mode the codebook moves afterwards."""
        out = super().forward(z)
        if self.training:
            self.revive(z, out.ids)
        return out

    @torch.no_grad()
    def revive(self, z: Tensor, ids: Tensor) -> None:
        """Count the ids [...] of the vectors z [..., d], then move unused codes; every process ends with the same codebook."""
        vectors = normalize_groups(z.detach().float(), self.groups).reshape(-1, self.code_dim)
        share = torch.bincount(ids.flatten(), minlength=self.codebook_size).float() / ids.numel()
        anchors = vectors[nearest_codes(normalize_groups(self.codebook.float(), self.groups), vectors)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(share)
            share /= dist.get_world_size()
            dist.broadcast(anchors, src=0)
        self.usage.mul_(self.decay).add_(share.to(self.usage.dtype), alpha=1 - self.decay)
        alpha = torch.exp(-10 * self.codebook_size * self.usage.float() / (1 - self.decay) - EPS)[:, None]
        self.codebook.lerp_(anchors.to(self.codebook.dtype), alpha.to(self.codebook.dtype))
