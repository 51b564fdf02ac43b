"""ZipAR: the rows of a picture overlap, several tokens a pass, without a drafter.

He et al. 2024, arXiv 2412.04062, sections 3.2 and 3.3. Row r + 1 starts when row r has `window` tokens; all rows under way grow by one
token a pass. The first token of a row is predicted from the slot in front of it, the last of the row above; while that is unknown the
latest token two rows up stands in for it, and the slot is read again once it is known (`zipar_passes` is the schedule). Lossy: a row does
not see the end of the row above. 2 W + (H - 2) window passes in place of W H.

The window may adapt (`adaptive_rows`): then `window` is the least that a row waits for, and an image's rows start when they can.
B images, R rows of the batch (2B under guidance), W x H tokens, N = W H.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.adaptive_rows import adaptive_passes
from vistok.decoding.generate import WORTH_PACKING, GenerationStats
from vistok.decoding.sampling import SamplingConfig, sample
from vistok.decoding.speculative import check_target, read_prefix
from vistok.decoding.state import DecodingState
from vistok.decoding.uniforms import Uniforms
from vistok.decoding.zipar import Feed, zipar_passes
from vistok.layers.packed import packed_linears
from vistok.layers.placement import PlacedCache, Placement
from vistok.tokens import VisualTokens


@dataclass(frozen=True)
class RowStats(GenerationStats):
    """Of rows that overlap. Stats of several batches add up."""

    image_passes: int = 0
    """Passes that each image took part in, over all images, without the one that reads the condition."""

    def __add__(self, other: "RowStats") -> "RowStats":
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@torch.no_grad()
def generate_rows(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    window: int,
    window_adapts: bool = False,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, RowStats]:
    """Tokens of B images on a grid, one image a generator. window: W is the plain loop; fewer is quicker and loses more.

    window_adapts: a row also waits until its first token stays the same as the row above grows (`adaptive_rows`); slower, loses less.
    on_step: called with the number of the pass and the ids so far [B, N], -1 where there are none. The other arguments are as for
    `generate`, and so are the uniforms: token n is drawn by uniform n of its image. A window that adapts takes one integer more from each
    generator, for the stream that its checks are drawn from.
    Raises ValueError: the generator has no grid, or does not predict next tokens; window is not in [1, W].
    """
    check_target(model)
    if model.layout.kind != "grid" or model.max_tokens != model.layout.num_tokens:
        raise ValueError("only a whole grid of tokens has rows that can overlap")
    h, w = model.layout.shape
    passes = [[Feed(n, n, n + 1)] for n in range(w - 1)] + zipar_passes(w, h, window)
    B, N, sampling = len(generators), model.max_tokens, sampling or SamplingConfig()
    began = time.perf_counter()
    uniforms = rng.rand((N,), generators, device=model.device, dtype=torch.float64)
    stream = Uniforms.from_generators(generators, model.device) if window_adapts else None
    # one slot more than there are tokens: inputs of images that have nothing to read stand there
    state = read_prefix(model, condition, B, num_tokens=N, margin=1, sampling=sampling, guidance_scale=guidance_scale, stream=stream)
    ids = torch.full((B, N), -1, dtype=torch.int64, device=model.device)
    ids[:, :1] = sample(state.law(model.head(state.features[:, None]), ids.new_zeros(B, 1)), uniforms[:, :1])
    run = adaptive_passes(state, ids, uniforms, window) if window_adapts else _fixed_passes(state, ids, uniforms, passes)
    number = image_passes = 0
    with packed_linears(model, state.num_rows) if len(passes) >= WORTH_PACKING else nullcontext():
        for number, growing in enumerate(run, 1):
            image_passes += growing
            if on_step is not None:
                on_step(number - 1, ids)
    stats = RowStats(B, B * N, 1 + number, time.perf_counter() - began, image_passes=int(image_passes))  # waits for the device
    return VisualTokens.from_ids(ids, model.layout), stats


def _fixed_passes(state: DecodingState, ids: Tensor, uniforms: Tensor, passes: list[list[Feed]]):
    """Run the passes of a schedule, which write into ids [B, N]; yields B after each, the images that grew."""
    model, cache = state.model, state.cache
    filled = torch.zeros(ids.shape[1], dtype=torch.bool, device=ids.device)
    least = [min((feed.target for feed in feeds if feed.target is not None), default=ids.shape[1]) for feeds in passes]
    least = list(accumulate(reversed(least), min))[::-1]  # the first token that is decided from a pass on
    for feeds, first in zip(passes, least):
        state.span = (first, ids.shape[1])
        state.end_guidance()
        slots = [feed.slot for feed in feeds]
        filled[slots] = True
        known = state.rows(ids[:, [feed.source for feed in feeds]])
        features = model.extend(known, _placement(cache, slots, filled, state.num_rows), cache)
        asked = [i for i, feed in enumerate(feeds) if feed.target is not None]
        targets = [feeds[i].target for i in asked]
        where = torch.tensor([targets], device=ids.device).expand(len(ids), -1)
        ids[:, targets] = sample(state.law(model.head(features[:, asked]), where), uniforms[:, targets])
        yield len(ids)


def _placement(cache: PlacedCache, slots: list[int], filled: Tensor, rows: int) -> Placement:
    """Inputs at places `slots` of the picture; each sees the condition and what is filled [N] up to its own place in raster order."""
    device, P = cache.keys.device, cache.prefix_length
    places = torch.tensor(slots, device=device)
    sees = filled & (torch.arange(len(filled), device=device) <= places[:, None])  # [M, N]
    condition = sees.new_ones(rows, P) if cache.visible is None else cache.visible
    mask = torch.cat([condition[:, None].expand(-1, len(slots), -1), sees.expand(rows, -1, -1)], dim=2)
    return Placement(places.expand(rows, -1), P + places.expand(rows, -1), mask[:, None])
