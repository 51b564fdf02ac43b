"""Normalisation without parameters, computed in float32 whatever the input."""

import torch.nn.functional as F
from torch import Tensor


def plain_layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis without weight or bias; x: [..., D], returned in x.dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: the adaptive half of adaLN. shift and scale broadcast against x [B, T, D]."""
    return x * (1 + scale) + shift
