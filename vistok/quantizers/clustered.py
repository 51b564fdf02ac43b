"""Online clustered codebook: VQ whose unused codes move onto the vectors they are nearest to.

Zheng and Vedaldi 2023, arXiv 2307.15139, equations 4-6, with the nearest vector as the anchor.

    share_k = decay share_k + (1 - decay) n_k / N             n_k: vectors of the batch whose code is k
    alpha_k = exp(-10 K share_k / (1 - decay) - eps)          near 1 for a code nobody uses, 0 for one in use
    e_k     = (1 - alpha_k) e_k + alpha_k argmin_z |z - e_k|^2

N vectors of width d, K codes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.vq import VQ, VQConfig

EPS = 1e-3


class ClusteredVQ(VQ):
    """A codebook of K vectors whose dead codes revive in every training step.

    shares: [K] float buffer, how much each code is used; 0 at the start.
    """

    def __init__(self, config: VQConfig, *, decay: float = 0.99):
        super().__init__(config)
        if config.update != "gradient" or config.revive_after:
            raise ValueError(
                f"a clustered codebook learns by gradient and revives by itself, got {config.update=} and {config.revive_after=}"
            )
        self.decay = decay
        self.register_buffer("shares", torch.zeros(config.codebook_size))

    @torch.no_grad()
    def observe(self, z: Tensor, ids: Tensor) -> None:
        """Count the ids [B, ...] of vectors z [B, ..., d], then move unused codes; every process ends with the same codebook."""
        super().observe(z, ids)
        vectors = self.place(z.detach()).reshape(-1, self.code_dim).float()
        finite = vectors.isfinite().all(1)
        if not bool(finite.any()):  # a spoilt batch: the trainer reports its loss
            vectors, finite = torch.zeros_like(vectors), torch.ones_like(finite)
        share = torch.bincount(ids.flatten()[finite], minlength=self.codebook_size).float() / finite.sum()
        vectors = vectors[finite]
        anchors = vectors[nearest_codes(self.place(self.codebook), vectors)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(share)
            share /= dist.get_world_size()
            dist.broadcast(anchors, src=0)
        self.shares.mul_(self.decay).add_(share, alpha=1 - self.decay)
        alpha = torch.exp(-10 * self.codebook_size * self.shares / (1 - self.decay) - EPS)[:, None]
        self.codebook.lerp_(anchors, alpha)
