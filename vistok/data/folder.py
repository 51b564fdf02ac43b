"""A folder of images as a data set: flat or one folder a class, captions beside the images, a split that never overlaps."""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vistok.data.base import BadImages, ImageDataset, fraction_of
from vistok.image import SUFFIXES, displayed, open_image, resize_crop, to_uint8

logger = logging.getLogger("vistok")

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
CAPTION_KEYS = ("text", "caption")
TEST_FOLDERS = ("test", "val")
SPLITS = ("train", "test", "all")


@dataclass
class Listing:
    """What a folder holds: relative POSIX paths, sorted; bytes that are not UTF-8 kept as surrogates."""

    images: list[str] = field(default_factory=list)
    caption_files: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    bad: BadImages = field(default_factory=BadImages)


def list_folder(root: str | os.PathLike) -> Listing:
    """Find the images below a folder, the same on every machine.

    Files count by suffix, in any case; names that begin with a dot are left out. Symbolic links are followed, each folder is visited
    once, so loops end. A folder that may not be listed is reported in `bad`.
    """
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    pending = [""]
    root = os.fspath(root)
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                logger.info("%s: visited before under another name, left out", displayed(path))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            listing.bad.add(displayed(folder or root), f"folder cannot be listed: {error.strerror}")
            continue
        for name, is_folder in found:
            relative = f"{folder}/{name}" if folder else name
            lower = name.lower()
            if is_folder:
                continue
            if lower.endswith(SUFFIXES):
                listing.images.append(relative)
            elif lower in CAPTION_FILES:
                listing.caption_files.append(relative)
            elif lower.endswith(".txt"):
                listing.texts.add(relative)
        pending += reversed([f"{folder}/{name}" if folder else name for name, is_folder in found if is_folder])
    listing.images.sort()
    return listing


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


class ImageFolder(ImageDataset):
    """Images below a folder.

    image_size: what each image is resized and cropped to. split: "train", "test" or "all".
    Where the folder holds `train` and `test` (or `val`) folders, those are the splits. Otherwise `held_out` of the images, chosen by a
    hash of their relative path, are the test split: adding files never moves an image from one split to the other.
    Classes are the names of the first-level folders (of all splits together); images directly in the folder have label -1.
    Captions come from `captions.jsonl` or `metadata.jsonl` (lines with "file_name" and "text" or "caption"), or from a .txt file beside the
    image; else the class name; else "".
    Raises FileNotFoundError: no such folder. ValueError: no images in it, or an unreadable caption file.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        image_size: int | tuple[int, int],
        split: str = "train",
        on_bad_image: str = "skip",
        held_out: float = 0.1,
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} but a folder has {', '.join(SPLITS)}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out} must lie in [0, 1)")
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{displayed(self.folder)} is not a folder")
        listing = list_folder(self.folder)
        if not listing.images:
            hint = "".join(f"; {name}: {reason}" for name, reason in listing.bad.reasons.items())
            raise ValueError(f"{displayed(self.folder)} holds no images; allowed suffixes are {' '.join(SUFFIXES)}{hint}")
        parts = _split_folders(listing.images)
        kept = [path for path in listing.images if split == "all" or _split_of(path, parts, held_out) == split]
        if not kept:
            raise ValueError(f"{displayed(self.folder)} holds {len(listing.images)} images, none of them in the split {split!r}")
        inside = {path: _without_part(path, parts) for path in listing.images}
        classes = sorted({name.split("/", 1)[0] for name in inside.values() if "/" in name})
        numbers = {name: i for i, name in enumerate(classes)}
        captions = read_captions(self.folder, listing)
        labels = [numbers[inside[path].split("/", 1)[0]] if "/" in inside[path] else -1 for path in kept]
        classes = [displayed(name) for name in classes]
        self.paths = kept
        super().__init__(
            image_size=image_size,
            names=[displayed(path) for path in kept],
            labels=labels,
            captions=[captions.get(path, classes[label] if label >= 0 else "") for path, label in zip(kept, labels, strict=True)],
            classes=classes,
            on_bad_image=on_bad_image,
        )
        if len(listing.bad) and on_bad_image == "error":
            raise ValueError("; ".join(f"{name}: {reason}" for name, reason in listing.bad.reasons.items()))
        self.bad_images = listing.bad

    def decode(self, index: int) -> Tensor:
        return to_uint8(resize_crop(open_image(os.path.join(self.folder, self.paths[index])), self.image_size))


def _split_folders(images: list[str]) -> tuple[str, str] | None:
    """(train folder, test folder) when both hold images."""
    first_level = {path.split("/", 1)[0] for path in images if "/" in path}
    test = next((name for name in TEST_FOLDERS if name in first_level), None)
    return ("train", test) if "train" in first_level and test else None


def _split_of(path: str, parts: tuple[str, str] | None, held_out: float) -> str | None:
    if parts is None:
        return "test" if fraction_of(path) < held_out else "train"
    return {parts[0]: "train", parts[1]: "test"}.get(path.split("/", 1)[0])


def _without_part(path: str, parts: tuple[str, str] | None) -> str:
    first, _, rest = path.partition("/")
    return rest if parts and first in parts else path


def read_captions(folder: Path, listing: Listing) -> dict[str, str]:
    """Caption of each image that has one, by relative path; a .jsonl line wins over a .txt file."""
    captions, images = {}, set(listing.images)
    if listing.texts:
        for path in listing.images:
            text = os.path.splitext(path)[0] + ".txt"
            if text in listing.texts:
                captions[path] = _read_text(folder / text).strip()
    for file in listing.caption_files:
        base, unknown = os.path.dirname(file), 0
        for number, line in enumerate(_read_text(folder / file).splitlines(), start=1):
            if line.strip():
                name, caption = _caption_line(line, f"{displayed(folder / file)}, line {number}")
                path = f"{base}/{name}" if base else name
                unknown += path not in images
                captions[path] = caption
        if unknown:
            logger.warning("%s: %d captions name no image", displayed(folder / file), unknown)
    return captions


def _caption_line(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        caption = next(row[key] for key in CAPTION_KEYS if key in row)
        if not isinstance(row["file_name"], str) or not isinstance(caption, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}, got {line[:80]!r}') from error
    return row["file_name"], caption


def _read_text(path: Path) -> str:
    if not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{displayed(path)}: not a regular file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{displayed(path)}: cannot be read as UTF-8 text: {error}") from error
