"""What a run tells: running means, metrics.jsonl, log.txt, pictures, TensorBoard and the progress bar.

Values stay on the device until a line is due, so that the GPU never waits for a number nobody reads yet.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import write_json

logger = logging.getLogger("vistok")


class Meters:
    """Sums since the last line: of scalars weighted by images, and of histograms."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def add(self, logs: Mapping[str, Tensor], num_images: int) -> None:
        """Take in the logs of one micro batch."""
        for name, value in logs.items():
            value = value.detach()
            value = value.float() * num_images if value.ndim == 0 else value.long()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        images = self.sums.get("images")
        self.sums["images"] = torch.tensor(num_images) if images is None else images + num_images


def summarize(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of scalars; `usage` (share of entries seen) and `perplexity` (exp of the entropy) of histograms.

    Two or more histograms have their names in front of these.
    """
    images = max(1, int(sums["images"]))
    histograms = [name for name, value in sums.items() if value.ndim]
    result: dict[str, float] = {}
    for name, value in sorted(sums.items()):  # a resumed run read them in another order
        if value.ndim:
            prefix = "" if len(histograms) == 1 else f"{name}_"
            p = value.double() / value.sum().clamp(min=1)
            result[f"{prefix}usage"] = (value > 0).double().mean().item()
            result[f"{prefix}perplexity"] = math.exp(-torch.xlogy(p, p).sum().item())
        elif name != "images":
            result[name] = value.item() / images
    return result


class RunLog:
    """The files of one run folder that people and programs read; written by the main process only."""

    def __init__(self, out: Path, *, progress: bool, step: int, max_steps: int):
        self.out, self.max_steps = out, max_steps
        out.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._level = logger.level
        logger.addHandler(self._handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        _truncate(out / "metrics.jsonl", step)
        self._board = _tensorboard(out / "tensorboard", step)
        self._bar = tqdm(total=max_steps, initial=step, disable=not progress, unit="step", dynamic_ncols=True)
        self._bad_images = _stored_bad_images(out / "bad_images.json")
        self._images = self._steps = 0
        self._clock = time.perf_counter()

    def tick(self, num_images: int) -> None:
        """One step is done."""
        self._bar.update()
        self._images += num_images
        self._steps += 1

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics, with the speed since the last one."""
        now = time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        speed, remaining = self._images / seconds, (self.max_steps - step) * seconds / max(1, self._steps)
        self._clock, self._images, self._steps = now, 0, 0
        entry = {"step": step, **values, "images_per_s": round(speed, 2), "eta_s": round(remaining, 1)}
        self._write(entry)
        self._bar.set_postfix_str(f"loss {values.get('loss', math.nan):.4g}, {speed:.1f} images/s", refresh=False)

    def _write(self, entry: Mapping[str, float]) -> None:
        path = self.out / "metrics.jsonl"
        with _naming(path):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if self._board:
                for name, value in entry.items():
                    if name != "step":
                        self._board.add_scalar(name, value, entry["step"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block (saving, previews) does not count as training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - begin

    def preview(self, step: int, shown: Mapping[str, Image.Image | float]) -> None:
        """Write pictures, and numbers as a line of metrics of their own."""
        numbers = {name: value for name, value in shown.items() if isinstance(value, float)}
        if numbers:
            self._write({"step": step, **numbers})
        folder = self.out / "previews"
        folder.mkdir(exist_ok=True)
        for name, image in shown.items():
            if name in numbers:
                continue
            path = folder / f"step_{step:08d}_{name}.png"
            with _naming(path):
                image.save(path)
            if self._board:
                self._board.add_image(name, _to_tensor(image), step)

    def bad_images(self, reasons: Mapping[str, str]) -> None:
        """Write which images could not be read and why, together with those of earlier parts of the run."""
        merged = dict(sorted({**self._bad_images, **reasons}.items()))
        if merged != self._bad_images:
            self._bad_images = merged
            logger.warning("unreadable images so far: %d; bad_images.json lists them with the reasons", len(merged))
            write_json(self.out / "bad_images.json", {"count": len(merged), "images": merged})

    def close(self) -> None:
        """Close all files and give the logger back as it was."""
        self._bar.close()
        if self._board:
            self._board.close()
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        self._handler.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk says only that it is full: add the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; the checkpoints so far are intact") from error


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            logger.warning("half a line at the end of %s was dropped", path)
    temporary = path.with_name(".tmp-metrics.jsonl")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: metrics go to metrics.jsonl only (pip install vistok[train])")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _stored_bad_images(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8"))["images"] if path.exists() else {}


def _to_tensor(image: Image.Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image.convert("RGB"))
