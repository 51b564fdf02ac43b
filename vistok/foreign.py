"""Models of timm and transformers, opened from their own folders: `vistok.load` takes them beside its own.

A folder of timm says `architecture`, one of transformers `model_type`; only classes that those libraries have registered are built, and no
code of the folder is run.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def is_foreign(config: dict) -> bool:
    """Whether a config.json is one of timm or transformers."""
    return "_class_name" not in config and ("architecture" in config or "model_type" in config)


def load_foreign(folder: Path, config: dict) -> nn.Module:
    """The model in eval mode and float32, whatever is on disk. A model of transformers that has one gets its `processor` as an attribute.

    Raises ImportError naming the extra where transformers is missing. ValueError: timm knows no such architecture.
    """
    return _load_timm(folder, config) if "architecture" in config else _load_transformers(folder)


def _load_timm(folder: Path, config: dict) -> nn.Module:
    import timm

    import vistok.pruning.backbones  # noqa: F401  registers RaftMLP and Strip-MLP with timm

    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{folder}: timm has no architecture {config['architecture']!r}")
    if not (folder / "model.safetensors").is_file():
        raise OSError(f"{folder} has no model.safetensors; timm's other formats are opened by timm itself")
    classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    model = timm.create_model(config["architecture"], **{**classes, **config.get("model_args", {})})
    model.load_state_dict(load_file(folder / "model.safetensors"))  # every name and shape has to fit; float16 becomes float32
    model.label_names = config.get("label_names", [])
    return model.eval()


def _load_transformers(folder: Path) -> nn.Module:
    try:
        from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging as progress
    except ImportError as error:
        raise ImportError(f"{folder} holds a model of transformers: pip install vistok[vlm]") from error
    was_shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        kind = AutoModelForImageTextToText if (folder / "processor_config.json").is_file() else AutoModel
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if was_shown:
            progress.enable_progress_bar()
    if (folder / "processor_config.json").is_file():
        model.processor = AutoProcessor.from_pretrained(folder)
    return model
