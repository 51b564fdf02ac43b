"""Official checkpoints to vistok models and back, one file a source; importing this package loads no torch.

Every format module has `from_official(path, **overrides) -> model` and `to_official(model, folder)`. Nothing in a file is imported or run.
"""

import difflib
import importlib
import os
from pathlib import Path

FORMATS = {
    "flextok": "vistok.convert.flextok",
    "kl-vae": "vistok.convert.kl_vae",
    "kl-16": "vistok.convert.ldm_vae",
    "maskgit": "vistok.convert.maskgit",
    "rar": "vistok.convert.rar",
    "titok": "vistok.convert.titok",
    "llamagen": "vistok.convert.llamagen",
    "var": "vistok.convert.var",
    "xar": "vistok.convert.xar",
    "seed": "vistok.convert.seed",
    "tokenflow": "vistok.convert.tokenflow",
    "tokenflow-t2i": "vistok.convert.tokenflow_t2i",
    "lavit": "vistok.convert.lavit",
}


def _module(source_format: str):
    if source_format not in FORMATS:
        near = difflib.get_close_matches(source_format, FORMATS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(FORMATS))}"
        raise ValueError(f"no checkpoint format {source_format!r}; {hint}")
    return importlib.import_module(FORMATS[source_format])


def convert(source_format: str, path: str | os.PathLike, out: str | os.PathLike, **overrides) -> Path:
    """Read an official checkpoint and write it as a vistok model folder; returns that folder.

    overrides: config fields that the checkpoint does not say (see the format's `from_official`).
    Raises ValueError: an unknown format, or a checkpoint that is not exactly of that format. OSError: nothing there.
    """
    _module(source_format).from_official(path, **overrides).save_pretrained(out)
    return Path(out)


def export(source_format: str, path: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Read a vistok model (folder, bundled name or hub id) and write it in an official format; returns the folder written."""
    from vistok.registry import load

    _module(source_format).to_official(load(path), out)
    return Path(out)
