"""Learning rate over a run, as a fraction of its peak.

    warm-up     (s + 1) / warmup                                   s < warmup
    constant    1
    cosine      f + (1 - f) (1 + cos(pi t)) / 2                    t = (s - warmup) / (steps - warmup)
    trapezoid   1, then linear to f over the last decay_fraction of the steps

s: step from 0, f: final_fraction.
"""

import math

from .config import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the peak learning rate at `step` (the first step is 0); it depends on nothing else, so a resumed run continues it."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    f = config.final_fraction
    if config.schedule == "cosine":
        t = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
        return f + (1 - f) * (1 + math.cos(math.pi * t)) / 2
    if config.schedule == "trapezoid":
        remaining = max(0, config.max_steps - step) / max(1.0, config.decay_fraction * config.max_steps)
        return f + (1 - f) * min(1.0, remaining)
    return 1.0
