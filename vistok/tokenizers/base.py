"""What tokenizers share: checks of what a caller hands them, whole grids of ids, and the shape of a convolutional pyramid."""

from typing import Any, Protocol

from torch import Tensor

from vistok.quantizers.base import check_range
from vistok.tokens import TokenLayout, VisualTokens


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
    check_range(ids, codebook_size)
    return ids


def grid_tokens(ids: Tensor, num_tokens: int | None) -> VisualTokens:
    """ids [B, h, w] as tokens in raster order; ValueError where num_tokens is not h w, for a grid has no shorter form."""
    h, w = ids.shape[1:]
    if num_tokens not in (None, h * w):
        raise ValueError(f"num_tokens={num_tokens} but this tokenizer makes exactly {h * w} tokens of such an image")
    return VisualTokens.from_ids(ids.flatten(1), TokenLayout("grid", (h, w)))


def grid_ids(tokens: VisualTokens, codebook_size: int, name: str) -> Tensor:
    """ids [B, h, w] of whole grids, or ValueError: a row is shorter than the grid, or as for `check_ids`."""
    h, w = tokens.layout.shape
    if bool((tokens.counts != h * w).any()):
        raise ValueError(f"this tokenizer decodes exactly {h * w} tokens, got {tokens.counts.tolist()}")
    return check_ids(tokens, codebook_size, name).unflatten(1, (h, w))


class PyramidFields(Protocol):
    """Fields of a config whose tokenizer is a convolutional pyramid around a codebook."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    norm_groups: int
    pixel_patch: int


def check_pyramid(config: PyramidFields) -> None:
    """Raise ValueError: widths that the group norms do not divide, or a number of blocks or pixels that cannot be built."""
    if not config.multipliers or any(config.width * factor % config.norm_groups for factor in (1, *config.multipliers)):
        wanted = f"a multiple of {config.norm_groups}"
        raise ValueError(f"width={config.width} times each of multipliers={config.multipliers} must be {wanted}")
    if config.pixel_patch < 1:
        raise ValueError(f"pixel_patch={config.pixel_patch} must be at least 1")
    if not 1 <= config.blocks <= 100:
        raise ValueError(f"blocks={config.blocks} but 1 to 100 are allowed")


def pyramid_shape(config: PyramidFields) -> dict[str, Any]:
    """Arguments of PyramidEncoder and PyramidDecoder: attention sits at the lowest resolution, as in VQGAN."""
    return {
        "width": config.width,
        "multipliers": config.multipliers,
        "blocks": config.blocks,
        "attention": (len(config.multipliers) - 1,),
        "norm_groups": config.norm_groups,
        "patch": config.pixel_patch,
    }
