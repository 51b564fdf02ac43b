"""The run folder: who may write into it, config.json, which says what its run is, and model/, its result.

config.json holds `train` (TrainConfig), `task` (the task's description), `recipe`, `data_digest` and the versions used.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .checkpoint import replace_folder, write_json
from .config import TrainConfig, differences, plain
from .ema import Ema
from .task import TrainingTask

logger = logging.getLogger("vistok")


def open_run(config: TrainConfig, description: dict[str, Any], resume: bool) -> None:
    """Check that a run may start or continue in `config.out`; nothing is written.

    Raises ValueError: the folder holds a run and resume is False; or resume is True and the run there was another one: the message names
    each field that differs.
    """
    path = config.out / "config.json"
    if not resume:
        if path.exists() or (config.out / "checkpoints").exists():
            raise ValueError(f"{config.out} already holds a run: continue it with --resume or choose another --out")
        return
    if not path.exists():
        logger.warning("%s holds no run yet: starting one", config.out)
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    faults = differences(stored["train"], config)
    faults += [f"task.{fault}" for fault in _different(stored["task"], plain(description["task"]))]
    if stored["data_digest"] != description["data_digest"]:
        faults.append(f"data: {stored['train']['data']} has other images than {config.data}, or in another order")
    if faults:
        raise ValueError(f"cannot resume {config.out} as another run ({'; '.join(faults)}): give the same options or choose another --out")
    before = stored["train"]["max_steps"]
    if before != config.max_steps and config.schedule != "constant":
        logger.warning("max_steps %d -> %d stretches the %s schedule from here on", before, config.max_steps, config.schedule)


def store_config(config: TrainConfig, description: dict[str, Any]) -> None:
    """Write config.json."""
    import accelerate
    import torch

    from vistok import __version__

    versions = {"vistok": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "config.json", {**plain(description), "train": plain(config), "versions": versions})


def export(task: TrainingTask, ema: Ema, folder: Path) -> None:
    """Save the model with its averaged weights into `folder`, each file replaced in one instant. Raises OSError naming the folder."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        with ema.in_place():
            task.save_pretrained(temporary)
        replace_folder(folder, temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for t in task.model.state_dict().values())
        raise OSError(f"cannot write {folder}: {error}; it needs {needed:,} bytes") from error


def _different(stored: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    faults = []
    for key in sorted({*stored, *new}):
        old, now = stored.get(key), new.get(key)
        if isinstance(old, dict) and isinstance(now, dict):
            faults += _different(old, now, f"{prefix}{key}.")
        elif old != now:
            faults.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(now)}")
    return faults
