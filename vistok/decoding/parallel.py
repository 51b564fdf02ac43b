"""Parallel decoding: all tokens are guessed at once, the surest are kept, and the rest are guessed again.

Chang et al. 2022, arXiv 2202.04200, section 3.2:

    guess_n      = argmax(logits_n + t_s gumbel)                          t_s = noise (1 - r_s), r_s = (s + 1) / S
    confidence_n = log p(guess_n) + t_s gumbel                            infinite where a token is known already
    mask again the floor(N arccos(r_s) / (pi/2)) least confident          `model.masked_after`; none at the last step

Ours: tokens may be known from the start, and stay. An image with m masked tokens joins at the first step that leaves fewer than m, so what
a run had after some step is continued as that run would have been.

B images, N tokens, K codes, S steps.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import rng
from vistok.decoding.generate import GenerationStats
from vistok.decoding.sampling import SamplingConfig, warp
from vistok.tokens import VisualTokens


@torch.no_grad()
def generate_parallel(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    num_steps: int | None = None,
    noise: float | None = None,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images from a generator that fills masks (`MaskGIT`), one image a generator; image i depends on its own alone.

    num_steps: S, at most N. noise: of the guesses, falling to 0; 0 always takes the best. Both default to the model's config.
    sampling: reshapes the law before the noise (temperature, top_k, ...).
    guidance_scale: s of u + s (c - u), 1 is off, or a function of the step; TiTok's own scale is s - 1.
    prefix: [B, n] ids of each image's first tokens, or what on_step was called with; known tokens stay, masked ones are filled.
    on_step: called with the step and the ids so far [B, N], model.mask_id where masked, after each step that is run.
    Every generator is advanced by S N (K + 1) uniforms, whatever is known.
    Raises ValueError: num_steps is out of range, the prefix is none of these images, or the model is in training mode.
    """
    N, K, B = model.max_tokens, model.vocab_size, len(generators)
    S = min(model.settings.num_steps, N) if num_steps is None else num_steps
    noise = model.settings.noise if noise is None else noise
    if not 1 <= S <= N:
        raise ValueError(f"num_steps={num_steps} but 1 to {N} steps fill {N} tokens")
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")
    began = time.perf_counter()
    sampling = sampling or SamplingConfig()
    ids = _start(prefix, torch.full((B, N), model.mask_id, device=model.device), model.mask_id)
    num_known, passes = int((ids != model.mask_id).sum()), 0
    for step, left in enumerate(model.masked_after(S)):
        uniforms = rng.rand((N, K + 1), generators, device=model.device)
        joins = (ids == model.mask_id).sum(1, keepdim=True) > left  # [B, 1]
        if num_known and not joins.any():  # only images that began with known tokens can be ahead
            continue
        scale = float(guidance_scale(step) if callable(guidance_scale) else guidance_scale)
        if scale == 1:
            logits = model(ids, condition).float()
        else:
            conditional, unconditional = model(ids.repeat(2, 1), condition.and_null()).float().chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
        logits = warp(logits, sampling)
        t = noise * (1 - (step + 1) / S)
        ids = torch.where(joins, fill_step(logits, ids, uniforms, noise=t, num_masked=left, mask_id=model.mask_id), ids)
        passes += 1
        if on_step is not None:
            on_step(step, ids)
    ids.sum().item()  # wait for the device, so that seconds means something
    return VisualTokens.from_ids(ids, model.layout), GenerationStats(B, B * N - num_known, passes, time.perf_counter() - began)


def _start(prefix: Tensor | None, ids: Tensor, mask_id: int) -> Tensor:
    """Masked ids [B, N] with what a prefix knows written in. Raises ValueError: it does not fit, or leaves nothing to fill."""
    if prefix is None:
        return ids
    B, N = ids.shape
    if prefix.ndim != 2 or len(prefix) != B or prefix.shape[1] > N or prefix.is_floating_point():
        raise ValueError(f"the prefix must hold ids [{B}, n] of at most {N} tokens, got {prefix.dtype} of shape {tuple(prefix.shape)}")
    n = prefix.shape[1]
    if n and not 0 <= int(prefix.min()) <= int(prefix.max()) <= mask_id:
        allowed = f"0 to {mask_id - 1}, and {mask_id} for a masked token"
        raise ValueError(f"the prefix holds ids from {int(prefix.min())} to {int(prefix.max())}; allowed: {allowed}")
    ids[:, :n] = prefix
    if not bool((ids == mask_id).any()):
        raise ValueError(f"the prefix knows all {N} tokens of every image; there is none to make")
    return ids


def fill_step(logits: Tensor, ids: Tensor, uniforms: Tensor, *, noise: float, num_masked: int, mask_id: int) -> Tensor:
    """Guess the masked tokens, then mask the least sure of the guesses again; at least one is kept.

    logits: [B, N, K]. ids: [B, N], mask_id where masked. uniforms: [B, N, K + 1] on [0, 1): K for the guess, one for the confidence.
    num_masked: tokens masked after the step, as far as there are so many. Returns ids [B, N].
    """
    gumbel = -(-uniforms.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    is_masked = ids == mask_id
    guesses = (logits + noise * gumbel[..., :-1]).argmax(-1)
    confidence = F.log_softmax(logits, dim=-1).gather(-1, guesses[..., None])[..., 0] + noise * gumbel[..., -1]
    rank = confidence.masked_fill(~is_masked, torch.inf).argsort(1).argsort(1)  # 0 is the least sure
    again = (is_masked.sum(1, keepdim=True) - 1).clamp(max=num_masked)
    return torch.where(is_masked & (rank < again), mask_id, torch.where(is_masked, guesses, ids))
