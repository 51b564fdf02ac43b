"""Names: presets to create, models to load.

`@register` on a model class makes its folders loadable by `load`; `@register` on a function that returns a model makes it a preset for
`create`. A file may name a registered class and nothing else: no import path is ever read from one.
"""

import difflib
import fnmatch
import importlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path

_HOMES = ("vistok.tokenizers", "vistok.generators", "vistok.decoding.heads", "vistok.pruning.learned")
_CLASSES: dict[str, type] = {}
_PRESETS: dict[str, Callable] = {}
BUNDLED = Path(__file__).parent / "models"


def register(thing):
    """Decorator: register a VisualModel class under its name, or a preset function under its name with dashes."""
    table, name = (_CLASSES, thing.__name__) if inspect.isclass(thing) else (_PRESETS, thing.__name__.replace("_", "-"))
    known = table.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (thing.__module__, thing.__qualname__):
        raise ValueError(f"{name!r} is registered already, by {known.__module__}")
    table[name] = thing
    return thing


def _fill() -> None:
    for home in _HOMES:
        importlib.import_module(home)


def list_models(pattern: str = "*") -> list[str]:
    """Names of presets and bundled models that match a shell pattern, sorted; bundled ones start with `vistok/`."""
    _fill()
    bundled = [f"vistok/{p.name}" for p in BUNDLED.iterdir() if p.is_dir() and any(p.glob("*.json"))] if BUNDLED.is_dir() else []
    return sorted(fnmatch.filter([*_PRESETS, *bundled], pattern))


def create(name: str, **overrides):
    """Build a preset with fresh weights; `overrides` replace fields of its config.

    Raises ValueError: no such preset (the nearest is named).
    """
    _fill()
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, 1)
        raise ValueError(f"no preset {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; presets: {', '.join(sorted(_PRESETS))}"))
    return _PRESETS[name](**overrides)


def preset_help(name: str) -> str:
    """What a preset says of itself. Raises KeyError: there is no such preset."""
    _fill()
    return inspect.getdoc(_PRESETS[name]) or ""


def is_bundled(source: str | os.PathLike) -> bool:
    """Whether a source names a model that ships with the package, not a folder that happens to be called the same."""
    name = os.fspath(source)
    return name.startswith("vistok/") and not Path(name).is_dir() and (BUNDLED / name.removeprefix("vistok/")).is_dir()


def model_class(name: str) -> type:
    """The registered model class of that name. Raises ValueError: there is none."""
    _fill()
    if name not in _CLASSES:
        raise ValueError(f"{name!r} is not a vistok model class; known: {', '.join(sorted(_CLASSES))}")
    return _CLASSES[name]


def load(source: str | os.PathLike, **options):
    """Load a model or a pipeline from a folder, a bundled name (`vistok/emoji-flextok`), a run folder or a hub id.

    Folders of timm and transformers are opened by those libraries (`vistok.foreign`).

    options: as for `VisualModel.from_pretrained`.
    """
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    folder = resolve(source, **hub)
    if (folder / "model_index.json").is_file():
        from vistok.pipelines import TokenImagePipeline

        return TokenImagePipeline.from_pretrained(folder, **{k: v for k, v in options.items() if k not in hub})
    from vistok.foreign import is_foreign, load_foreign
    from vistok.modeling import read_config

    config = read_config(folder)
    if is_foreign(config):
        return load_foreign(folder, config)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{folder}/config.json does not say which model it holds (_class_name)")
    return model_class(name).from_pretrained(folder, **{k: v for k, v in options.items() if k not in hub})


def resolve(source: str | os.PathLike, **hub) -> Path:
    """The local folder behind a source: a folder, a run folder (its `model/`), a bundled name, or a hub id (downloaded: JSON and
    safetensors files only).

    Raises OSError: nothing of that name; what exists is listed.
    """
    folder = Path(source)
    if folder.is_dir():
        is_run = not any((folder / n).is_file() for n in ("model_index.json", "model.safetensors")) and (folder / "model").is_dir()
        return folder / "model" if is_run else folder
    name = os.fspath(source)
    if name.startswith("vistok/"):
        bundled = BUNDLED / name.removeprefix("vistok/")
        if bundled.parent == BUNDLED and bundled.is_dir():
            return bundled
        raise OSError(f"there is no bundled model {name!r}; bundled: {', '.join(list_models('vistok/*')) or 'none'}")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise OSError(f"{name!r} is no folder; a model is a folder, a bundled name (vistok/...) or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "**/*.json", "**/*.safetensors"], **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(f"{name!r} is neither a folder nor reachable on the hub: {error}") from error


def describe(folder: Path) -> dict:
    """The plain config of a model folder or pipeline folder, for display."""
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    raise OSError(f"{folder} is no model folder: it has neither model_index.json nor config.json")
