"""Normalisation: a layer norm without parameters, computed in float32 whatever the input, and an RMS norm that decodes faster."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers import native

_FEW_ROWS = 16  # one thread is enough for them


class RMSNorm(nn.RMSNorm):
    """torch's, for the last axis; without gradients on a CPU faster, since a decoding step does it 2 L + 1 times."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]."""
        weight = self.weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.dtype == weight.dtype == torch.float32 and x.is_cpu):
            return super().forward(x)
        if x.shape[-1:] == weight.shape and x.numel() <= _FEW_ROWS * x.shape[-1] and native.is_available():
            return native.rms_norm(x, weight, self.eps)
        # sqrt(mean x^2 + eps) as the hypotenuse of |x| / sqrt(D) and sqrt(eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * (1 / math.sqrt(len(weight)))
        return torch.div(x, torch.hypot(length, length.new_full((), math.sqrt(self.eps)))).mul_(weight)


def plain_layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis without weight or bias; x: [..., D], returned in x.dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: the adaptive half of adaLN. shift and scale broadcast against x [B, T, D]."""
    return x * (1 + scale) + shift
