"""Every class of image file has one decided result; conversions are exact; strips and grids have the right size."""

import io
import os
import pickle
import resource
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.image import (
    BrokenImageError,
    from_uint8,
    load_images,
    make_grid,
    make_strip,
    open_image,
    resize_crop,
    to_pil,
    to_tensor,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_truncated_files_of_every_format_are_broken(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "ppm"):
        whole = tmp_path / f"whole.{suffix}"
        noise.save(whole)
        assert open_image(whole).size == (32, 32)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(BrokenImageError) as error:
            open_image(cut)
        assert str(cut) in str(error.value) and error.value.reason


def test_files_cut_anywhere_are_whole_or_raise_the_typed_error():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data, broken = buffer.getvalue(), 0
    for length in range(0, len(data), 3):
        try:  # only checksums and end markers may be missing from a file that opens
            assert np.array_equal(np.asarray(open_image(io.BytesIO(data[:length]))), pixels)
        except BrokenImageError:
            broken += 1
    assert broken > 0.9 * len(range(0, len(data), 3))


@pytest.mark.parametrize("content, reason", [(b"", "empty file"), (b"just some text\n" * 20, "not an image of a known format")])
def test_empty_and_text_files_say_so(tmp_path, content, reason):
    path = tmp_path / "not.png"
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=reason):
        open_image(path)


def test_postscript_is_refused(tmp_path):
    path = tmp_path / "program.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(BrokenImageError, match="known format"):
        open_image(path)


def test_tiny_and_thin_images_become_any_size(tmp_path):
    for size in ((1, 1), (1, 5000), (5000, 1)):
        path = tmp_path / "thin.png"
        Image.new("RGB", size, RED).save(path)
        image = open_image(path)
        assert image.size == size
        assert to_tensor(resize_crop(image, 64)).shape == (3, 64, 64)
        assert resize_crop(image, (8, 16)).getpixel((0, 0)) == RED


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256 * 256).round().astype(np.uint16).reshape(256, 256)
    path = tmp_path / f"ramp.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(path)
    pixels = np.asarray(open_image(path)).astype(float)
    assert abs(pixels.mean() - 127.5) < 0.1
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 0.51


def test_float_and_32_bit_pixels_are_refused(tmp_path):
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)):
        Image.fromarray(array).save(tmp_path / "odd.tif")
        with pytest.raises(BrokenImageError, match="no agreed range"):
            open_image(tmp_path / "odd.tif")


def test_transparency_of_every_kind_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    Image.new("RGB", (4, 4), RED).save(tmp_path / "key.png", transparency=RED)
    for path in sorted(tmp_path.iterdir()):
        assert open_image(path).getpixel((0, 0)) == WHITE, path
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)


def test_palette_cmyk_and_bilevel_become_rgb(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == GREEN
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert open_image(tmp_path / "cmyk.tif").getpixel((0, 0)) == RED
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.subtract(open_image(tmp_path / "cmyk.jpg").getpixel((0, 0)), RED)).max() < 8
    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    assert open_image(tmp_path / "bilevel.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert open_image(tmp_path / f"moving.{suffix}").getpixel((4, 4)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = RED, GREEN, BLUE
    # the stored picture: what the orientation's definition turns into the upright one
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    assert np.array_equal(np.asarray(open_image(path)), upright)


def test_damaged_exif_counts_as_upright(tmp_path):
    path = tmp_path / "odd.jpg"
    Image.new("RGB", (8, 4), RED).save(path, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(path).size == (8, 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 9_500), (20_000, 10_000), (60_000, 60_000)])
def test_bombs_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with pytest.raises(BrokenImageError, match="pixels allowed"):
        open_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 100e6
    with pytest.raises(BrokenImageError, match="bomb.png"):
        open_image(path, max_pixels=1)


