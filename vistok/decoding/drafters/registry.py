"""Drafters by name: `make_drafter("jacobi", target, length=8)`."""

import difflib
import importlib
import inspect

_CLASSES: dict[str, type] = {}
_HOME = "vistok.decoding.drafters"
_FILES = ("copy", "jacobi", "recycling", "skip", "small", "trained")


def register_drafter(name: str):
    """Decorator: make a drafter class known by a name. It is built as Class(target, **options); its keyword arguments are its options."""

    def add(drafter: type) -> type:
        known = _CLASSES.get(name)
        if known is not None and known.__qualname__ != drafter.__qualname__:
            raise ValueError(f"{name!r} is registered already, by {known.__module__}")
        drafter.name = name
        _CLASSES[name] = drafter
        return drafter

    return add


def _fill() -> None:
    for file in _FILES:
        importlib.import_module(f"{_HOME}.{file}")


def list_drafters() -> list[str]:
    """Names of all drafters, sorted."""
    _fill()
    return sorted(_CLASSES)


def drafter_options(name: str) -> dict:
    """Options of a drafter with their defaults (`inspect.Parameter.empty`: must be given)."""
    return {p.name: p.default for p in inspect.signature(_class(name)).parameters.values() if p.kind is p.KEYWORD_ONLY}


def make_drafter(name: str, target, **options):
    """The drafter of that name for a target generator.

    Raises ValueError: no such drafter or option (the nearest is named), or an option that must be given is missing.
    """
    known = drafter_options(name)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; options: {', '.join(known) or 'none'}"
            raise ValueError(f"drafter {name!r} has no option {key!r}{hint}")
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"drafter {name!r} needs the option {key!r}")
    return _class(name)(target, **options)


def _class(name: str) -> type:
    _fill()
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, 1)
        raise ValueError(f"no drafter {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; drafters: {', '.join(list_drafters())}"))
    return _CLASSES[name]
