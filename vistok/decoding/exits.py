"""Early exit: later tokens run fewer layers of the generator, without a drafter.

Del Corro et al. 2023 (SkipDecode), arXiv 2307.02628, section 3. Token t of N runs the first `warmup` layers and the last k(t):

    k(t) = round(most - (most - least) t / (N - 1))                       most >= least, the same for all images

k never rises, so every layer that a token runs was run for all tokens before it, and nothing is computed twice; all images of a batch run
the same layers. Lossy. B images, N tokens, L layers.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.draft import TreeShape
from vistok.decoding.generate import WORTH_PACKING, GenerationStats
from vistok.decoding.sampling import SamplingConfig, sample
from vistok.decoding.speculative import check_target, read_prefix
from vistok.layers.packed import packed_linears
from vistok.tokens import VisualTokens


def exit_layers(depth: int, num_tokens: int, *, warmup: int, most: int, least: int) -> list[tuple[int, ...]]:
    """The layers of each token. Raises ValueError: not 0 <= least <= most, or warmup and most are more than the layers there are."""
    if warmup < 0 or not 0 <= least <= most or not 1 <= warmup + most <= depth or warmup + least < 1:
        raise ValueError(
            f"warmup={warmup}, most={most}, least={least} do not fit {depth} layers: 0 <= least <= most, warmup + most <= depth"
        )
    last = max(num_tokens - 1, 1)
    kept = [round(most - (most - least) * t / last) for t in range(num_tokens)]
    return [(*range(warmup), *range(depth - k, depth)) for k in kept]


@torch.no_grad()
def generate_exits(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    least: int,
    most: int | None = None,
    warmup: int = 1,
    num_tokens: int | None = None,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images, one image a generator. warmup, most (all others by default), least: see `exit_layers`; the rest as for
    `generate`.

    Token n is drawn by uniform n of its image. Raises ValueError: the numbers do not fit, or the generator does not predict next tokens.
    """
    check_target(model)
    B, N, sampling = len(generators), model.max_tokens if num_tokens is None else num_tokens, sampling or SamplingConfig()
    if isinstance(N, bool) or not isinstance(N, int) or not 1 <= N <= model.max_tokens:
        raise ValueError(f"num_tokens={num_tokens!r} but this generator makes 1 to {model.max_tokens} tokens")
    depth = len(model.blocks)
    layers = exit_layers(depth, N, warmup=warmup, most=depth - warmup if most is None else most, least=least)
    began = time.perf_counter()
    uniforms = rng.rand((model.max_tokens,), generators, device=model.device, dtype=torch.float64)
    state = read_prefix(model, condition, B, num_tokens=N, margin=0, sampling=sampling, guidance_scale=guidance_scale, stream=None)
    alone, prefix, features = TreeShape.chain(0, model.device), state.cache.prefix_length, state.features[:, None]
    with packed_linears(model, state.num_rows) if N >= WORTH_PACKING else nullcontext():
        for n in range(N):
            if n:
                state.span = (n, n)
                state.end_guidance()
                root = state.rows(state.ids[:, n - 1 : n])
                placement = state.cache.behind(alone.depths, alone.ancestors, span=(prefix + n - 1, prefix + n - 1))
                features = model.extend(root, placement, state.cache, layers=layers[n])
                state.cache.lengths = state.cache.lengths + 1
            law = state.law(model.head(features), state.counts[:, None] + n)
            state.ids[:, n] = sample(law[:, 0], uniforms[:, n])
            if on_step is not None:
                on_step(n, state.ids[:, : n + 1])
    state.ids.sum().item()  # wait for the device, so that seconds means something
    return VisualTokens.from_ids(state.ids, model.layout), GenerationStats(B, B * N, N, time.perf_counter() - began)
