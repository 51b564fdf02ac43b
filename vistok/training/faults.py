"""What can go wrong in a step: a signal to stop, numbers that are no numbers, memory that runs out."""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("vistok")


class StopSignal:
    """Within the block SIGTERM and Ctrl-C only set `requested`; the loop then saves and ends. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _on_signal(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def explain_out_of_memory(step: int, micro_batch: int, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to lower. Raises MemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU allocator raises a plain one
        text = str(error)
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text or "can't allocate memory" in text):
            raise
        used = f" with {torch.cuda.memory_allocated(device):,} bytes in use" if device.type == "cuda" else ""
        raise MemoryError(
            f"out of memory on {device}{used} at step {step}, {micro_batch} images per forward pass: raise --gradient-accumulation "
            f"(the result stays the same) or lower --batch-size or --image-size. {text.partition(chr(10))[0]}"
        ) from error


def not_finite_report(batch: Any, names: Any, logs: Mapping[str, Tensor], module: nn.Module) -> tuple[bool, str]:
    """Which loss terms, images or gradients are NaN or infinite, and the files of the micro batch; the text is empty if none is.

    names: of all images of the data set, by index, or None.
    Returns whether a loss term is among them, and the text.
    """
    terms = [name for name, value in logs.items() if value.is_floating_point() and not value.isfinite().all()]
    indices = [int(i) for i in batch.indices]
    images = getattr(batch, "images", None)
    faulty = [] if images is None else [i for i, ok in zip(indices, images.flatten(1).isfinite().all(1).tolist()) if not ok]
    gradients = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if terms:
        what = f"loss term {', '.join(terms)} of"
    elif gradients:
        what = f"gradient of {', '.join(gradients[:3])}{f' and {len(gradients) - 3} more' if len(gradients) > 3 else ''} after"
    else:
        return False, ""
    files = ", ".join(str(names[i]) if names is not None else f"sample {i}" for i in faulty or indices)
    return bool(terms), f"{what} {'images with NaN pixels' if faulty else 'the batch'} {files}"
