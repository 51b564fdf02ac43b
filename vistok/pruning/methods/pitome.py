"""PiToMe: merge where tokens crowd, and protect the lonely ones.

Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148, section 3.

    S    = cos(metric_i, metric_j) over patch tokens
    E_i  = mean_j ELU_alpha(S_ij - margin)              energy: high in a large cluster
    o    = argsort(E), descending;  r = floor(T - T * layer_keep_ratio)
    protect rule (the paper's):  a = o[0:2r:2], b = o[1:2r:2], every a goes to its most similar b; o[2r:] stay untouched
    order rule:                  a = o[0::2],   b = o[1::2],   the r best-matching a go to their b; nothing is protected

The reference code uses the continuous ELU above where the paper's f jumps at the margin, and applies the order rule in the first half of
the layers of DeiT ("deit") and in the second half for MAE ("mae"). T patch tokens, P prefix tokens first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.pruning.plan import ReductionPlan, gather_rows

RULES = ("protect", "order", "deit", "mae")


def pitome_rules(num_layers: int, rule: str | Sequence[str]) -> tuple[str, ...]:
    """The matching rule of each layer, "protect" or "order".

    deit: order in the first ceil(L/2) layers, then protect. mae: protect in the first half, then order. A list names each layer's.
    """
    if not isinstance(rule, str):
        if len(rule) != num_layers or not set(rule) <= {"protect", "order"}:
            raise ValueError(f"a list of rules has one of protect, order for each of the {num_layers} layers, got {list(rule)}")
        return tuple(rule)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} but it is one of {', '.join(RULES)}")
    half = math.ceil(num_layers / 2)
    if rule == "deit":
        return ("order",) * half + ("protect",) * (num_layers - half)
    if rule == "mae":
        half = num_layers // 2
        return ("protect",) * half + ("order",) * (num_layers - half)
    return (rule,) * num_layers


def pitome_margins(num_layers: int, margin: float | Sequence[float]) -> tuple[float, ...]:
    """The margin of each layer: margin * (1 - l/L) for a number (0.9 in the paper, 0.75 in the reference DeiT), or a list."""
    if isinstance(margin, (int, float)):
        return tuple(margin - margin * layer / num_layers for layer in range(num_layers))
    if len(margin) != num_layers:
        raise ValueError(f"margin names {len(margin)} layers but the model has {num_layers}")
    return tuple(margin)


def pitome_count(num_patches: int, layer_keep_ratio: float) -> int:
    """Tokens that one layer merges: floor(T - T * ratio)."""
    return math.floor(num_patches - num_patches * layer_keep_ratio)


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """metric: [B, T, d]. Returns [B, T] float32: the mean over all tokens, itself included, of ELU(cosine - margin)."""
    return _energy(F.normalize(metric.float(), dim=-1), margin, alpha)


def gaussian_energy(metric: Tensor, margin: float) -> Tensor:
    """The energy of the text variant: mean_j exp(-((1 - S_ij)/sigma)^2 / 2) / (sigma sqrt(2 pi)), sigma = 1 - margin."""
    metric = F.normalize(metric.float(), dim=-1)
    sigma = 1.0 - margin
    distance = (1.0 - metric @ metric.transpose(1, 2)) / sigma
    return (torch.exp(-0.5 * distance**2) / (sigma * math.sqrt(2 * math.pi))).mean(dim=-1)


def pitome(metric: Tensor, r: int, *, margin: float, num_prefix: int = 1, rule: str = "protect", alpha: float = 1.0) -> ReductionPlan:
    """Energy-ordered matching of the patch tokens.

    metric: [B, N, d], the P prefix tokens first. r: tokens to merge, at most half of the patch tokens (more is cut to that).
    rule: protect, order, or text (Gaussian energy; the r highest go to the r next).
    Output order: prefix, then protected (or unmerged) tokens, then destinations; N - r tokens.
    """
    B, N, _ = metric.shape
    r = min(r, (N - num_prefix) // 2)
    if r <= 0:
        return ReductionPlan.identity(B, N, metric.device)
    with torch.no_grad():
        metric = F.normalize(metric[:, num_prefix:].float(), dim=-1)
        score = gaussian_energy(metric, margin) if rule == "text" else _energy(metric, margin, alpha)
        order = score.argsort(dim=-1, descending=True, stable=True)
        if rule == "order":
            a, b, rest = order[:, ::2], order[:, 1::2], None
        elif rule == "protect":
            a, b, rest = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
        elif rule == "text":
            a, b, rest = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
        else:
            raise ValueError(f"rule={rule!r} but it is one of protect, order, text")
        between = gather_rows(metric, a) @ gather_rows(metric, b).transpose(1, 2)
        best, destination = between.max(dim=-1)
        if rest is None:
            matched = best.argsort(dim=-1, descending=True, stable=True)
            destination = destination.gather(1, matched[:, :r])
            rest, a = a.gather(1, matched[:, r:]), a.gather(1, matched[:, :r])
        prefix = torch.arange(num_prefix, device=metric.device).expand(B, -1)
        keep = torch.cat([prefix, rest + num_prefix, b + num_prefix], dim=1)
    return ReductionPlan(N, keep, a + num_prefix, destination + num_prefix + rest.shape[1])


def _energy(metric: Tensor, margin: float, alpha: float) -> Tensor:
    """metric: [B, T, d] of length 1. Similarity is symmetric, so a quarter of the pairs are left out and found as column sums."""
    T = metric.shape[1]
    second = metric[:, T // 2 :].transpose(1, 2)
    above = _terms(torch.bmm(metric[:, : T // 2], metric.transpose(1, 2)), margin, alpha)  # [B, T/2, T]
    below = _terms(torch.bmm(metric[:, T // 2 :], second), margin, alpha)
    total = torch.cat([above.sum(dim=2), above[:, :, T // 2 :].sum(dim=1) + below.sum(dim=2)], dim=1)
    return total / T - (margin + alpha)


def _terms(similarity: Tensor, margin: float, alpha: float) -> Tensor:
    """ELU(similarity - margin) + margin + alpha, in place: max(S, m) + alpha exp(-m) exp(min(S, m))."""
    below = similarity.clamp(max=margin).exp_()
    return similarity.clamp_(min=margin).add_(below, alpha=alpha * math.exp(-margin))
