"""Relaxed rules without a codebook: typical acceptance, and a mixture that spends a stated total variation on acceptance.

    typical    accept x where p(x) > min(threshold, alpha exp(-H)),  H = -sum p log(p + 1e-5)      Cai et al. 2024, 2401.10774, 2.3.1
    mixture    v = (1 - t) p + t q,  t = min(1, eps / TV(p, q));  exact verification against v     no rule gains more for a loss of eps

P paths, g drafts a path, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vistok.decoding.accept.exact import standard
from vistok.decoding.accept.rounds import Trial


def typical_paths(logits: Tensor, tokens: Tensor, *, temperature: float, threshold: float, alpha: float) -> tuple[int, int]:
    """The path with the most accepted drafts and their number; of equals the most probable. Lossy, without a bound.

    logits: [P, g + 1, V], after the root and each draft. tokens: [P, g + 1], the root first; a negative token pads and is not accepted.
    temperature: above 0. Source: arXiv 2401.10774, section 2.3.1 (the published code adds 1e-5 inside the logarithm).
    Raises ValueError: temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; use the greedy rule instead")
    p = (logits[:, :-1].float() / temperature).softmax(-1)  # [P, g, V]
    drafts = tokens[:, 1:].long()
    chances = p.gather(-1, drafts.clamp(min=0)[..., None])[..., 0]
    entropy = -(p * (p + 1e-5).log()).sum(-1)
    accepts = (chances > (alpha * (-entropy).exp()).clamp(max=threshold)) & (drafts >= 0)
    lengths = accepts.long().cumprod(1).sum(1)
    length = int(lengths.max())
    if length == 0:
        return 0, 0
    scores = chances[:, :length].log().sum(1).masked_fill(lengths < length, float("-inf"))
    return int(scores.argmax()), length


def mixture(p: Tensor, candidate: int, q: Tensor, *, eps: float) -> Iterator[Trial]:
    """Standard verification against the nearest law to q within eps of p; the emitted law is off by min(eps, TV(p, q)).

    p, q: [V]; candidate drawn from q. Accepted with min(1, (1 - t) p/q + t); the residual is that of p and q.
    Source: this library; eps of lost fidelity cannot buy more acceptance than eps.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps={eps} but a total variation is in [0, 1]")
    distance = 0.5 * (p - q).abs().sum()
    t = torch.where(distance > eps, eps / distance.clamp(min=torch.finfo(p.dtype).tiny), torch.ones_like(distance))
    return standard((1 - t) * p + t * q, candidate, q)
