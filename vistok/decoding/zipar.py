"""ZipAR: start a row of tokens before the row above has ended.

He et al. 2024, arXiv 2412.04062, section 3.2. Row r + 1 starts when row r has `window` tokens. Its first token is predicted from the slot
of row r's last token, which is filled with the latest token of row r - 1 until row r really ends; the true token is then fed once to that
slot. The first row is sequential. Lossy: a row does not see the end of the row above.

W x H tokens in raster order, s window; 2 W + (H - 2) s passes in place of W H.
"""

from typing import NamedTuple


class Feed(NamedTuple):
    """One input of one pass."""

    slot: int
    """Raster index the input stands at: its position and cache slot."""
    source: int
    """Raster index of the token that is fed; not the slot's own where that is unknown yet."""
    target: int | None
    """Raster index of the token it predicts; None where that is known already."""


def zipar_passes(width: int, height: int, window: int) -> list[list[Feed]]:
    """The passes after the first row, each a list of feeds by slot. Raises ValueError: window is not in [1, width], or no grid."""
    if width < 1 or height < 1:
        raise ValueError(f"a grid of {width} x {height} holds no tokens")
    if not 1 <= window <= width:
        raise ValueError(f"window={window} but a row has 1 to {width} tokens")
    known = [width] + [0] * (height - 1)  # tokens of each row
    is_waiting = [False] * height  # the row started from a stand-in, so the row above still owes its last token
    passes = []
    while known[-1] < width:
        feeds = []
        before = list(known)
        for row in range(1, height):
            begin = row * width
            if is_waiting[row] and before[row - 1] == width:
                feeds.append(Feed(begin - 1, begin - 1, None))
                is_waiting[row] = False
            if before[row] == 0 and before[row - 1] >= window:
                is_known = before[row - 1] == width
                feeds.append(Feed(begin - 1, begin - 1 if is_known else begin - 2 * width + before[row - 2] - 1, begin))
                is_waiting[row] = not is_known
                known[row] = 1
            elif 0 < before[row] < width:
                feeds.append(Feed(begin + before[row] - 1, begin + before[row] - 1, begin + before[row]))
                known[row] += 1
        passes.append(sorted(feeds))
    return passes
