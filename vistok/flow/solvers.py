"""Integrate a velocity field from noise (t = 1) to an image (t = 0).

A velocity is a function (x, step) -> v, where step indexes `time_grid`: what depends on the time alone is then computed once per grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]


def time_grid(num_steps: int) -> Tensor:
    """[num_steps + 1] float32 times from 1 down to 0, evenly spaced.

    Raises ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} but at least 1 is needed")
    return torch.arange(num_steps, -1, -1, dtype=torch.float32) / num_steps


def euler(velocity: Velocity, x: Tensor, times: Tensor, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """One evaluation a step. x: [B, ...] at times[0]; times: [S+1] decreasing; returns x at times[-1].

    on_step: called with (step, x) before each step.
    """
    for step in range(len(times) - 1):
        if on_step is not None:
            on_step(step, x)
        x = x + (times[step + 1] - times[step]).item() * velocity(x, step)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Second order: the mean of the velocities at both ends of a step (two evaluations; one in the last step, where t = 0). As `euler`."""
    for step in range(len(times) - 1):
        if on_step is not None:
            on_step(step, x)
        length = (times[step + 1] - times[step]).item()
        v = velocity(x, step)
        if step + 1 < len(times) - 1:
            v = (v + velocity(x + length * v, step + 1)) / 2
        x = x + length * v
    return x


def euler_maruyama(
    velocity: Velocity, x: Tensor, times: Tensor, noise: Callable[[int], Tensor], on_step: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """The reverse stochastic process with the same marginals and the diffusion g^2 = 2t (Ma et al. 2024, arXiv 2401.08740).

        score = -((1 - t) v + x) / t;   drift = v - t score = (2 - t) v + x
        x <- x + drift (t' - t) + sqrt(2 t) sqrt(t - t') noise           the last step has no noise

    noise: standard normal of x's shape for a step. Otherwise as `euler`.
    """
    for step in range(len(times) - 1):
        if on_step is not None:
            on_step(step, x)
        t, length = times[step].item(), (times[step] - times[step + 1]).item()
        x = x - length * ((2 - t) * velocity(x, step) + x)
        if step + 2 < len(times):
            x = x + (2 * t * length) ** 0.5 * noise(step)
    return x


SOLVERS = {"euler": euler, "heun": heun}
