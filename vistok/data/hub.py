"""Hugging Face data sets as sources of images: local folders, parquet and webdataset files, or hub ids; indexed, or streamed.

Needs `pip install vistok[data]`. Images are decoded by vistok.image, not by `datasets`, so broken files and bombs are treated as
everywhere.
"""

import io
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vistok.data.base import ON_BAD_IMAGE, BadImages, ImageDataset
from vistok.data.loader import Batch, make_batch
from vistok.image import BrokenImageError, open_image, pair, resize_crop, to_uint8

CAPTION_COLUMNS = ("text", "caption", "txt", "captions", "prompt")
LABEL_COLUMNS = ("label", "labels", "cls", "class")


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the package `datasets`: pip install vistok[data]") from error
    return datasets


def _load(path: str, *, split: str, config: str | None, streaming: bool, cache_dir: str | None):
    """The data set with its image column left undecoded, and the names of its image, label and caption columns."""
    datasets = _datasets()
    data = datasets.load_dataset(path, config, split=split, streaming=streaming, cache_dir=cache_dir)
    features = data.features
    if features is None:
        data = data._resolve_features()
        features = data.features
    image = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    if image is None:
        raise ValueError(f"hf:{path} has no image column; its columns are {', '.join(features)}")
    label = next((name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    types = {name: getattr(feature, "dtype", "") for name, feature in features.items()}
    label = label or next((name for name in LABEL_COLUMNS if types.get(name, "").startswith("int")), None)
    caption = next((name for name in CAPTION_COLUMNS if types.get(name) == "string"), None)
    return data.cast_column(image, datasets.Image(decode=False)), image, label, caption


def _decode(cell: dict, name: str, image_size: tuple[int, int]) -> Tensor:
    if cell is None:
        raise BrokenImageError(name, "the row has no image")
    try:
        source = cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
        return to_uint8(resize_crop(open_image(source), image_size))
    except BrokenImageError as error:
        raise BrokenImageError(name, error.reason) from error


class HubDataset(ImageDataset):
    """A Hugging Face data set that is on this disk or fits it, with an index.

    path: what `datasets.load_dataset` takes: a local folder of images, parquet or tar files, or a hub id. split: any split of it, slices
    such as "train[:90%]" and "all" included. config: its configuration, when it has several. cache_dir: where `datasets` keeps its files.
    The image column is the first of that type; labels come from a class column, or whole numbers in `label` or `cls`; captions from `text`,
    `caption`, `txt`, `captions` or `prompt`.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int | tuple[int, int],
        split: str = "train",
        on_bad_image: str = "skip",
        config: str | None = None,
        cache_dir: str | None = None,
    ):
        self.data, self._image, label, caption = _load(path, split=split, config=config, streaming=False, cache_dir=cache_dir)
        n = len(self.data)
        if n == 0:
            raise ValueError(f"hf:{path} has no images in the split {split!r}")
        labels = [-1 if value is None else int(value) for value in self.data[label]] if label else [-1] * n
        names = getattr(self.data.features[label], "names", None) if label else []
        super().__init__(
            image_size=image_size,
            names=[f"hf:{path}[{split}] row {i}" for i in range(n)],
            labels=labels,
            captions=[text or "" for text in self.data[caption]] if caption else [""] * n,
            classes=names if names is not None else [str(i) for i in range(max(labels) + 1)],
            on_bad_image=on_bad_image,
        )

    def decode(self, index: int) -> Tensor:
        return _decode(self.data[index][self._image], self.names[index], self.image_size)


class HubStream:
    """A Hugging Face data set that is read as it comes, for sets larger than the disk: no index, no length.

    Broken images are left out and counted in `bad_images` (or raise, with on_bad_image="error"). rank, world_size: each process reads its
    part.
    shuffle_buffer: images held back to mix their order, 0 for the order of the files. Resume with `state_dict` / `load_state_dict`:
    reading goes on after the last batch; images held in the shuffle buffer at that moment are not seen again in that epoch.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int | tuple[int, int],
        split: str = "train",
        on_bad_image: str = "skip",
        config: str | None = None,
        seed: int = 0,
        shuffle_buffer: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_dir: str | None = None,
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={on_bad_image!r} but it is one of {', '.join(ON_BAD_IMAGE)}")
        data, self._image, self._label, self._caption = _load(path, split=split, config=config, streaming=True, cache_dir=cache_dir)
        self.classes = list(getattr(data.features[self._label], "names", None) or []) if self._label else []
        if world_size > 1:
            from datasets.distributed import split_dataset_by_node

            data = split_dataset_by_node(data, rank=rank, world_size=world_size)
        self.data = data.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else data
        self.name, self.seed, self.image_size, self.on_bad_image = f"hf:{path}[{split}]", seed, pair(image_size), on_bad_image
        self.rank, self.world_size = rank, world_size
        self.bad_images = BadImages()
        self._epoch = self._row = self._yielded = 0

    def state_dict(self) -> dict:
        """Where reading stands: plain data, to be saved with a checkpoint."""
        return {"epoch": self._epoch, "row": self._row, "yielded": self._yielded, "data": self.data.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` stood."""
        self._epoch, self._row, self._yielded = state["epoch"], state["row"], state["yielded"]
        self.data.set_epoch(self._epoch)
        self.data.load_state_dict(state["data"])

    def _rows(self) -> Iterator[tuple[Tensor, int, str, int]]:
        """(pixels [3, H, W] uint8, label, caption, row number in the epoch), epoch after epoch."""
        while True:
            good = 0
            for row in self.data:
                number, self._row = self._row, self._row + 1
                name = f"{self.name} row {number} of process {self.rank}"
                try:
                    pixels = _decode(row[self._image], name, self.image_size)
                except BrokenImageError as error:
                    if self.on_bad_image == "error":
                        raise
                    self.bad_images.add(name, error.reason)
                    continue
                good += 1
                label = row[self._label] if self._label else None
                yield pixels, -1 if label is None else int(label), (row[self._caption] if self._caption else None) or "", number
            if not good and self._row == len(self.bad_images):
                raise BrokenImageError(self.name, "no image can be read")
            self._epoch, self._row = self._epoch + 1, 0
            self.data.set_epoch(self._epoch)

    def batches(self, batch_size: int, *, flip: bool = True, shift: int = 0) -> Iterator[Batch]:
        """Batches for ever; batch_size is of all processes together. `indices` are row numbers of this process."""
        if batch_size < 1 or batch_size % self.world_size:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {self.world_size} processes")
        rows, count = self._rows(), batch_size // self.world_size
        while True:
            pixels, labels, captions, numbers = zip(*(next(rows) for _ in range(count)), strict=True)
            positions = np.arange(self._yielded + self.rank, self._yielded + batch_size, self.world_size)
            self._yielded += batch_size
            columns = torch.stack(pixels), torch.tensor(labels), list(captions), torch.tensor(numbers)
            yield make_batch(*columns, positions, seed=self.seed, flip=flip, shift=shift)
