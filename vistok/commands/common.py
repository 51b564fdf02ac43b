"""What several commands share: option types, opening models and data, reporting broken images."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vistok")

BadImages = Literal["skip", "error"]


def optional(kind: type, metavar: str, hint: str) -> Any:
    """The type of an option that may be left out; the hint says what then happens, in place of "default: None"."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint=f"({hint})")]


def shown(kind: Any, metavar: str, hint: str | None = None) -> Any:
    """The type of an option whose value help calls `metavar`; the hint stands in place of its default."""
    return Annotated[kind, tyro.conf.arg(metavar=metavar, help_behavior_hint=None if hint is None else f"({hint})")]


Model = shown(str, "MODEL")
Folder = shown(Path, "DIR")
Device = optional(str, "NAME", "default: a GPU if there is one, else cpu")
Threads = optional(int, "N", "default: torch's choice")


def use_device(name: str | None, threads: int | None = None) -> "torch.device":
    """The device of that name, or the best there is. threads: CPU threads of torch from now on.

    Raises ValueError: no such device here.
    """
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"there is no device {name!r} here: {reason}") from error
    return device


def load_tokenizer(source: str, device: "torch.device"):
    """The tokenizer behind a model's name; of a pipeline, the one it decodes with. Raises ValueError: the model is no tokenizer."""
    import vistok

    model = vistok.load(source)
    model = getattr(model, "tokenizer", model)
    if not hasattr(model, "encode"):
        raise ValueError(f"{source} is a {type(model).__name__}, not a tokenizer: `vistok models` lists tokenizers")
    return model.to(device).eval()


def report_bad_images(dataset, folder: Path | None = None) -> None:
    """Say which images could not be read; in a folder, also write bad_images.json."""
    bad = dataset.bad_images
    if not len(bad):
        return
    shown = [f"{name} ({reason})" for name, reason in list(bad.reasons.items())[:5]]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    logger.warning("%d image%s could not be read: %s%s", len(bad), "s" if len(bad) > 1 else "", ", ".join(shown), more)
    if folder is not None:
        (folder / "bad_images.json").write_text(json.dumps(bad.to_dict(), indent=2) + "\n", encoding="utf-8")


def shows_progress() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr.isatty()
