"""Relaxed rules without a codebook.

    mixture    v = (1 - t) p + t q,  t = min(1, eps / TV(p, q));  exact verification against v     no rule gains more for a loss of eps
    cascades   pi = q where the drafter is as good as the target, else p;  exact verification against pi
               Narasimhan et al. 2024, arXiv 2405.19261, table 1:
                   Chow     q if max q >= 1 - alpha
                   Diff     q if max q >= max p - alpha
                   OPT      q if max q >= max p - alpha TV(p, q)
                   token    T = {v: p(v) >= (1 - alpha) max p};   pi(v) = q(v) 1[v in T] + p(v) q(not T)
    typical    accept x where p(x) > min(threshold, alpha exp(-H)),  H = -sum p log(p + 1e-5)      Cai et al. 2024, 2401.10774, 2.3.1
    judge      accept x where the standard rule does, or where a linear head on the target's state at x says so      2501.19309, section 4

Shapes: ... any, V vocabulary, P paths, g drafts a path, D width.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from vistok.decoding.accept.registry import accept_rule, law_rule
from vistok.decoding.accept.rounds import Position, Trial, chance, draws, end, leftover, quotient


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Total variation [...] of laws [..., V]."""
    return 0.5 * (p - q).abs().sum(-1)


def blend(p: Tensor, q: Tensor, eps: float | Tensor) -> Tensor:
    """(1 - t) p + t q with t = min(1, eps / TV(p, q)): the law nearest to q within eps of p. eps: a number or [...]."""
    apart = distance(p, q)
    t = torch.where(apart > eps, eps / apart.clamp(min=torch.finfo(p.dtype).tiny), 1.0)[..., None]
    return (1 - t) * p + t * q


@law_rule("mixture", bound="eps", paper="this library")
def mixture(at: Position, *, eps: float = 0.1) -> Tensor:
    """Verification against the nearest law to q within eps of p; the emitted law is off by min(eps, TV(p, q)).

    Source: this library; eps of lost fidelity cannot buy more acceptance than eps.
    """
    return at.p if at.q is None else blend(at.p, at.q, eps)


def cascade_law(p: Tensor, q: Tensor, *, deferral: Literal["chow", "diff", "opt", "token"], alpha: float) -> Tensor:
    """Law [..., V] of the cascade of drafter and target; alpha 0 trusts the drafter least. Source: arXiv 2405.19261, table 1."""
    best_p, best_q = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    if deferral == "token":
        is_good = p >= (1 - alpha) * best_p
        return torch.where(is_good, q, 0.0) + p * torch.where(is_good, 0.0, q).sum(-1, keepdim=True)
    least = {"chow": 1 - alpha, "diff": best_p - alpha, "opt": best_p - alpha * distance(p, q)[..., None]}
    if deferral not in least:
        raise ValueError(f"deferral={deferral!r} must be 'chow', 'diff', 'opt' or 'token'")
    return torch.where(best_q >= least[deferral], q, p)


@law_rule("cascade", paper="2405.19261")
def cascade(at: Position, *, deferral: Literal["chow", "diff", "opt", "token"] = "opt", alpha: float = 0.1) -> Tensor:
    """Exact verification against the cascade's law; where the drafter has no law, behind its last draft, against the target's."""
    return at.p if at.q is None else cascade_law(at.p, at.q, deferral=deferral, alpha=alpha)


@accept_rule("typical", paper="2401.10774")
def typical(at: Position, *, threshold: float = 0.09, alpha: float = 0.3) -> Iterator[Trial]:
    """Medusa's typical acceptance: whatever is not improbable for how uncertain the target is; the next token is drawn from p.

    A tree is walked to the first child that is accepted; the published code takes the longest of all paths (`typical_paths`).
    Lossy: every accepted token passes the threshold, but their law is the draft's.
    """
    least = least_typical(at.p, threshold=threshold, alpha=alpha)
    for index, x in enumerate(at.candidates.unbind(-1)):
        yield Trial(index, (chance(at.p, x) > least).to(at.p.dtype), at.p)
    yield end(at.p)


def least_typical(p: Tensor, *, threshold: float, alpha: float) -> Tensor:
    """min(threshold, alpha exp(-H)) [...] of laws [..., V] (the published code adds 1e-5 inside the logarithm)."""
    return (alpha * (p * (p + 1e-5).log()).sum(-1).exp()).clamp(max=threshold)


def typical_paths(logits: Tensor, tokens: Tensor, *, temperature: float, threshold: float, alpha: float) -> tuple[int, int]:
    """The path with the most accepted drafts and their number; of equals the most probable. Lossy, without a bound.

    logits: [P, g + 1, V], after the root and each draft. tokens: [P, g + 1], the root first; a negative token pads and is not accepted.
    temperature: above 0. Source: arXiv 2401.10774, section 2.3.1.
    Raises ValueError: temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; use the greedy rule instead")
    p = (logits[:, :-1].float() / temperature).softmax(-1)  # [P, g, V]
    chances = chance(p, tokens[:, 1:].long())
    lengths = (chances > least_typical(p, threshold=threshold, alpha=alpha)).long().cumprod(1).sum(1)
    length = int(lengths.max())
    if length == 0:
        return 0, 0
    scores = chances[:, :length].log().sum(1).masked_fill(lengths < length, float("-inf"))
    return int(scores.argmax()), length


@accept_rule("judge", paper="2501.19309")
def judge(at: Position, *, head: Callable[[Tensor], Tensor], tau: float = 0.5) -> Iterator[Trial]:
    """Judge decoding: what the standard rule rejects is kept all the same where the head finds nothing wrong with it.

    head: hidden states [..., D] of the target at the candidates -> logits [...] that the token is good (`heads.JudgeHead`).
    For one candidate the loss is the sum of [q - p]+ over the tokens judged good; nothing bounds it beforehand.
    Source: arXiv 2501.19309, section 4. Raises ValueError: the engine gave no hidden states.
    """
    if at.hidden is None and at.candidates.shape[-1]:
        raise ValueError("the judge reads the target's hidden states at the drafts, and none were given")
    r = at.p
    for index, x, q_k in draws(at):
        is_good = (head(at.hidden[..., index, :]).sigmoid() > tau) & (chance(q_k, x) > 0)
        yield Trial(index, torch.where(is_good, 1.0, quotient(chance(r, x), chance(q_k, x))), r)
        r = leftover(r, q_k)
    yield end(r)
