"""Write official folders: safetensors, and a config.json beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "config.json"


def write_weights(
    file: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, its folder made where it is missing.

    dtype: on disk, each tensor's own by default. metadata: the header's strings, {"format": "pt"} by default.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # copies: safetensors refuses views that share memory
    copies = {key: value.detach().cpu().to(dtype or value.dtype, copy=True).contiguous() for key, value in state.items()}
    save_file(copies, file, metadata={"format": "pt"} if metadata is None else metadata)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json into a folder that is there."""
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
