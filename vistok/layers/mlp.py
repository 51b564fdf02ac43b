"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """out(silu(gate x) * up x), no biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], returns the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class MLP(nn.Module):
    """out(gelu(up x)) with biases; gelu is the exact one unless approximate is "tanh", or "sigmoid": x sigmoid(1.702 x), as CLIP has it."""

    def __init__(self, width: int, hidden: int, *, approximate: str = "none"):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], returns the same shape."""
        x = self.up(x)
        return self.out(x * (1.702 * x).sigmoid() if self.approximate == "sigmoid" else F.gelu(x, approximate=self.approximate))


class GEGLU(nn.Module):
    """out(gelu(gate x) * up x) with biases and the exact gelu (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], returns the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.gelu(gate) * up)
