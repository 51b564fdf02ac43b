"""Rendered scenes with known contents: what the small classifier and the small vision-language model that ship with vistok learn from.

Two kinds, both functions of (seed, number) alone, 1 scene in about a quarter of a millisecond:

    object scene     one emoji of 20 to 32 px somewhere on a 48 px picture with a soft background and scattered letters; class: which emoji
    question scene   a 4 x 4 grid of 16 px cells on 64 px with emoji and a word of three letters, and questions about it:
                       at         what is at b3 ?            look a cell up by its place (row b, column 3)
                       relation   what is left of frog ?     find one thing, step aside, name another: two hops
                       count      how many fish ?            0 to 4
                       read       read the word ?            three letters, so an answer of several tokens

Emoji come in both bundled styles; letters are 5 x 7 bitmaps. Training scenes and test scenes are different numbers of the same law.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vistok.data.base import ImageDataset
from vistok.data.emoji import EmojiDataset

OBJECTS = (
    "cat face", "frog face", "pig face", "penguin", "octopus", "fish", "mushroom", "cactus", "red apple", "banana", "grapes", "lemon",
    "automobile", "rocket", "umbrella", "bell",
    "dog face", "tomato", "cherries", "bicycle", "snowman", "soccer ball", "gem stone", "key",
)  # fmt: skip
"""Emoji names: all are classes of the object scenes, the first NUM_ASKED are in the question scenes."""
NUM_ASKED = 16
WORDS = tuple(name.removeprefix("red ").removesuffix(" face").split()[0] for name in OBJECTS)
"""One word for each object, as questions and answers call it."""
LETTERS = "ACEHKLTX"
_BITMAPS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
}
GRID, CELL = 4, 16
EMPTY, FIRST_LETTER = 0, 1 + NUM_ASKED
NUM_CONTENTS = FIRST_LETTER + len(LETTERS)
"""What a cell can hold: 0 nothing, 1 to 16 an object, then a letter."""
NOTHING = "nothing"
PLACES = tuple(f"{row}{column}" for row in "abcd" for column in range(1, GRID + 1))
KINDS = ("at", "relation", "count", "read")
SHARES = {"at": 0.2, "relation": 0.4, "count": 0.25, "read": 0.15}
"""How often each kind is asked where all are: the harder, the more often."""
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TRAIN, TEST = 0, 1
"""The first part of the seed of a scene: training and test scenes never share one."""


@dataclass(frozen=True)
class Question:
    """kind: one of KINDS. text: ends with "?". answer: words with spaces between them."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class QuestionScene:
    """number: which scene of its split. image: [3, 64, 64] uint8. contents: [4, 4] int64 in [0, NUM_CONTENTS)."""

    number: int
    image: Tensor
    contents: np.ndarray
    questions: tuple[Question, ...]


def name_of(content: int) -> str:
    """The word for what a cell holds."""
    if content == EMPTY:
        return NOTHING
    return WORDS[content - 1] if content < FIRST_LETTER else LETTERS[content - FIRST_LETTER]


def vocabulary() -> list[str]:
    """Every word of the questions and answers."""
    numbers = [str(n) for n in range(5)]
    asked = "what is at left right of above below how many read the word ?".split()
    return [*asked, NOTHING, *numbers, *PLACES, *WORDS[:NUM_ASKED], *LETTERS]


