"""Averaged weights: what a run gives back in the end.

    average <- d average + (1 - d) weight,    d = min(decay, (1 + s) / (10 + s)) at step s (from 0)

The warm-up of d lets the average forget the random start. Only trained parameters are averaged; buffers are those of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of the trained parameters of one model."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (the first is 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from stored averages; the names were checked by the reader."""
        for name, tensor in tensors.items():
            self.averages[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(own)
