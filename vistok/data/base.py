"""What every data set offers: labels, captions, names and `read(index)`, with broken images counted instead of hidden."""

import hashlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.image import BrokenImageError, pair

ON_BAD_IMAGE = ("skip", "error")


def fraction_of(text: str | bytes) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


class BadImages:
    """The images that could not be used: how many, which, and why. Safe to add to from several threads."""

    def __init__(self):
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Note an image; a name that is known gets the new reason."""
        with self._lock:
            self._reasons[name] = reason

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def names(self) -> list[str]:
        """Which images, sorted."""
        return sorted(self._reasons)

    @property
    def reasons(self) -> dict[str, str]:
        """Name -> reason, sorted by name."""
        with self._lock:
            return dict(sorted(self._reasons.items()))

    def to_dict(self) -> dict:
        """Plain data for a run log."""
        return {"count": len(self), "images": self.reasons}

    def __repr__(self) -> str:
        return f"BadImages(count={len(self)})"


class ImageDataset:
    """Images with an index. A subclass fills the lists and says how one image is decoded (`decode`).

    classes: names of the classes, empty when there are none. labels: class of each image, -1 when it has none.
    captions: text of each image, "" when it has none. names: what each image is called in messages and reports.
    bad_images: what was skipped so far; complete once every image has been read.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        names: Sequence[str],
        labels: Sequence[int],
        captions: Sequence[str],
        classes: Sequence[str],
        on_bad_image: str = "skip",
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={on_bad_image!r} but it is one of {', '.join(ON_BAD_IMAGE)}")
        self.image_size = pair(image_size)
        self.names, self.labels, self.captions, self.classes = list(names), list(labels), list(captions), list(classes)
        self.on_bad_image = on_bad_image
        self.bad_images = BadImages()
        self._bad_indices: set[int] = set()

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, index: int) -> Tensor:
        """Image number `index` -> [3, H, W] uint8. Raises BrokenImageError."""
        raise BrokenImageError(self.names[index], f"{type(self).__name__} holds no images")

    def locate(self, index: int) -> tuple[int, Tensor]:
        """The image at `index` or, when it is broken, the next good one (round the end): (its index, [3, H, W] uint8).

        Which one that is depends on the files alone, so a resumed run sees the same images.
        Raises BrokenImageError: with on_bad_image="error", or when no image is left.
        """
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"image {index} of {n}")
        for step in range(n):
            candidate = (index + step) % n
            if candidate in self._bad_indices:
                continue
            try:
                return candidate, self.decode(candidate)
            except BrokenImageError as error:
                if self.on_bad_image == "error":
                    raise
                self.bad_images.add(self.names[candidate], error.reason)
                self._bad_indices.add(candidate)
        reason = self.bad_images.reasons.get(self.names[index])
        raise BrokenImageError(self.names[index], f"{reason}; and none of the other {n - 1} images can be read")

    def read(self, index: int) -> Tensor:
        """The image at `index` (or its substitute, see locate) -> [3, H, W] uint8."""
        return self.locate(index)[1]

    @property
    def num_bytes(self) -> int:
        """Size of all images decoded."""
        return len(self) * 3 * self.image_size[0] * self.image_size[1]


def read_all(dataset: ImageDataset, *, map_fn=map) -> tuple[Tensor, Tensor]:
    """Decode a whole data set once: images [n, 3, H, W] uint8 and the index [n] int64 each one really came from.

    map_fn: `map`, or the map of a thread pool.
    """
    H, W = dataset.image_size
    images, indices = torch.empty(len(dataset), 3, H, W, dtype=torch.uint8), torch.empty(len(dataset), dtype=torch.int64)
    for i, (index, image) in enumerate(map_fn(dataset.locate, range(len(dataset)))):
        images[i], indices[i] = image, index
    return images, indices
