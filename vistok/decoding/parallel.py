"""Parallel decoding: all tokens are guessed at once, the surest are kept, and the rest are guessed again.

Chang et al. 2022, arXiv 2202.04200, section 3.2:

    guess_n      = argmax(logits_n + t_s gumbel)                          t_s = noise (1 - r_s), r_s = (s + 1) / S
    confidence_n = log p(guess_n) + t_s gumbel                            infinite where a token is known already
    mask again the floor(N arccos(r_s) / (pi/2)) least confident          `model.num_masked`; none at the last step

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
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images from a generator that fills masks (`MaskGIT`), one image a generator; image i depends on its own alone.

    num_steps: S, at most N. noise: of the guesses, falling to 0; 0 always takes the best. Both default to the model's config.
    sampling: reshapes the law before the noise (temperature, top_k, ...).
    guidance_scale: s of u + s (c - u), 1 is off, or a function of the step; TiTok's own scale is s - 1.
    on_step: called with the step and the ids so far [B, N], model.mask_id where masked, after each step.
    Raises ValueError: num_steps is out of range, or the model is in training mode.
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
    ids = torch.full((B, N), model.mask_id, device=model.device)
    for step in range(S):
        scale = float(guidance_scale(step) if callable(guidance_scale) else guidance_scale)
        if scale == 1:
            logits = model(ids, condition).float()
        else:
            conditional, unconditional = model(ids.repeat(2, 1), condition.and_null()).float().chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
        logits = warp(logits, sampling)
        uniforms = rng.rand((N, K + 1), generators, device=model.device)
        t = noise * (1 - (step + 1) / S)
        ids = fill_step(logits, ids, uniforms, noise=t, num_masked=model.num_masked(step, S), mask_id=model.mask_id)
        if on_step is not None:
            on_step(step, ids)
    ids.sum().item()  # wait for the device, so that seconds means something
    return VisualTokens.from_ids(ids, model.layout), GenerationStats(B, B * N, S, time.perf_counter() - began)


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
