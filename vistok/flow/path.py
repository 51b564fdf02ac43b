"""The straight path of rectified flow and the times it is trained at.

x_t = (1 - t) x_0 + t noise,   v = d x_t / d t = noise - x_0,   t = 1 is noise
mode sampling (Esser et al. 2024, arXiv 2403.03206, eq. 20):  t = 1 - u - s (cos^2(pi u / 2) - 1 + u)
"""

import math

import torch
from torch import Tensor

TIME_SAMPLING = ("uniform", "mode", "logit_normal")


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] for times t [B] in [0, 1]."""
    t = _per_sample(t, clean)
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the decoder regresses, [B, ...]."""
    return noise - clean


def sample_times(uniforms: Tensor, *, sampling: str = "mode", mode_scale: float = 0.25) -> Tensor:
    """Training times [B] in [0, 1] from uniform draws [B].

    sampling: "uniform"; "mode" (SD3, strength mode_scale in [-1, 1.75]); "logit_normal" (sigmoid of a standard normal).
    Raises ValueError: another name.
    """
    if sampling == "uniform":
        return uniforms
    if sampling == "mode":
        return 1 - uniforms - mode_scale * (torch.cos(math.pi / 2 * uniforms).square() - 1 + uniforms)
    if sampling == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(uniforms.clamp(1e-6, 1 - 1e-6)))
    raise ValueError(f"sampling={sampling!r}; allowed: {', '.join(TIME_SAMPLING)}")
