"""ZipAR's adaptive window: a row starts once its first token would be accepted with what is visible of the row above.

He et al. 2024, arXiv 2412.04062, section 3.3. While row r has k tokens, `window` or more, p_k is the law of row r + 1's first token as
predicted from the slot in front of it, and every pass, k grown by one, checks the token x guessed in the pass before:

    k = window        guess x ~ p_k
    k > window        keep x if u < p_k(x) / p_(k-1)(x): row r + 1 starts with x; else x ~ norm([p_k - p_(k-1)]+), and the next pass checks
    k = W             row r is whole, the slot in front holds its true last token, and the row starts whatever becomes of the check

That is the standard rule of speculative decoding with p_(k-1) for the draft law, so a guess has law p_k after each check; what is lost is
that of those guesses the ones which pass are taken. Rows below the first two tokens of a picture behave as in `rows`: the first row is
whole before the second starts, a stand-in fills an unknown slot, and its token is read once it is known. `window` W is the plain loop.

Each image has rows of its own pace and does not wait for the others. Numbers: token n is drawn by uniform n of its image, as in the plain
loop, a guess by that of its place; the checks draw two a pass, used or not, from the image's own stream.
B images, R rows of the batch (2B under guidance), W x H tokens, N = W H, M inputs of a pass, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.accept.rounds import Position, decide_rows, verify
from vistok.decoding.sampling import sample
from vistok.decoding.state import DecodingState
from vistok.layers.placement import Placement


def recheck(guess: Tensor, old: Tensor, new: Tensor, coins: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Guesses [B] of laws old [B, V], checked against laws new [B, V]: whether each is kept [B], and the guesses [B] after the check.

    coins, uniforms: [B] on [0, 1): one to keep, one to draw anew. The guesses returned have law new, if those given have law old.
    """
    at = Position(new, guess[:, None], old, "with_replacement")
    accepted, law = decide_rows(verify(at), coins[:, None])
    return accepted >= 0, torch.where(accepted >= 0, guess, sample(law, uniforms))


def adaptive_passes(state: DecodingState, ids: Tensor, uniforms: Tensor, window: int) -> Iterator[Tensor]:
    """Run passes, which write into ids [B, N], until all is drawn; yields after each how many images grew.

    ids: the first token is there, -1 elsewhere. uniforms: [B, N]. state: as `read_prefix` left it, with a margin of one slot and a stream.
    """
    model, cache = state.model, state.cache
    (B, N), (H, W), device = ids.shape, model.layout.shape, ids.device
    rows, every = torch.arange(H, device=device), torch.arange(B, device=device)
    begins = rows * W
    known = ids.new_zeros(B, H)  # tokens of each row
    known[:, 0] = 1
    is_waiting = torch.zeros(B, H, dtype=torch.bool, device=device)  # the row started from a stand-in that is still in front of it
    filled = torch.zeros(B, N + 1, dtype=torch.bool, device=device)
    guess, guess_law = ids.new_full((B,), -1), None
    while True:
        above, two_above = F.pad(known, (1, 0))[:, :H], F.pad(known, (2, 0))[:, :H]
        is_whole = above == W
        ripe = (is_whole | (above >= window) & (rows > 1)) & (rows > 0)
        grows = (known > 0) & (known < W)
        asks = ripe & (known == 0)  # one row of an image at most: the one below has nothing above it
        settles = is_waiting & is_whole
        # inputs that continue a row, then those in front of one: a stand-in, or the true end of the row above
        front = begins - 1
        source = torch.where(is_whole, front, begins - 2 * W + two_above - 1)
        slots = torch.cat([begins + known - 1, front.expand(B, H)], 1)
        sources, targets = torch.cat([begins + known - 1, source], 1), torch.cat([begins + known, begins.expand(B, H)], 1)
        has_input, has_target = torch.cat([grows, asks | settles], 1), torch.cat([grows, asks], 1)
        undecided = torch.where(known < W, begins + known, N).amin()
        most, growing, first = torch.stack([has_input.sum(1).amax(), has_target.any(1).sum(), undecided]).tolist()
        if not growing:
            return
        state.span = (first, N)
        state.end_guidance()
        # images with fewer inputs than the one with the most fill up with some that stand behind the picture, where nothing looks
        order = has_input.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        is_real, is_asked = has_input.gather(1, order), has_target.gather(1, order)
        slots = torch.where(is_real, slots.gather(1, order), N)
        sources, targets = sources.gather(1, order).clamp(0, N - 1), targets.gather(1, order).clamp(max=N - 1)
        filled.scatter_(1, slots, True)
        features = model.extend(state.rows(ids.gather(1, sources).clamp(min=0)), _placement(state, slots, filled), cache)
        law = state.law(model.head(features), targets)  # [B, M, V]
        tokens = sample(law, uniforms.gather(1, targets))

        coins = state.uniforms(2)
        is_front = is_asked & (order >= H)
        has_asked, column = is_front.any(1), is_front.int().argmax(1)
        now, drawn = law[every, column], tokens[every, column]
        had_guess = guess >= 0
        if guess_law is None:
            guess_law = torch.zeros_like(now)
        kept, checked = recheck(guess, guess_law, now, *coins.unbind(1))
        guessed = torch.where(had_guess, checked, drawn)
        row = (order[every, column] - H).clamp(min=0)
        ends = is_whole[every, row]
        starts = has_asked & (ends | had_guess & kept)
        guess_law = torch.where(has_asked[:, None], now, guess_law)
        guess = torch.where(starts | ~has_asked, -1, guessed)

        is_written = is_asked & ~is_front
        is_written[every, column] |= starts
        tokens = torch.where(is_front, guessed[:, None], tokens)
        beyond = F.pad(ids, (0, 1))
        ids.copy_(beyond.scatter_(1, torch.where(is_written, targets, N), tokens)[:, :N])
        known = known + grows.long() + (starts[:, None] & asks).long()
        is_waiting = (is_waiting & ~settles) | (starts & ~ends)[:, None] & asks
        yield growing


def _placement(state: DecodingState, slots: Tensor, filled: Tensor) -> Placement:
    """Inputs at places slots [B, M]; each sees the condition and what is filled [B, N + 1] up to its own place in raster order."""
    cache, P = state.cache, state.cache.prefix_length
    sees = filled[:, None] & (torch.arange(filled.shape[1], device=slots.device) <= slots[..., None])  # [B, M, N + 1]
    sees, slots = state.rows(sees), state.rows(slots)
    condition = sees.new_ones(len(slots), P) if cache.visible is None else cache.visible
    mask = torch.cat([condition[:, None].expand(-1, slots.shape[1], -1), sees], dim=2)
    return Placement(slots, P + slots, mask[:, None])