def question_scene(number: int, *, split: int = TRAIN, num_questions: int = 6, kinds: tuple[str, ...] = KINDS) -> QuestionScene:
    """Scene `number` with questions of randomly drawn kinds."""
    random = np.random.default_rng((split, 1, number))
    contents = np.zeros((GRID, GRID), dtype=np.int64)
    row, column = int(random.integers(GRID)), int(random.integers(GRID - 2))
    contents[row, column : column + 3] = FIRST_LETTER + random.permutation(len(LETTERS))[:3]
    free = random.permutation(np.flatnonzero(contents.ravel() == EMPTY))
    repeats, types = int(random.integers(2, 5)), 1 + random.permutation(NUM_ASKED)
    placed = [types[0]] * repeats + list(types[1 : 9 - repeats])
    contents.ravel()[free[: len(placed)]] = placed
    image = np.full((GRID * CELL, GRID * CELL, 3), 255, dtype=np.uint8)
    for cell in np.flatnonzero(contents.ravel()):
        content, style = int(contents.ravel()[cell]), int(random.integers(2))
        tile = _object(content - 1, style, 14) if content < FIRST_LETTER else _letter(content - FIRST_LETTER, 2)
        top = cell // GRID * CELL + int(random.integers(CELL - tile.shape[0] + 1))
        left = cell % GRID * CELL + int(random.integers(CELL - tile.shape[1] + 1))
        _paste(image, tile, top, left)
    shares = np.cumsum([SHARES[kind] for kind in kinds])
    drawn = [kinds[int(np.searchsorted(shares, random.random() * shares[-1], side="right"))] for _ in range(num_questions)]
    questions = tuple(_ask(kind, contents, types, repeats, random) for kind in drawn)
    return QuestionScene(number, torch.from_numpy(image).permute(2, 0, 1).contiguous(), contents, questions)


def _ask(kind: str, contents: np.ndarray, types: np.ndarray, repeats: int, random: np.random.Generator) -> Question:
    if kind == "read":
        word = contents.ravel()[contents.ravel() >= FIRST_LETTER]
        return Question(kind, "read the word ?", " ".join(name_of(int(letter)) for letter in word))
    if kind == "count":
        draw = random.random()  # every count from 0 to 4 is the answer equally often
        if draw < 0.6:
            return Question(kind, f"how many {name_of(int(types[0]))} ?", str(repeats))
        once = draw < 0.8
        return Question(kind, f"how many {name_of(int(types[1 if once else -1]))} ?", str(int(once)))
    if kind == "at":
        cell = int(random.choice(np.flatnonzero(contents.ravel())))
        return Question(kind, f"what is at {PLACES[cell]} ?", name_of(int(contents.ravel()[cell])))
    pairs = [
        (anchor, direction, int(contents[r + down, c + right]))
        for (r, c), anchor in np.ndenumerate(contents)
        if EMPTY < anchor < FIRST_LETTER and anchor != types[0]
        for direction, (down, right) in DIRECTIONS.items()
        if 0 <= r + down < GRID and 0 <= c + right < GRID and contents[r + down, c + right] != EMPTY
    ]
    if not pairs:  # the unique objects of a rare scene have only empty neighbours
        return _ask("at", contents, types, repeats, random)
    anchor, direction, target = pairs[int(random.integers(len(pairs)))]
    return Question(kind, f"what is {direction} {name_of(int(anchor))} ?", name_of(target))


class ObjectScenes(ImageDataset):
    """Object scenes as a data set of 24 classes: `labels`, and `token_labels` that say which class covers each patch.

    split: "train" or "test". num_scenes: how many there are; scene i is the same however many.
    """

    def __init__(self, *, image_size: int | tuple[int, int] = 48, split: str = "train", num_scenes: int = 20_000):
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} but the scenes have train and test")
        self.split = TRAIN if split == "train" else TEST
        labels = [number % len(OBJECTS) for number in range(num_scenes)]
        names = [f"scene {number}" for number in range(num_scenes)]
        super().__init__(
            image_size=image_size, names=names, labels=labels, captions=[""] * num_scenes, classes=list(OBJECTS), on_bad_image="error"
        )

    def decode(self, index: int) -> Tensor:
        image = _object_scene(index, self.split)
        if self.image_size != (48, 48):
            image = np.asarray(Image.fromarray(image).resize(self.image_size[::-1], Image.Resampling.BICUBIC))
        return torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()

    def token_labels(self, indices: Tensor, grid: int) -> Tensor:
        """indices: [B]. Returns [B, grid * grid] int64: the class of the object under each patch, or the number of classes for none."""
        boxes = torch.tensor([_box(int(index), self.split) for index in indices]) * (grid / 48)  # top, left, side
        edge = torch.arange(grid)
        inside = [(edge + 0.5 >= start[:, None]) & (edge + 0.5 < (start + boxes[:, 2])[:, None]) for start in (boxes[:, 0], boxes[:, 1])]
        covered = inside[0][:, :, None] & inside[1][:, None, :]
        classes = torch.tensor([self.labels[int(index)] for index in indices])
        return torch.where(covered, classes[:, None, None], len(self.classes)).flatten(1)


