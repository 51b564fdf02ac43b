"""Official MaskGIT generators of TiTok (a Hugging Face BERT) to MaskGIT and back: same tensors, other names.

Shapes in the file decide widths, depth and counts; the head count is the configuration's or the caller's, else 16.

    official (behind `model.`)                              here
    embeddings.word_embeddings [K + 2 + C, D]               embedding          rows: codes, mask, classes, no class
    encoder.layer.I.attention.self.query, key, value        blocks.I.attention.qkv [3 D, D]
    encoder.layer.I.attention.output.LayerNorm              blocks.I.attention_norm
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.safe_reader import read_json_object
from vistok.convert.strict import check_shapes, shape_reader, shapes_of
from vistok.convert.writing import CONFIG_NAME, write_config, write_weights
from vistok.generators.maskgit import MaskGIT, MaskGITConfig

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_IGNORED = {"model.embeddings.position_ids"}  # a counter that older transformers wrote
_WHOLE = {
    "embedding.weight": "model.embeddings.word_embeddings.weight",
    "positions": "model.embeddings.position_embeddings.weight",
    "segments": "model.embeddings.token_type_embeddings.weight",
    "norm_in": "model.embeddings.LayerNorm",
    "head": "model.lm_head",
}
_BLOCK = {
    "attention.proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def official_names(key: str) -> tuple[str, ...]:
    """The official keys that one of ours is made of, joined along axis 0."""
    if key in _WHOLE:
        return (_WHOLE[key],)
    head, _, leaf = key.rpartition(".")
    if head in _WHOLE:
        return (f"{_WHOLE[head]}.{leaf}",)
    _, index, part = head.split(".", 2)
    layer = f"model.encoder.layer.{index}"
    if part == "attention.qkv":
        return tuple(f"{layer}.attention.self.{name}.{leaf}" for name in ("query", "key", "value"))
    return (f"{layer}.{_BLOCK[part]}.{leaf}",)


def official_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under their official names."""
    names = {key: official_names(key) for key in tensors}
    return {name: part for key, value in tensors.items() for name, part in zip(names[key], value.chunk(len(names[key])))}


def from_official(path: str | os.PathLike, *, config: dict | None = None, **overrides) -> MaskGIT:
    """MaskGIT of an official checkpoint, strictly.

    path: a folder with model.safetensors or pytorch_model.bin, or such a file. config: the official configuration as plain data, where it
    is not beside the file. overrides: fields of MaskGITConfig (num_heads, classes, layout_shape, ...).
    Raises ValueError: keys that are not this generator's; every key at fault is named. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = {key: value for key, value in read_state(file).items() if key not in _IGNORED}
    if config is None and (file.parent / CONFIG_NAME).is_file():
        config = read_json_object(file.parent / CONFIG_NAME)
    shapes = shapes_of(state)
    settings = MaskGITConfig(**{**_measured(file, shapes), **_said(config or {}), **overrides})
    with torch.device("meta"):
        expected = MaskGIT(settings).state_dict()
    check_shapes(str(file), "MaskGIT", shapes_of(official_state(expected)), shapes)
    model = MaskGIT(settings)
    model.load_state_dict({key: torch.cat([state[name] for name in official_names(key)]) for key in expected}, strict=True)
    return model.eval()


def _measured(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """What the shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""

    shape = shape_reader(shapes, f"{file} is no MaskGIT checkpoint of TiTok")
    rows, width = shape("model.embeddings.word_embeddings.weight", 2)
    codes = shape("model.lm_head.weight", 2)[0]
    depth = len({match[1] for key in shapes if (match := re.match(r"model\.encoder\.layer\.(\d+)\.", key))})
    fields = {
        "codebook_size": codes,
        "num_classes": rows - codes - 2,
        "layout_shape": (shape("model.embeddings.position_embeddings.weight", 2)[0] - 1,),
        "width": width,
        "depth": depth,
        "hidden": shape("model.encoder.layer.0.intermediate.dense.weight", 2)[0],
    }
    return fields


def _said(config: dict) -> dict:
    """What a configuration says that no shape tells."""
    model = config.get("model", {})
    said = model.get("generator", {}) if isinstance(model, dict) else {}
    known = {"num_heads": "num_attention_heads", "num_steps": "num_steps"}
    return {ours: int(said[official]) for ours, official in known.items() if isinstance(said, dict) and official in said}


def to_official(model: MaskGIT, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in the official format; dtype: of the weights on disk, the model's own by default."""
    settings = model.settings
    generator = {
        "model_type": "ViT",
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.hidden,
        "num_steps": settings.num_steps,
        "image_seq_len": model.max_tokens,
        "condition_num_classes": settings.num_classes,
    }
    config = {"model": {"generator": generator, "vq_model": {"codebook_size": settings.codebook_size}}}
    write_weights(Path(folder) / WEIGHT_NAMES[0], official_state(model.state_dict()), dtype=dtype)
    write_config(Path(folder), config)
