"""What was measured, on what and how, kept beside every number: without it a number cannot be compared with another."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import vistok

RESIZE = "shorter side to the image size (bilinear, antialiased), centre crop"
PIXELS = "clamped to [-1, 1] and rounded to 8 bits before every metric"
_PACKAGES = ("torch", "torchvision", "diffusers", "timm", "transformers", "torch-fidelity", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """The circumstances of an evaluation; plain data, saved as JSON."""

    task: str
    """"reconstruction" or "generation"."""
    model: str = ""
    """Name or path as the user gave it; empty for folders of samples."""
    model_config: dict = field(default_factory=dict)
    """The model's config."""
    data: str = ""
    """The reference images: a path or the name of a bundled set."""
    split: str = ""
    """Which part of them."""
    num_images: int = 0
    """Reference images used, of `num_available`."""
    num_available: int = 0
    """Reference images in the split."""
    image_size: tuple[int, int] = (0, 0)
    """Height and width at which everything was compared."""
    resize: str = RESIZE
    """How files were brought to that size."""
    pixels: str = PIXELS
    """What was done to pixel values."""
    features: str = ""
    """Name of the feature net behind Frechet, kernel distance, precision, recall and retrieval."""
    feature_preprocess: str = ""
    """What the feature net does to images first."""
    options: dict = field(default_factory=dict)
    """Decode steps, guidance and every setting of a metric."""
    seed: int = 0
    """Of the noise, of the choice of images and of subsets."""
    versions: dict = field(default_factory=lambda: versions())
    """Of vistok, Python and the packages that enter a number."""
    machine: dict = field(default_factory=lambda: machine())
    """Processor count and kind; no names."""
    command: str = ""
    """The command line, as typed."""

    @property
    def frechet_name(self) -> str:
        """FID for the official Inception features and nothing else; otherwise the Frechet distance with its features."""
        return "FID" if self.features == "inception" else f"Frechet({self.features})"

    def lines(self) -> list[str]:
        """For the terminal: one setting a line, without the model's config."""
        skipped = ("model_config", "versions", "machine")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        values["image_size"] = "{} x {}".format(*self.image_size)
        values["options"] = ", ".join(f"{key}={value}" for key, value in self.options.items())
        values["versions"] = ", ".join(f"{key} {value}" for key, value in self.versions.items())
        values["machine"] = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return [f"{key.replace('_', ' '):>18}: {value}" for key, value in values.items() if value != ""]


@dataclass(frozen=True)
class Evaluation:
    """Rows of numbers and the protocol they were measured under."""

    protocol: EvaluationProtocol
    rows: list[dict]

    def with_protocol(self, **fields) -> "Evaluation":
        """The same numbers, more said about how they came about: fields of EvaluationProtocol (model, data, command, ...)."""
        return dataclasses.replace(self, protocol=dataclasses.replace(self.protocol, **fields))

    def save(self, path: str | Path) -> None:
        """Write protocol and rows as JSON, complete or not at all; numbers that are not finite become null."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def to_dict(self) -> dict:
        """Plain JSON data."""
        return {"protocol": _plain(dataclasses.asdict(self.protocol)), "results": _plain(self.rows)}

    def table(self) -> str:
        """The numbers as an aligned text table, one line a row; lists inside a row are left to the JSON file."""
        keys = [key for key, value in self.rows[0].items() if not isinstance(value, (list, dict))]
        titles = [self.protocol.frechet_name if key == "frechet" else key.replace("_", " ") for key in keys]
        cells = [[_cell(row[key]) for key in keys] for row in self.rows]
        widths = [max(len(title), *(len(line[j]) for line in cells)) for j, title in enumerate(titles)]
        return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in [titles, *cells])

    def report(self) -> str:
        """Protocol, then table: what the scripts print."""
        return "\n".join([*self.protocol.lines(), "", self.table()])


def versions() -> dict[str, str]:
    """Versions of vistok, Python and of those packages that are installed."""
    found = {"vistok": vistok.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device | str = "cpu") -> dict:
    """Processors, threads and the kind of device; nothing that names the machine."""
    device = torch.device(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    system = f"{platform.system()} {platform.machine()}"
    return {"device": kind, "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "system": system}


def command_line(module: str) -> str:
    """The running command, as `python -m MODULE ARGUMENTS`."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def model_config(model) -> dict:
    """The config of a model or pipeline as plain data, without private notes."""
    config = getattr(model, "config", {})
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    return _plain({key: value for key, value in config.items() if not key.startswith("_")})


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _cell(value) -> str:
    if value is None:
        return "-"
    return str(value) if not isinstance(value, float) else f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
