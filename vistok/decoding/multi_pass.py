"""Scale by scale, each scale drawn more than once: the first pass knows the scales before, the next ones also what was drawn.

Qu et al. 2024 (TokenFlow), arXiv 2412.03069, section 3.3: wide sampling first, then narrower, so that the tokens of a scale, which are
drawn independently, agree with each other. The published setting: top_k 1200, top_p 0.8; then 100, 0.8; then the most probable.

B images, N tokens, K codes.
"""

import time
from collections.abc import Sequence

import torch

from vistok import rng
from vistok.decoding.generate import GenerationStats
from vistok.decoding.sampling import SamplingConfig, sample, warp
from vistok.tokens import VisualTokens

PUBLISHED = (SamplingConfig(top_k=1200, top_p=0.8), SamplingConfig(top_k=100, top_p=0.8), SamplingConfig(temperature=0))


@torch.no_grad()
def generate_multi_pass(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    passes: Sequence[SamplingConfig] = PUBLISHED,
    guidance_scale: float = 1.0,
    num_tokens: int | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images, one a generator, by a model that has `look_again` (TokenFlowT2I).

    condition: of the B images (a `Prompt`). passes: how each pass over a scale draws; the first scale has the first pass only.
    guidance_scale: at the last scale; it rises to there from 1 at the first. num_tokens: of whole scales, all by default.
    With one pass this is `decoding.generate`. Every generator is advanced by len(passes) max_tokens uniforms; image i depends on its own.
    Raises ValueError: no pass, num_tokens ends inside a scale, or the model is in training mode.
    """
    if not passes:
        raise ValueError("passes must say how at least one pass draws")
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")
    B, N = len(generators), model.max_tokens if num_tokens is None else num_tokens
    sizes, guidance = model.step_sizes(N), model.guidance_schedule(guidance_scale)
    began = time.perf_counter()
    uniforms = rng.rand((len(passes), model.max_tokens), generators, device=model.device, dtype=torch.float64)
    rows = 2 * B if guidance_scale != 1 else B
    start = condition.and_null() if rows > B else condition
    cache = model.new_cache(rows, N, prompt_length=condition.ids.shape[1])
    ids = torch.empty(B, 0, dtype=torch.int64, device=model.device)
    new, runs = ids.new_empty(rows, 0), 0
    for step, size in enumerate(sizes):
        for number, sampling in enumerate(passes[: len(passes) if step else 1]):
            again = new.repeat(rows // B, 1) if number or step else new
            logits = model.look_again(again, cache=cache) if number else model(again, start, cache=cache)
            if rows > B:
                conditional, unconditional = logits.float().chunk(2)
                logits = unconditional + guidance(step) * (conditional - unconditional)
            new = sample(warp(logits, sampling).softmax(-1), uniforms[:, number, ids.shape[1] : ids.shape[1] + size])
            start, runs = None, runs + 1
        ids = torch.cat([ids, new], dim=1)
    ids.sum().item()  # wait for the device, so that seconds means something
    return VisualTokens.from_ids(ids, model.layout), GenerationStats(B, B * N, runs, time.perf_counter() - began)
