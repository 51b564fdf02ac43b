"""Official RAR checkpoints to RAR and back: same tensors, other names.

Shapes in the file decide widths, depth and counts; the head count is that of q_norm.

    official                                       here
    pos_embed [1, N + 1024, D]                     positions [N + 1024, D]
    target_aware_pos_embed, timesteps_embeddings   targets, steps
    blocks.I.adaLN_modulation.1                    blocks.I.modulation
    adaln_before_head.adaLN_modulation.1           head_modulation
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.strict import check_shapes, shape_reader, shapes_of
from vistok.convert.writing import write_config, write_weights
from vistok.generators.rar import RAR, SPARE_POSITIONS, RARConfig

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "rar.bin")
# A causal mask that older files may carry.
_IGNORED = {"attn_mask"}
_TABLES = {"positions": "pos_embed", "targets": "target_aware_pos_embed", "steps": "timesteps_embeddings", "start": "cls_token"}
_PARTS = {
    "embedding": "embeddings",
    "head": "lm_head",
    "head_modulation": "adaln_before_head.adaLN_modulation.1",
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.out": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def official_name(key: str) -> str:
    """The official key of one of ours."""
    if key in _TABLES:
        return _TABLES[key]
    block, part, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(\w+)", key).groups(default="")
    return f"{block}{_PARTS[part]}.{leaf}"


def official_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under their official names and shapes."""
    shaped = {key: value.view(1, -1, value.shape[-1]) if key in _TABLES else value for key, value in tensors.items()}
    return {official_name(key): value for key, value in shaped.items()}


def from_official(path: str | os.PathLike, **overrides) -> RAR:
    """RAR of an official checkpoint, strictly.

    path: a folder with one of the usual weight files, or such a file. overrides: fields of RARConfig (classes, layout_shape, ...); a number
    of tokens that is a square is taken for a grid.
    Raises ValueError: keys that are not RAR's; every key at fault is named. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = {key: value for key, value in read_state(file).items() if key not in _IGNORED}
    shapes = shapes_of(state)
    settings = RARConfig(**{**_measured(file, shapes), **overrides})
    with torch.device("meta"):
        expected = RAR(settings).state_dict()
    check_shapes(str(file), "RAR", shapes_of(official_state(expected)), shapes)
    model = RAR(settings)
    model.load_state_dict({key: state[official_name(key)].view(value.shape) for key, value in expected.items()}, strict=True)
    return model.eval()


def _measured(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """What the shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""

    shape = shape_reader(shapes, f"{file} is no RAR checkpoint")
    rows, width = shape("embeddings.weight", 2)
    codes, tokens = shape("lm_head.weight", 2)[0], shape("pos_embed", 3)[1] - SPARE_POSITIONS
    side = round(max(tokens, 0) ** 0.5)
    return {
        "codebook_size": codes,
        "num_classes": rows - codes - 2,
        "layout_kind": "grid" if side * side == tokens else "sequence",
        "layout_shape": (side, side) if side * side == tokens else (tokens,),
        "width": width,
        "depth": len({match[1] for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}),
        "num_heads": width // shape("blocks.0.attn.q_norm.weight", 1)[0],
        "hidden": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }


def to_official(model: RAR, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in the official format; dtype: of the weights on disk, the model's own by default."""
    settings = model.settings
    generator = {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.hidden,
        "image_seq_len": model.max_tokens,
        "condition_num_classes": settings.num_classes,
    }
    config = {"model": {"generator": generator, "vq_model": {"codebook_size": settings.codebook_size}}}
    write_weights(Path(folder) / WEIGHT_NAMES[0], official_state(model.state_dict()), dtype=dtype)
    write_config(Path(folder), config)
