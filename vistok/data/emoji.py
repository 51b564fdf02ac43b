"""The bundled set: 1,636 emoji in two styles (Noto and Twemoji), 64 x 64 pixels, with names, categories and two ways to hold some out.

Captions are "style: name" ("noto: red apple"); classes are the 8 categories, or the 95 subcategories.
Splits: "train" / "test" hold out about a tenth of the **names**, so a test emoji is unseen in every style; "composition-train" /
"composition-test" hold out a tenth of the (name, style) pairs, each name staying in the other style: is a known thing drawn in a known
style? scripts/build_emoji.py built it; the licences are beside it.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.base import ImageDataset
from vistok.image import open_image, resize_crop, to_uint8

FOLDER = Path(__file__).with_name("emoji")
SPLITS = ("train", "test", "all", "composition-train", "composition-test")


@lru_cache(maxsize=1)
def emoji_table() -> dict:
    """The metadata: tile size, styles, and one entry an emoji."""
    return json.loads((FOLDER / "emoji.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=2)
def _atlas(style: str) -> np.ndarray:
    return np.asarray(open_image(FOLDER / f"{style}.webp"))


class EmojiDataset(ImageDataset):
    """The bundled emoji of one split.

    style: "noto", "twemoji" or None for both (each emoji then appears twice, once a style).
    label: "category" (8 classes) or "subcategory" (95).
    entries: one dictionary an image with name, style, category, subcategory and code points.
    """

    def __init__(self, *, image_size: int | tuple[int, int] = 64, split: str = "train", style: str | None = None, label: str = "category"):
        table = emoji_table()
        if style is not None and style not in table["styles"]:
            raise ValueError(f"style={style!r} but the emoji set has {', '.join(table['styles'])}")
        if split not in SPLITS:
            raise ValueError(f"split={split!r} but the emoji set has {', '.join(SPLITS)}")
        if label not in ("category", "subcategory"):
            raise ValueError(f"label={label!r} but an emoji is labelled by category or subcategory")
        classes = sorted({emoji[label] for emoji in table["emoji"]})
        numbers = {name: i for i, name in enumerate(classes)}
        styles = table["styles"] if style is None else [style]
        self.entries = [{**emoji, "style": s} for emoji in table["emoji"] for s in styles if _belongs(emoji, s, split)]
        self.tile = table["tile"]
        names = [f"{entry['style']}: {entry['name']}" for entry in self.entries]
        labels = [numbers[entry[label]] for entry in self.entries]
        super().__init__(image_size=image_size, names=names, labels=labels, captions=names, classes=classes, on_bad_image="error")

    def decode(self, index: int) -> Tensor:
        entry, tile = self.entries[index], self.tile
        top, left = entry["row"] * tile, entry["column"] * tile
        pixels = _atlas(entry["style"])[top : top + tile, left : left + tile]
        if self.image_size == (tile, tile):
            return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
        return to_uint8(resize_crop(Image.fromarray(pixels), self.image_size))


def _belongs(emoji: dict, style: str, split: str) -> bool:
    if split == "all":
        return True
    if split.startswith("composition"):
        return (emoji["held_out_style"] == style) == (split == "composition-test")
    return emoji["split"] == split
