"""State dicts from .safetensors and from pickled .bin, .pt, .pth files, the latter only as far as they are plain tensors.

Pickles are read by torch's weights-only loader, which builds tensors and containers and calls nothing else; a file that asks for more is
refused. Files are mapped, except pickles of torch before 1.6, which are read into memory.
"""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vistok.convert.safe_reader import locate, read_shapes

PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_WRAPPED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def find_state(path: str | os.PathLike, names: tuple[str, ...]) -> Path:
    """The weight file meant by a path, see `locate`. Raises ValueError: a file of another kind."""
    path = locate(path, names)
    if path.suffix not in {".safetensors", *PICKLED}:
        raise ValueError(f"{path} is no weight file; known: .safetensors, {', '.join(sorted(PICKLED))}")
    return path


def read_state(path: Path, *, wrappers: tuple[str, ...] = ("model", "module", "state_dict")) -> dict[str, Tensor]:
    """Tensors by key of one weight file, on the CPU.

    wrappers: keys under which a pickled checkpoint may hold its state dict; optimizers and counters beside it are left out.
    Raises ValueError: the file cannot be read, asks for code, or holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        read_shapes(path)  # refuses absurd headers
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        # argparse.Namespace: training checkpoints keep their options in one; it is data
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no pickle of plain tensors, so it is not opened: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, IndexError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    for key in wrappers:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    odd = [] if isinstance(data, dict) else [type(data).__name__]
    odd = odd or [str(key) for key, value in data.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if odd:
        raise ValueError(f"{path} must hold a state dict of tensors; not one: {', '.join(odd[:5])}")
    return dict(data)


def plain_names(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors without what DDP, FSDP, checkpointing and torch.compile put into their names.

    Raises ValueError: two names become one.
    """
    names = {key: _WRAPPED.sub("", key) for key in state}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{where}: two keys have the same name once their wrappers are removed")
    return {name: state[key] for key, name in names.items()}
