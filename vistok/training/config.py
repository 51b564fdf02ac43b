"""What one training run is asked to do: plain numbers that are stored beside its results.

A resumed run must do the same mathematics as the run it continues; `differences` says which fields stand in the way.
"""

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

FREE_FIELDS = frozenset(
    "out data max_steps gradient_accumulation compile save_every keep_checkpoints preview_every log_every workers max_bad_steps "
    "threads progress process_timeout".split()
)
"""Fields that a resumed run may change: what is seen, saved and shown, and how the same sum is computed.

`data` is compared by the names of its images, not by its path, so a moved folder resumes. A new `max_steps` stretches the schedule.
"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: length, batch, optimizer, schedule, precision, and what to write into the run folder."""

    out: Path
    """Run folder: config, metrics, log, previews, checkpoints and the trained model go here."""
    data: str = "emoji"
    """Folder of images, or the name of the bundled set (emoji)."""
    image_size: int = 64
    """Side in pixels to which the images are resized and cropped."""
    max_steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 32
    """Images per optimizer step, over all processes and accumulated micro batches."""
    gradient_accumulation: int = 1
    """Micro batches per optimizer step: raise it when memory is short, the result stays the same."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.01
    """AdamW's weight decay; vectors (biases, norms) are never decayed."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises linearly from zero to its peak."""
    schedule: Literal["cosine", "constant", "trapezoid"] = "cosine"
    """After the warm-up: cosine to the end, constant, or constant and then linear over the last part (trapezoid)."""
    final_fraction: float = 0.01
    """Learning rate at the last step as a fraction of the peak (cosine and trapezoid)."""
    decay_fraction: float = 0.2
    """Part of the run in which the trapezoid schedule falls."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm, separately for the model and each other trained part; 0 = never."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are saved as the result; step s uses min(decay, (1 + s) / (10 + s)). 0 = the last weights."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type: no (float32), bf16, or fp16 with loss scaling (GPU only)."""
    compile: bool = False
    """Compile the task's forward with torch.compile."""
    seed: int = 0
    """Decides weights at the start, order, augmentation and every random draw."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """How many newest checkpoints stay on disk."""
    preview_every: int = 500
    """Steps between preview pictures; 0 = none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    flip: bool = True
    """Mirror images at random (left-right)."""
    shift: int = 0
    """Shift images at random by up to this many pixels."""
    workers: int = 0
    """Threads that decode images ahead when the data set is too large to keep decoded; 0 = none."""
    on_bad_image: Literal["error", "skip"] = "skip"
    """A file that is no readable image: stop and name it, or skip, count and report it in bad_images.json."""
    max_bad_steps: int = 0
    """Steps with a NaN or infinite loss or gradient that are left out before the run stops."""
    threads: int | None = None
    """CPU threads of torch; None leaves them alone."""
    progress: bool = True
    """Show a progress bar."""
    process_timeout: int = 60
    """Seconds after which a process that waits for another one gives up; raise it when saving or previews take longer."""

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))
        at_least = dict(
            image_size=1, max_steps=1, batch_size=1, gradient_accumulation=1, warmup_steps=0, clip_norm=0, save_every=1,
            keep_checkpoints=1, preview_every=0, log_every=1, shift=0, workers=0, max_bad_steps=0, weight_decay=0, process_timeout=1,
        )  # fmt: skip
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("final_fraction", "decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        for name, allowed in (
            ("schedule", ("cosine", "constant", "trapezoid")),
            ("precision", ("no", "bf16", "fp16")),
            ("on_bad_image", ("error", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} but it is one of {', '.join(allowed)}")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of gradient_accumulation={self.gradient_accumulation}")

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass, over all processes."""
        return self.batch_size // self.gradient_accumulation


def plain(value: Any) -> Any:
    """The value as JSON knows it: dataclasses and mappings as objects, sequences as lists, paths and types as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def differences(stored: dict[str, Any], config: TrainConfig) -> list[str]:
    """Fields in which `config` would change the mathematics of a stored run, as "name: stored -> new"."""
    new = plain(config)
    names = [field.name for field in fields(config) if field.name not in FREE_FIELDS]
    return [
        f"{name}: {json.dumps(stored[name])} -> {json.dumps(new[name])}" for name in names if name in stored and stored[name] != new[name]
    ]
