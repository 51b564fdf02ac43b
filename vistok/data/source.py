"""One name for every source of images: a folder, the bundled emoji, a Hugging Face data set."""

import os

from vistok.data.base import ImageDataset
from vistok.data.emoji import EmojiDataset
from vistok.data.folder import ImageFolder
from vistok.data.hub import HubDataset
from vistok.data.scenes import ObjectScenes


def open_dataset(
    source: str | os.PathLike,
    *,
    image_size: int | tuple[int, int],
    split: str = "train",
    on_bad_image: str = "skip",
    held_out: float = 0.1,
    label: str = "category",
) -> ImageDataset:
    """Open a source of images.

    source: a folder; "emoji", "emoji:noto" or "emoji:twemoji" (bundled; a folder of that name is written "./emoji"); "scenes" (rendered
    scenes of 24 classes, `vistok.data.scenes`); "hf:PATH_OR_ID" (needs
    `pip install vistok[data]`). image_size: pixels each image is resized and cropped to, one number or (height, width).
    split: "train", "test" or "all"; the emoji also have "composition-train" and "composition-test", a Hugging Face set what it has.
    on_bad_image: "skip" counts a broken image in `bad_images` and puts the next good one in its place, "error" raises BrokenImageError.
    held_out: share of a folder's images in the test split when it has no split folders. label: what labels an emoji, "category" or
    "subcategory".
    """
    text = os.fspath(source)
    if isinstance(text, str) and (text == "emoji" or text.startswith("emoji:")):
        return EmojiDataset(image_size=image_size, split=split, style=text.partition(":")[2] or None, label=label)
    if text == "scenes":
        return ObjectScenes(image_size=image_size, split=split, num_scenes=20_000 if split == "train" else 1_000)
    if isinstance(text, str) and text.startswith("hf:"):
        return HubDataset(text.removeprefix("hf:"), image_size=image_size, split=split, on_bad_image=on_bad_image)
    return ImageFolder(text, image_size=image_size, split=split, on_bad_image=on_bad_image, held_out=held_out)
