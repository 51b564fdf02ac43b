"""Checkpoint folders that survive a kill at any instant, and hold tensors and numbers only.

    checkpoints/step_00001000/   *.safetensors, then state.json with the size and sha256 of each of them

A checkpoint is written into `.tmp-...`, every file and the folder are flushed to disk, state.json last, and the folder is renamed. So a
folder named `step_*` is complete or was damaged later, which its sizes and digests show. No pickle is written or read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger("vistok")

TensorFiles = dict[str, dict[str, Tensor]]
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp-"


def write_checkpoint(root: Path, step: int, files: TensorFiles, state: dict[str, Any], *, keep: int) -> Path:
    """Write one checkpoint atomically and remove all but the `keep` newest.

    files: tensors by file name (without suffix) and tensor name. state: plain data, kept in state.json.
    Raises OSError naming the path and the bytes needed; earlier checkpoints are untouched then.
    """
    folder, temporary = root / f"step_{step:08d}", root / f"{_TEMPORARY}step_{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            flush(path)
            digests[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        write_json(temporary / "state.json", {"step": step, **state, "files": digests})
        flush(temporary)
        if folder.exists():  # a damaged one: resuming passed it over
            _remove(folder)
        temporary.rename(folder)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {folder}: {error}; it needs {_size(files):,} bytes, {_free(root)} free") from error
    for _, old in complete_checkpoints(root)[:-keep]:
        _remove(old)
    return folder


def read_checkpoint(folder: Path) -> tuple[TensorFiles, dict[str, Any]]:
    """Tensors by file name and state of a checkpoint. Raises ValueError if a file does not have its digest."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, expected in state["files"].items():
        if _sha256(folder / name) != expected["sha256"]:
            raise ValueError(f"{folder / name} is damaged: its digest is not the one in state.json")
    return {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["files"]}, state


def newest_checkpoint(root: Path) -> tuple[TensorFiles, dict[str, Any]] | None:
    """The newest checkpoint that reads back whole, or None; damaged ones are passed over with a warning."""
    for _, folder in reversed(complete_checkpoints(root)):
        try:
            return read_checkpoint(folder)
        except (ValueError, OSError, SafetensorError) as error:
            logger.warning("checkpoint passed over: %s", error)
    return None


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints whose files are all there in full size, oldest first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else []:
        match = _NAME.fullmatch(folder.name)
        if match and _is_complete(folder):
            found.append((int(match[1]), folder))
    return sorted(found)


def remove_leftovers(root: Path) -> list[str]:
    """Delete what a killed run left half written; returns the names."""
    names = []
    for path in sorted(root.glob(f"{_TEMPORARY}*")) if root.is_dir() else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        names.append(path.name)
    return names


def replace_folder(folder: Path, temporary: Path) -> None:
    """Make `temporary` the new `folder`: by one rename where there is none yet, else file by file, one atomic rename each.

    At any instant the folder is absent or has all its files, which a rename of one whole folder over another could not promise.
    """
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    for path in files:
        flush(path)
    if not folder.exists():
        temporary.rename(folder)
        flush(folder.parent)
        return
    for path in files:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        flush(target.parent)
    shutil.rmtree(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, atomically and flushed to disk."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder and needs no flush of it
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f"{_TEMPORARY}old-{folder.name}")  # a kill while deleting leaves a leftover, not half a checkpoint
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(files: TensorFiles) -> int:
    return sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())


def _free(root: Path) -> str:
    while not root.exists() and root != root.parent:
        root = root.parent
    return f"{shutil.disk_usage(root).free:,} bytes"
