"""Checks that every tokenizer makes of what a caller hands it."""

from torch import Tensor

from vistok.tokens import VisualTokens


def check_images(images: Tensor, *, multiple: int | tuple[int, int]) -> Tensor:
    """images [B, 3, H, W], or raise ValueError saying what is wrong; H and W must divide by `multiple`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor [B, 3, H, W] in [-1, 1], got {got}; vistok.load_images makes one from files")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}; vistok.load_images makes such a tensor")
    rows, columns = (multiple, multiple) if isinstance(multiple, int) else multiple
    H, W = images.shape[-2:]
    if H % rows or W % columns or not H or not W:
        raise ValueError(f"images are {H} x {W} but height must be a multiple of {rows} and width of {columns}")
    return images


def check_num_tokens(num_tokens: int | None, *, low: int, high: int, name: str) -> int:
    """num_tokens, `high` when None; ValueError outside [low, high]."""
    if num_tokens is None:
        return high
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not low <= num_tokens <= high:
        allowed = f"{low} to {high} tokens" if low != high else f"exactly {high} tokens"
        raise ValueError(f"num_tokens={num_tokens!r} but {name} makes {allowed}")
    return num_tokens


def check_ids(tokens: VisualTokens, codebook_size: int, name: str) -> Tensor:
    """ids [B, N] with padding as 0, or ValueError when there are none or one is outside [0, codebook_size)."""
    if tokens.ids is None:
        raise ValueError(f"{name} decodes ids, but these tokens hold continuous values")
    ids = tokens.ids.masked_fill(~tokens.mask, 0)
    if bool(((ids < 0) | (ids >= codebook_size)).any()):
        raise ValueError(f"ids must be in [0, {codebook_size}), got {int(ids.min())} to {int(ids.max())}")
    return ids
