"""VisualModel: a diffusers model whose folder either loads exactly or says why not.

A model is a frozen config dataclass plus an nn.Module. Its folder holds `config.json` (plain data) and `model.safetensors`; nothing else is
read, nothing in either file is ever imported or executed. Against diffusers' own loading: a missing, unexpected or mis-shaped weight and an
unknown config key are errors instead of warnings, and pickled weights are never opened.
"""

import dataclasses
import difflib
import json
import math
import os
import shutil
import sys
import types
import typing
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_INTEGER = 1 << 40
SCALE_SUFFIX = ":scale"  # beside an int8 matrix: the scale of each of its rows
_FLOATS = {"F64", "F32", "F16", "BF16"}
# What DiffusionPipeline.from_pretrained passes to every component; none of it changes which weights are loaded here.
_IGNORED_OPTIONS = {
    "use_safetensors", "low_cpu_mem_usage", "variant", "provider", "sess_options", "device_map", "max_memory", "offload_folder",
    "offload_state_dict", "user_agent", "force_download", "proxies", "local_dir", "disable_mmap", "use_flashpack",
    "quantization_config", "dduf_entries", "flashpack_kwargs",
}  # fmt: skip


def config_from_dict(cls: type, data: dict, *, where: str = ""):
    """Build the dataclass `cls` (nested ones too) from plain JSON data; lists become tuples.

    Raises ValueError: an unknown key (the nearest known one is named), a missing required key, a value of another type, or a number that
    is not finite.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or cls.__name__} must be an object with named fields, got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    known = {key: value for key, value in data.items() if not key.startswith("_") or key in fields}
    hints = typing.get_type_hints(cls)
    for key in known:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known fields: {', '.join(fields)}"
            raise ValueError(f"{where or cls.__name__} has no field {key!r}{hint}")
    forbidden = sorted(key for key in data if key.startswith("_") and key not in _CONFIG_NOTES)
    if forbidden:
        raise ValueError(f"{where or cls.__name__} has the reserved key {forbidden[0]!r}: a config is plain data and names no code")
    missing = [n for n, f in fields.items() if n not in known and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{where or cls.__name__} lacks the field {missing[0]!r}")
    return cls(**{key: _convert(value, hints[key], f"{cls.__name__}.{key}") for key, value in known.items()})


_CONFIG_NOTES = {"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_vistok_version"}


def _convert(value, hint, where: str):
    """Check one JSON value against a field's type hint and give it the field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        problems = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _convert(value, option, where)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError("; ".join(problems))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else config_from_dict(hint, value, where=where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        inner = arguments[:1] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
        if len(inner) != len(value):
            raise ValueError(f"{where} must have {len(inner)} entries, got {value!r}")
        return tuple(_convert(item, kind, where) for item, kind in zip(value, inner))
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}={value!r} is not allowed; allowed: {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{where}={value} is beyond any config this package makes (at most {MAX_INTEGER})")
    return value


def read_config(folder: str | Path) -> dict:
    """The plain data of a model folder's config.json.

    Raises OSError: there is no such file. ValueError: it is too large, is no JSON object, or holds NaN or Infinity.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise OSError(f"{folder} is no model folder: it has no {CONFIG_NAME}")
    return read_json(path, max_bytes=MAX_CONFIG_BYTES)


def read_json(path: Path, *, max_bytes: int) -> dict:
    """The object in a JSON file that somebody else may have written.

    Raises ValueError: it is larger than max_bytes, is no JSON object, or holds NaN or Infinity.
    """
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {max_bytes} are read")

    def refuse(name):
        raise ValueError(f"{path} holds {name}; only finite numbers are allowed")

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object with named fields, got {type(data).__name__}")
    return data


class VisualModel(ModelMixin, ConfigMixin):
    """Base of every vistok model; subclasses set `Config` and take one config in `__init__`."""

    config_name = CONFIG_NAME
    Config: type

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # DiffusionPipeline.from_pretrained accepts a component only if the module that defines its class also holds `ModelMixin`
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__} takes a {self.Config.__name__}, got {type(config).__name__}")
        self.settings = config
        self.register_to_config(**dataclasses.asdict(config))

    def __getattr__(self, name: str):
        # diffusers looks into the config first, where a field named like a submodule (FlexTok's `vae`) would hide it
        return nn.Module.__getattr__(self, name)

    @classmethod
    def from_config(cls, config, **options):
        """Build with fresh weights from a config dataclass or its plain data."""
        if not isinstance(config, cls.Config):
            config = config_from_dict(cls.Config, dict(config), where=f"{cls.__name__} config")
        model = cls(config)
        return (model, {}) if options.get("return_unused_kwargs") else model

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, subfolder: str | None = None, **options):
        """Load a folder, a bundled model (`vistok/emoji-flextok`) or a hub id, strictly.

        torch_dtype: dtype of the floating weights; float32 by default, also when the file holds half precision.
        options: `revision`, `token`, `cache_dir`, `local_files_only` go to the hub client.
        Returns the model in eval mode.
        Raises OSError: nothing there, or no safetensors. ValueError: config or weights do not fit; every key at fault is named.
        """
        from vistok.registry import resolve

        hub = {key: options.pop(key) for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
        dtype = options.pop("dtype", None) or torch_dtype or torch.float32
        unknown = sorted(set(options) - _IGNORED_OPTIONS)
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained has no option {unknown[0]!r}")
        folder = resolve(source, **hub)
        folder = folder / subfolder if subfolder else folder
        data = read_config(folder)
        named = data.get("_class_name", cls.__name__)
        if named != cls.__name__:
            raise ValueError(f"{folder} holds a {named}, not a {cls.__name__}; vistok.load({str(source)!r}) picks the right class")
        config = config_from_dict(cls.Config, data, where=f"{folder / CONFIG_NAME}")
        path = _weights_file(folder)
        try:
            with torch.device("meta"):
                expected = cls(config).state_dict()
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{folder / CONFIG_NAME}: no {cls.__name__} of this shape can be built: {error}") from error
        _check_header(path, expected, cls.__name__)
        model = cls(config)
        # safetensors' memory map leaves tensors unaligned, which changes results in the last bit; copying into the model's own does not.
        state = load_file(path)
        model.load_state_dict({key: _unpacked(state, key).to(expected[key].dtype) for key in expected}, strict=True)
        return nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns about modules it would keep in float32, of which we have none

    def save_pretrained(self, save_directory: str | os.PathLike, *, dtype: torch.dtype | None = None, **options) -> None:
        """Write config.json and model.safetensors; each file is complete or absent at any instant.

        dtype: of the floating weights on disk; the model's own by default. torch.float16 halves the file. torch.int8 quarters it: each
        matrix row is rounded to 255 steps of its own scale (about 0.4 % of the row's largest weight), everything else is float16.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        matrices = {name for name, parameter in self.named_parameters() if parameter.ndim >= 2}
        weights = {}
        for key, value in self.state_dict().items():
            value = value.detach().to("cpu", copy=True).contiguous()
            if dtype == torch.int8 and key in matrices:
                weights[key], weights[key + SCALE_SUFFIX] = _packed(value)
            elif dtype is not None and value.is_floating_point():
                weights[key] = value.to(torch.float16 if dtype == torch.int8 else dtype)
            else:
                weights[key] = value
        config = {"_class_name": type(self).__name__, **_plain(dataclasses.asdict(self.settings))}
        temporary = folder / f".tmp-{os.getpid()}"
        temporary.mkdir(exist_ok=True)
        try:
            save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
            (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.chmod(temporary / WEIGHTS_NAME, (temporary / CONFIG_NAME).stat().st_mode)  # else only the owner could read it
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(temporary / name, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _packed(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 and the float32 scale of each of its rows."""
    rows = value.float().flatten(1)
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127
    return (rows / scale[:, None]).round().to(torch.int8).view(value.shape), scale


def _unpacked(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The weight under a key, also where it was stored as int8 with a scale a row."""
    value, scale = state[key], state.get(key + SCALE_SUFFIX)
    return value if scale is None else value.float() * scale.view(-1, *[1] * (value.ndim - 1))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".safetensors"})
        hint = f"; it has {', '.join(others)}, which are not opened here (pickles can run code; see `vistok convert`)" if others else ""
        raise OSError(f"{folder} has no {WEIGHTS_NAME}{hint}")
    return path


def _check_header(path: Path, expected: dict, name: str) -> None:
    """Compare keys, shapes and dtypes of a weight file with the model before anything is allocated."""
    problems = []
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: (tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()) for key in file.keys()}
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata is not None and metadata.get("format") != "pt":
        problems.append(f"the header's format is {metadata.get('format')!r}, expected 'pt'")
    packed = [key for key, (shape, dtype) in found.items() if dtype == "I8" and found.get(key + SCALE_SUFFIX) == (shape[:1], "F32")]
    for key in packed:
        found[key] = (found[key][0], found.pop(key + SCALE_SUFFIX)[1])
    for key in sorted(set(expected) - set(found)):
        problems.append(f"missing {key} {tuple(expected[key].shape)}")
    for key in sorted(set(found) - set(expected)):
        near = difflib.get_close_matches(key, expected, 1)
        problems.append(f"unexpected {key}" + (f" (nearest known: {near[0]})" if near else ""))
    for key in sorted(set(found) & set(expected)):
        shape, dtype = found[key]
        if shape != tuple(expected[key].shape):
            problems.append(f"{key} has shape {shape}, the config asks for {tuple(expected[key].shape)}")
        elif (dtype in _FLOATS) != expected[key].is_floating_point():
            problems.append(f"{key} has dtype {dtype}, expected {expected[key].dtype}")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{path} does not fit {name}:\n  {shown}")
