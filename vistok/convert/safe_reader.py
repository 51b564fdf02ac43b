"""Read other people's checkpoint files without trusting them: sizes are capped, values are plain data, nothing is imported or executed."""

import ast
import json
import os
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER_BYTES = 64 << 20
MAX_VALUE_CHARACTERS = 1 << 20


def locate(path: str | os.PathLike, names: tuple[str, ...]) -> Path:
    """The file meant by a path: the file itself, or the first of `names` in a folder. Raises OSError: nothing there."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            others = sorted(p.name for p in path.iterdir() if p.is_file())
            raise OSError(f"{path} has none of {', '.join(names)}; it holds {', '.join(others[:10]) or 'no files'}")
        return found[0]
    if not path.is_file():
        raise OSError(f"{path} does not exist")
    return path


def find_weights(path: str | os.PathLike, names: tuple[str, ...]) -> Path:
    """The safetensors file meant by a path, see `locate`. Raises ValueError: another kind (pickles can run code and are never opened)."""
    path = locate(path, names)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; pickled checkpoints can run code when opened and are not read")
    return path


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and the header's metadata strings; no tensor is read.

    Raises ValueError: not a safetensors file, or a header above 64 MB.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > MAX_HEADER_BYTES:
        raise ValueError(f"{path} claims a header of {struct.unpack('<Q', start)[0]} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_tensors(path: Path, keys: list[str]) -> list[Tensor]:
    """Some tensors of a safetensors file, in the order of `keys`."""
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(key) for key in keys]


def parse_value(text: str, where: str):
    """Plain data from a string of JSON or of Python literals; a bare word stays a string.

    Raises ValueError: longer than 1 MB, nested too deep, or not finite.
    """
    if len(text) > MAX_VALUE_CHARACTERS:
        raise ValueError(f"{where} has {len(text)} characters; at most {MAX_VALUE_CHARACTERS} are read")

    def refuse(name: str):
        raise ValueError(f"{where} holds {name}; only finite numbers are allowed")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError:
        pass
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep") from error
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        if text.strip().isidentifier() or all(part.isidentifier() for part in text.strip().split(".")):
            return text.strip()
        raise ValueError(f"{where} is neither JSON nor a Python literal: {text[:80]!r}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{where} is nested too deep") from error


def read_json_object(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError: too large, not JSON, not an object, or not finite."""
    if path.stat().st_size > MAX_VALUE_CHARACTERS:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_VALUE_CHARACTERS} are read")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    data = parse_value(text, str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object, got {type(data).__name__}")
    return data