def _object_scene(number: int, split: int) -> np.ndarray:
    """The picture [48, 48, 3] uint8."""
    random, size = np.random.default_rng((split, 3, number)), 48
    corners = random.uniform(150, 255, (2, 2, 3)).astype(np.uint8)  # a colour in each corner, smooth between them
    image = np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR))
    image = (image + random.normal(0, 6, (size, size, 1))).clip(0, 255).astype(np.uint8)
    for _ in range(int(random.integers(2, 6))):
        tile = _letter(int(random.integers(len(LETTERS))), 1 + int(random.integers(2)))
        _paste(image, tile, int(random.integers(size - tile.shape[0] + 1)), int(random.integers(size - tile.shape[1] + 1)))
    top, left, side = _box(number, split)
    _paste(image, _object(number % len(OBJECTS), int(random.integers(2)), side), top, left)
    return image


@lru_cache(maxsize=65_536)
def _box(number: int, split: int) -> tuple[int, int, int]:
    """(top, left, side) of the object of an object scene, in pixels."""
    random = np.random.default_rng((split, 2, number))
    side = int(random.integers(20, 33))
    return int(random.integers(48 - side + 1)), int(random.integers(48 - side + 1)), side


def _paste(image: np.ndarray, tile: np.ndarray, top: int, left: int) -> None:
    """Lay a tile [h, w, 4] with its opacity over a part of the image [H, W, 3], uint8."""
    h, w = tile.shape[:2]
    area, opacity = image[top : top + h, left : left + w], tile[..., 3:].astype(np.uint16)
    area[...] = (area * (255 - opacity) + tile[..., :3] * opacity + 127) // 255


@cache
def _object(number: int, style: int, side: int) -> np.ndarray:
    """An emoji of OBJECTS as [side, side, 4] uint8; the white around it, not the white in it, is transparent."""
    pixels = _emoji()[number, style]
    surface = Image.fromarray(np.pad((pixels.min(axis=2) > 247).astype(np.uint8), 1, constant_values=1)).copy()
    ImageDraw.floodfill(surface, (0, 0), 2)
    opacity = np.where(np.asarray(surface)[1:-1, 1:-1] == 2, 0, 255).astype(np.uint8)
    tile = Image.fromarray(np.dstack([pixels, opacity]))
    return np.asarray(tile.resize((side, side), Image.Resampling.BICUBIC))


@lru_cache(maxsize=1)
def _emoji() -> np.ndarray:
    """[24, 2 styles, 64, 64, 3] uint8."""
    data = EmojiDataset(split="all")
    place = {(entry["name"], entry["style"]): index for index, entry in enumerate(data.entries)}
    tiles = [[data.read(place[name, style]).permute(1, 2, 0).numpy() for style in ("noto", "twemoji")] for name in OBJECTS]
    return np.asarray(tiles)


@cache
def _letter(number: int, scale: int) -> np.ndarray:
    """A dark letter as [7 scale, 5 scale, 4] uint8."""
    dots = np.array([[int(dot) for dot in line] for line in _BITMAPS[LETTERS[number]].split()], dtype=np.uint8)
    tile = np.zeros((*dots.shape, 4), dtype=np.uint8)
    tile[..., :3], tile[..., 3] = (40, 40, 70), dots * 255
    return tile.repeat(scale, axis=0).repeat(scale, axis=1)
