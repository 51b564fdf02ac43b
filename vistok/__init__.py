"""vistok: visual tokens. Train image tokenizers on a folder, generate images from their tokens, prune tokens in vision models.

Importing this package is cheap (no torch): every public name is loaded on first use.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "create": "registry",
    "load": "registry",
    "list_models": "registry",
    "register": "registry",
    "VisualTokens": "tokens",
    "TokenLayout": "tokens",
    "VisualModel": "modeling",
    "TokenImagePipeline": "pipelines",
    "open_image": "image",
    "load_images": "image",
    "to_pil": "image",
    "make_strip": "image",
    "make_grid": "image",
    "open_dataset": "data",
    "image_generators": "rng",
    "prune": "pruning",
    "to_int8": "layers.packed",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vistok.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
