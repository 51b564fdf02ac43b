"""Scale by scale, each scale drawn more than once: the first pass knows the scales before, the next ones also what was drawn.

Qu et al. 2024 (TokenFlow), arXiv 2412.03069, section 3.3: wide sampling first, then narrower, so that the tokens of a scale, which are
drawn independently, agree with each other. The published setting: top_k 1200, top_p 0.8; then 100, 0.8; then the most probable.

B images, N tokens, K codes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.generate import GenerationStats, take_prefix
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
    guidance_scale: float | Callable[[int], float] = 1.0,
    num_tokens: int | None = None,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images, one a generator, by a model that has `look_again` (TokenFlowT2I).

    condition: of the B images (a `Prompt`). passes: how each pass over a scale draws; the first scale has the first pass only.
    guidance_scale: at the last scale, it rises to there from 1 at the first; or a function of the scale's number.
    num_tokens: of whole scales, all by default. prefix, on_step: as in `decoding.generate`; a scale is a step.
    With one pass this is `decoding.generate`. Every generator is advanced by len(passes) max_tokens uniforms; image i depends on its own.
    Raises ValueError: no pass, num_tokens or the prefix ends inside a scale, or the model is in training mode.
    """
    if not passes:
        raise ValueError("passes must say how at least one pass draws")
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")
    B, N = len(generators), model.max_tokens if num_tokens is None else num_tokens
    sizes = model.step_sizes(N)
    guidance = guidance_scale if callable(guidance_scale) else model.guidance_schedule(guidance_scale)
    scales = [float(guidance(step)) for step in range(len(sizes))]
    began = time.perf_counter()
    uniforms = rng.rand((len(passes), model.max_tokens), generators, device=model.device, dtype=torch.float64)
    rows = 2 * B if any(scale != 1 for scale in scales) else B
    start = condition.and_null() if rows > B else condition
    cache = model.new_cache(rows, N, prompt_length=condition.ids.shape[1])
    ids = torch.empty(B, N, dtype=torch.int64, device=model.device)
    known = 0 if prefix is None else take_prefix(prefix, ids, sizes, model.vocab_size)
    new, done, runs = ids.new_empty(rows, 0), 0, 0
    for step, size in enumerate(sizes):
        made = slice(done, done + size)
        for number, sampling in enumerate(passes[: 1 if step == 0 or done < known else len(passes)]):
            again = ids[:, made].repeat(rows // B, 1)
            logits = model.look_again(again, cache=cache) if number else model(new, start, cache=cache)
            start, runs = None, runs + 1
            if done < known:
                continue
            if rows > B:
                conditional, unconditional = logits.float().chunk(2)
                scale = scales[step]
                logits = conditional if scale == 1 else unconditional + scale * (conditional - unconditional)
            ids[:, made] = sample(warp(logits, sampling).softmax(-1), uniforms[:, number, made])
        new, done = ids[:, made].repeat(rows // B, 1), done + size
        if on_step is not None:
            on_step(step, ids[:, :done])
    ids.sum().item()  # wait for the device, so that seconds means something
    return VisualTokens.from_ids(ids, model.layout), GenerationStats(B, B * (N - known), runs, time.perf_counter() - began)


def narrowing(sampling: SamplingConfig, num_passes: int, vocab_size: int) -> tuple[SamplingConfig, ...]:
    """How each of `num_passes` passes over a scale draws: as asked, then from a twelfth of the codes, at last the most probable.

    Of top_k 1200, top_p 0.8 and three passes this makes the published setting. vocab_size: K, where sampling has no top_k.
    Raises ValueError: no pass.
    """
    if num_passes < 1:
        raise ValueError(f"num_steps={num_passes} but every scale needs at least one pass")
    narrower = replace(sampling, top_k=max((sampling.top_k or vocab_size) // 12, 1))
    return (sampling, *[narrower] * (num_passes - 2), SamplingConfig(temperature=0))[:num_passes]
