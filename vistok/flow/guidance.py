"""Guidance: move a prediction away from the unconditional one.

classifier-free (Ho and Salimans 2022, arXiv 2207.12598):  v = u + s (c - u)
adaptive projected (Sadat et al. 2024, arXiv 2410.02416), on velocities as FlexTok uses it:
    d = c - u;  m = d + momentum m_prev;  m' = m min(1, r / |m|);  drop the part of m' parallel to c (times 1 - eta)
    v = c + (s - 1) m'
"""

import torch
from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + s (c - u), of predictions c and u of one shape [B, ...]; scale s = 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


class AdaptiveProjectedGuidance:
    """APG for one sampling run: it carries the momentum from step to step, so make a new one for each run.

    momentum: weight of the previous (unclipped) difference. norm_threshold: r, the largest norm of a sample's difference.
    eta: share of the parallel part that is kept.
    """

    def __init__(self, *, momentum: float = -0.5, norm_threshold: float = 2.5, eta: float = 0.0):
        self.momentum, self.norm_threshold, self.eta = momentum, norm_threshold, eta
        self.average: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guided prediction [B, ...]; norms and projections are per sample, the projection in float64 where the device has it."""
        axes = tuple(range(1, conditional.ndim))
        difference = conditional - unconditional
        self.average = difference if self.average is None else difference + self.momentum * self.average
        norm = torch.linalg.vector_norm(self.average, dim=axes, keepdim=True)
        clipped = self.average * (self.norm_threshold / norm.clamp_min(1e-12)).clamp(max=1.0)
        precise = torch.float32 if conditional.device.type == "mps" else torch.float64  # MPS has no float64
        wide, direction = clipped.to(precise), conditional.to(precise)
        direction = direction / torch.linalg.vector_norm(direction, dim=axes, keepdim=True).clamp_min(1e-12)
        parallel = (wide * direction).sum(dim=axes, keepdim=True) * direction
        return conditional + (scale - 1) * (wide - (1 - self.eta) * parallel).to(conditional.dtype)
