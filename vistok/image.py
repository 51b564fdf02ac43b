"""Images in and out: open any file safely, one conversion to tensors and back, resize and crop, grids and strips with titles.

Inside the library an image batch is a float tensor [B, 3, H, W] in [-1, 1]. What a file of each kind becomes is a decision, not an
accident of the decoder (docs/data.md has the table): 16-bit grey is scaled, transparency is laid on white, EXIF orientation is applied,
the first frame of an animation is taken, and a file that declares too many pixels is refused before a pixel is decoded.
"""

import errno
import io
import os
import stat
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

MAX_PIXELS = 64_000_000
"""Largest image that is decoded (64 megapixels: 192 MB as RGB)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened, whatever the file is called. Others (EPS runs an interpreter, PSD, PDF ...) are refused."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""File names that count as images in a folder, in any case."""

# EXIF tag 274 -> what undoes it (EXIF 2.32, section 4.6.4)
ORIENTATION_TAG = 274
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(ValueError):
    """A file that cannot be used as an image; `name` is the file, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # lets the error cross process borders: exceptions pickle their args, not their __init__ arguments
        return type(self), (self.name, self.reason)


def displayed(path: str | bytes | os.PathLike) -> str:
    """A path as text that can be printed and written as UTF-8; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_image(source: str | bytes | os.PathLike | io.BufferedIOBase, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image file as upright 8-bit RGB.

    source: a path, or a binary file object. max_pixels: refuse larger images before decoding them.
    16-bit grey is scaled to 8 bits; transparency is composited on white; palette and CMYK are converted; of an animation the first frame is
    taken; EXIF orientation is applied (unreadable EXIF counts as upright). Colour profiles are ignored.
    Raises BrokenImageError: missing, unreadable, empty, truncated, not an image, too many pixels, or pixels without an agreed range
    (32-bit integers, floats); the message names the file and the reason.
    """
    is_path = isinstance(source, (str, bytes, os.PathLike))
    name = displayed(source) if is_path else str(getattr(source, "name", "image data"))
    try:
        if not is_path:
            return _decode(source, name, max_pixels)
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise BrokenImageError(name, "not a regular file")
        if status.st_size == 0:
            raise BrokenImageError(name, "empty file")
        with open(source, "rb") as file:
            return _decode(file, name, max_pixels)
    except (BrokenImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError(name, f"more than the {max_pixels} pixels allowed") from error
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError(name, f"not an image of a known format ({', '.join(FORMATS)})") from error
    except OSError as error:
        reasons = {errno.ENOENT: "no such file", errno.ELOOP: "symbolic link loop", errno.EACCES: "no permission to read"}
        raise BrokenImageError(name, reasons.get(error.errno, f"cannot be read: {error}")) from error
    except Exception as error:
        # decoders raise SyntaxError, struct.error, EOFError, zlib.error ... on damaged files: one type for the caller
        raise BrokenImageError(name, f"cannot be decoded: {type(error).__name__}: {error}") from error


def _decode(file: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BrokenImageError(name, f"{width} x {height} is more than the {max_pixels} pixels allowed")
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image, name)
        rgb = rgb.copy() if rgb is image else rgb
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels; the documented choice is upright
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert("RGB") clips at 255 instead of scaling: the mean of a 16-bit ramp comes out 254, not 127
        grey = np.asarray(image).astype(np.int64)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey = np.where(grey == transparent, 65535, grey)
        return Image.fromarray(((grey.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImageError(name, f"pixels of mode {image.mode!r} have no agreed range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"an image size must be positive, got {size}")
    return int(height), int(width)


def resize_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize the shorter side to the target (bilinear, antialiased) and crop the centre.

    size: pixels, one number or (height, width).
    Only the part that is kept is computed, so a 1 x 5,000 image costs no more than any other.
    """
    height, width = pair(size)
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)  # source pixels per target pixel
    crop_width, crop_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def to_uint8(image: Image.Image) -> Tensor:
    """PIL image -> [3, H, W] uint8."""
    return torch.from_numpy(np.array(_to_rgb(image, "image"), dtype=np.uint8)).permute(2, 0, 1).contiguous()


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image -> [3, H, W] float32 in [-1, 1]."""
    return from_uint8(to_uint8(image))


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] or [3, H, W] in [-1, 1] -> a list of PIL images; values outside are clamped, NaN is an error."""
    images = images.detach()
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinity")
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def load_images(images, size: int | tuple[int, int] | None = None) -> Tensor:
    """Anything a person calls images -> [B, 3, H, W] float32 in [-1, 1].

    images: one of, or a list of: a path; a PIL image; an array [H, W], [H, W, 3 or 4] or [B, H, W, 3 or 4], uint8 or float in [0, 1]; a
    tensor [3, H, W] or [B, 3, H, W], uint8 or float in [-1, 1].
    size: resize and crop to this (see resize_crop); needed when the images differ in size.
    Raises BrokenImageError for a bad file; ValueError for a wrong shape or range, or for sizes that differ.
    """
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise ValueError("no images were given")
    batches = [_load_one(item, size) for item in items]
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    if len(sizes) > 1:
        raise ValueError(f"the images differ in size ({sorted(sizes)}); pass size= to resize and crop them")
    devices = {batch.device for batch in batches}
    return torch.cat(batches) if len(devices) == 1 else torch.cat([batch.cpu() for batch in batches])