def test_links_that_loop_missing_files_and_pipes_are_broken_images(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("loop.png", "symbolic link loop"), ("absent.png", "no such file"), ("pipe.png", "not a regular file")):
        with pytest.raises(BrokenImageError, match=reason):
            open_image(tmp_path / name)
    with pytest.raises(BrokenImageError, match="not a regular file"):
        open_image(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_files_are_broken_images(tmp_path):
    path = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(path)
    path.chmod(0)
    with pytest.raises(BrokenImageError, match="no permission"):
        open_image(path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_not_utf8_open_and_are_printable(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(buffer, "PNG")
    with open(path, "wb") as file:
        file.write(buffer.getvalue())
    assert open_image(path).getpixel((0, 0)) == RED
    assert open_image(os.fsdecode(path)).getpixel((0, 0)) == RED
    with open(path, "wb"):
        pass
    with pytest.raises(BrokenImageError) as error:
        open_image(path)
    assert str(error.value).encode("utf-8").endswith(rb"caf\xe9.png: empty file")


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BrokenImageError("a.png", "empty file")))
    assert (error.name, error.reason, str(error)) == ("a.png", "empty file", "a.png: empty file")


def test_eight_bit_pixels_survive_the_way_to_a_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(to_pil(tensor)[0]), pixels)


def test_to_tensor_lays_transparency_on_white():
    assert to_tensor(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 1


def test_to_pil_clamps_and_refuses_nan():
    assert to_pil(torch.full((1, 3, 2, 2), 1.5))[0].getpixel((0, 0)) == WHITE
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        to_pil(torch.zeros(1, 4, 2, 2))


def test_resize_crop_keeps_the_centre_and_the_proportions():
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(Image.new("RGB", (100, 100), GREEN), (100, 0))
    assert resize_crop(wide, 50).crop((1, 0, 49, 50)).getcolors() == [(48 * 50, GREEN)]
    assert resize_crop(wide, (50, 150)).getpixel((10, 25)) == RED


def test_resize_crop_equals_resizing_all_and_cropping():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8))
    resized = noise.resize((100, 60), Image.Resampling.BILINEAR)
    difference = np.asarray(resize_crop(noise, 60)).astype(int) - np.asarray(resized.crop((20, 0, 80, 60)))
    assert np.abs(difference).max() <= 1


def test_resize_crop_is_antialiased():
    checkerboard = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(np.asarray(resize_crop(checkerboard, 16)).astype(float) - 127.5).max() < 10


def test_load_images_takes_files_pictures_arrays_and_tensors_alike(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    tensor = to_tensor(picture)
    same = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        picture,
        pixels,
        pixels / 255.0,
        tensor,
        tensor[None],
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    images = load_images(same)
    assert images.shape == (8, 3, 8, 8)
    assert (images - tensor).abs().max() < 1e-6
    assert torch.equal(load_images(picture)[0], tensor)
    assert load_images(np.stack([pixels, pixels])).shape == (2, 3, 8, 8)
    assert load_images(pixels[..., 0], size=4).shape == (1, 3, 4, 4)


def test_load_images_resizes_pictures_and_tensors_alike():
    ramp = np.linspace(0, 255, 40 * 60).reshape(40, 60, 1).repeat(3, axis=2).astype(np.uint8)
    picture = Image.fromarray(ramp)
    difference = load_images(picture, size=20) - load_images(to_tensor(picture), size=20)
    assert difference.abs().max() < 0.02


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "no images"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 8, 8)], "pass size="),
        (torch.full((3, 4, 4), 255.0), r"\[-1, 1\]"),
        (torch.full((3, 4, 4), float("nan")), r"\[-1, 1\]"),
        (torch.zeros(4, 4), r"\[3, H, W\]"),
        (np.full((4, 4, 3), 2.0), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"\[H, W\]"),
    ],
)
def test_load_images_says_what_is_wrong(images, message):
    with pytest.raises(ValueError, match=message):
        load_images(images)
    with pytest.raises(TypeError, match="a path, a PIL image"):
        load_images(3)


def test_grids_and_strips_have_the_expected_layout():
    images = from_uint8(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    grid = make_grid(images, columns=2, padding=2)
    assert grid.size == (2 * 10 + 2, 3 * 10 + 2)
    assert grid.getpixel((2, 2)) == (0, 0, 0) and grid.getpixel((0, 0)) == WHITE and grid.getpixel((15, 25)) == WHITE
    strip = make_strip([images[:2], to_pil(images[2:5])], column_titles=["a", "long title", "c"], row_titles=["first", "second"])
    assert strip.width > 3 * 8 + 60 and (0, 0, 0) in {strip.getpixel((x, strip.height - 11)) for x in range(strip.width)}
    with pytest.raises(ValueError, match="1 row titles for 2 rows"):
        make_strip([images, images], row_titles=["only one"])
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([])
