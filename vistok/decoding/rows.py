"""ZipAR: the rows of a picture overlap, several tokens a pass, without a drafter.

He et al. 2024, arXiv 2412.04062, section 3.2. Row r + 1 starts when row r has `window` tokens; all rows under way grow by one token a pass.
The first token of a row is predicted from the slot in front of it, the last of the row above; while that is unknown the latest token two
rows up stands in for it, and the slot is read again once it is known (`zipar_passes` is the schedule). Lossy: a row does not see the end of
the row above. 2 W + (H - 2) window passes in place of W H.

B images, R rows of the batch (2B under guidance), W x H tokens, N = W H.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.generate import WORTH_PACKING, GenerationStats
from vistok.decoding.sampling import SamplingConfig, sample
from vistok.decoding.speculative import check_target, read_prefix
from vistok.decoding.zipar import Feed, zipar_passes
from vistok.layers.packed import packed_linears
from vistok.layers.placement import PlacedCache, Placement
from vistok.tokens import VisualTokens


@torch.no_grad()
def generate_rows(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    window: int,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images on a grid, one image a generator. window: W is the plain loop; fewer is quicker and loses more.

    on_step: called with the number of the pass and the ids so far [B, N], -1 where there are none. The other arguments are as for
    `generate`, and so are the uniforms: token n is drawn by uniform n of its image.
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
    state = read_prefix(model, condition, B, num_tokens=N, margin=0, sampling=sampling, guidance_scale=guidance_scale, stream=None)
    cache, rows = state.cache, state.num_rows
    ids = torch.full((B, N), -1, dtype=torch.int64, device=model.device)
    filled = torch.zeros(N, dtype=torch.bool, device=model.device)

    def drawn(features: Tensor, targets: list[int]) -> Tensor:
        """Tokens [B, n] at places `targets` of features [R, n, D]."""
        where = torch.tensor([targets], device=ids.device).expand(B, -1)
        return sample(state.law(model.head(features), where), uniforms[:, targets])

    ids[:, :1] = drawn(state.features[:, None], [0])
    with packed_linears(model, rows) if len(passes) >= WORTH_PACKING else nullcontext():
        for number, feeds in enumerate(passes):
            slots = [feed.slot for feed in feeds]
            filled[slots] = True
            known = state.rows(ids[:, [feed.source for feed in feeds]])
            features = model.extend(known, _placement(cache, slots, filled, rows), cache)
            asked = [i for i, feed in enumerate(feeds) if feed.target is not None]
            targets = [feeds[i].target for i in asked]
            ids[:, targets] = drawn(features[:, asked], targets)
            if on_step is not None:
                on_step(number, ids)
    ids.sum().item()  # wait for the device, so that seconds means something
    stats = GenerationStats(B, B * N, 1 + len(passes), time.perf_counter() - began)
    return VisualTokens.from_ids(ids, model.layout), stats


def _placement(cache: PlacedCache, slots: list[int], filled: Tensor, rows: int) -> Placement:
    """Inputs at places `slots` of the picture; each sees the condition and what is filled [N] up to its own place in raster order."""
    device, P = cache.keys.device, cache.prefix_length
    places = torch.tensor(slots, device=device)
    sees = filled & (torch.arange(len(filled), device=device) <= places[:, None])  # [M, N]
    condition = sees.new_ones(rows, P) if cache.visible is None else cache.visible
    mask = torch.cat([condition[:, None].expand(-1, len(slots), -1), sees.expand(rows, -1, -1)], dim=2)
    return Placement(places.expand(rows, -1), P + places.expand(rows, -1), mask[:, None])