def _load_one(item, size: int | tuple[int, int] | None) -> Tensor:
    if isinstance(item, (str, bytes, os.PathLike)):
        item = open_image(item)
    if isinstance(item, Image.Image):
        item = _to_rgb(item, "image")  # before resizing: the colours of a palette cannot be mixed
        return to_tensor(item if size is None else resize_crop(item, size))[None]
    if isinstance(item, np.ndarray):
        return torch.cat([_load_one(picture, size) for picture in _from_array(item)])
    if isinstance(item, Tensor):
        return _from_tensor(item, size)
    raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(item).__name__}")


def _from_array(array: np.ndarray) -> list[Image.Image]:
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
            raise ValueError("a float array of images must lie in [0, 1]; tensors lie in [-1, 1]")
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array of images must be uint8 or float in [0, 1], got {array.dtype}")
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not is_one and not (array.ndim == 4 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an array of images is [H, W], [H, W, 3 or 4] or [B, H, W, 3 or 4], got {list(array.shape)}")
    array = array[None] if is_one else array
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def _from_tensor(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"a tensor of images is [3, H, W] or [B, 3, H, W], got {list(images.shape)}")
    images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
    largest = images.abs().max() if images.numel() else torch.zeros(())
    if not largest <= 2:  # also true for NaN; a decoder may overshoot 1 a little, 255 is another scale
        raise ValueError(f"a float tensor of images must lie in [-1, 1], its largest magnitude is {float(largest):.4g}")
    if size is None or tuple(images.shape[2:]) == pair(size):
        return images
    (height, width), (H, W) = pair(size), images.shape[2:]
    scale = min(H / height, W / width)
    crop_height, crop_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (H - crop_height) // 2, (W - crop_width) // 2
    images = images[:, :, top : top + crop_height, left : left + crop_width]
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def _pictures(images: Tensor | Sequence) -> list[Image.Image]:
    if isinstance(images, Tensor):
        return to_pil(images)
    return [picture for item in images for picture in (to_pil(item) if isinstance(item, Tensor) else [item])]


def make_grid(images: Tensor | Sequence, *, columns: int | None = None, padding: int = 2) -> Image.Image:
    """Images side by side, row by row, on white.

    images: [B, 3, H, W] in [-1, 1] or a list of PIL images. columns: as square as possible when not given. padding: pixels between images.
    """
    pictures = _pictures(images)
    if not pictures:
        raise ValueError("a grid needs at least one image")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    width, height = max(p.width for p in pictures) + padding, max(p.height for p in pictures) + padding
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width + padding, rows * height + padding), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (padding + i % columns * width, padding + i // columns * height))
    return grid


def make_strip(
    rows: Sequence[Tensor | Sequence],
    *,
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    padding: int = 4,
    font_size: int = 14,
) -> Image.Image:
    """A table of images with titles: one row per entry of `rows`, as in "original, 1, 4, 16, 64 tokens".

    rows: each a [B, 3, H, W] tensor in [-1, 1] or a list of PIL images. Columns are as wide as their widest image or title.
    """
    table = [_pictures(row) for row in rows]
    if not any(table):
        raise ValueError("a strip needs at least one image")
    num_columns = max(len(row) for row in table)
    for titles, expected, what in ((column_titles, num_columns, "column"), (row_titles, len(table), "row")):
        if titles is not None and len(titles) != expected:
            raise ValueError(f"{len(titles)} {what} titles for {expected} {what}s")
    font = ImageFont.load_default(size=font_size)

    def text_width(text: str) -> int:
        return int(np.ceil(font.getlength(text)))

    widths = [max(row[j].width for row in table if j < len(row)) for j in range(num_columns)]
    if column_titles is not None:
        widths = [max(width, text_width(title)) for width, title in zip(widths, column_titles, strict=True)]
    heights = [max(max((picture.height for picture in row), default=0), font_size) for row in table]
    left = max(map(text_width, row_titles)) + 2 * padding if row_titles else padding
    top = font_size + 2 * padding + 2 if column_titles is not None else padding
    strip = Image.new("RGB", (left + sum(widths) + padding * num_columns, top + sum(heights) + padding * len(table)), "white")
    draw = ImageDraw.Draw(strip)
    y = top
    for i, row in enumerate(table):
        if row_titles:
            draw.text((padding, y + heights[i] / 2), row_titles[i], fill="black", font=font, anchor="lm")
        x = left
        for j, width in enumerate(widths):
            if i == 0 and column_titles is not None:
                draw.text((x + width / 2, padding), column_titles[j], fill="black", font=font, anchor="ma")
            if j < len(row):
                strip.paste(row[j], (x + (width - row[j].width) // 2, y + (heights[i] - row[j].height) // 2))
            x += width + padding
        y += heights[i] + padding
    return strip
