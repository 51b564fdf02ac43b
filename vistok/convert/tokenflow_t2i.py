"""TokenFlow's text-to-image checkpoints (a transformers Llama with additions) to TokenFlowT2I and back: same tensors, other names.

official                                            here
self_attn.q_proj, k_proj, v_proj; o_proj            layers.i.qkv, proj
self_attn.qknorm.query_norm, key_norm               layers.i.q_norm, k_norm
input_layernorm, post_attention_layernorm           layers.i.attention_norm, mlp_norm        (behind the branches)
mlp.gate_proj, up_proj; down_proj                   layers.i.mlp.gate_up; out
mm_projector.0, 2; lvl_embed; pos_1LC               projector.0, 2; levels; positions
tokenizer.quantize.embedding_vqkd, _vqgan           quantizer.quantizer.codebook, or from the tokenizer given
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.convert.writing import write_weights
from vistok.generators.tokenflow_t2i import TokenFlowT2I, TokenFlowT2IConfig
from vistok.tokenizers.tokenflow import TokenFlow

FILE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_CODES = ("tokenizer.quantize.embedding_vqkd.weight", "tokenizer.quantize.embedding_vqgan.weight")
_CODEBOOK = "quantizer.quantizer.codebook"
_NAMES = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "positions": ("model.pos_1LC",),
    "levels.weight": ("model.lvl_embed.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    _CODEBOOK: _CODES,
}
_LAYER = {
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "proj.weight": ("self_attn.o_proj.weight",),
    "q_norm.weight": ("self_attn.qknorm.query_norm.weight",),
    "k_norm.weight": ("self_attn.qknorm.key_norm.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.out.weight": ("mlp.down_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
}


def _official_names(ours: str) -> tuple[str, ...]:
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", ours):
        return tuple(f"model.layers.{match[1]}.{name}" for name in _LAYER[match[2]])
    return (ours.replace("projector.", "model.mm_projector."),) if ours.startswith("projector.") else _NAMES[ours]


def from_official(path: str | os.PathLike, *, tokenizer: TokenFlow | None = None, **overrides) -> TokenFlowT2I:
    """TokenFlowT2I of an official checkpoint, strictly, in eval mode.

    path: a folder with model.safetensors or its shards, or one file. tokenizer: whose codes it predicts, where the file does not hold them.
    overrides: fields of TokenFlowT2IConfig that no tensor says: scales, image_token_start, pad_token, norm_eps.
    Raises ValueError: keys or shapes that are not this model's; all of them are named. OSError: nothing there.
    """
    state = _read(Path(path))
    if tokenizer is not None:
        split = (tokenizer.settings.semantic_dim, tokenizer.settings.pixel_dim)
        state |= dict(zip(_CODES, tokenizer.quantizer.quantizer.codebook.detach().split(split, dim=1)))
    try:
        settings = _config(state, overrides)
    except KeyError as error:
        raise ValueError(f"{path} is no complete TokenFlow text-to-image checkpoint: it lacks {error.args[0]}") from error
    state = {key: value for key, value in state.items() if not key.startswith(("model.vision_tower.", "tokenizer.")) or key in _CODES}
    with torch.device("meta"):
        expected = TokenFlowT2I(settings)
    wanted = shapes_of(official_state(expected))
    check_shapes(str(path), "TokenFlowT2I", wanted, shapes_of(state))
    model = TokenFlowT2I(settings)
    model.load_state_dict(
        {key: torch.cat([state[name] for name in _official_names(key)], dim=int(key == _CODEBOOK)) for key in model.state_dict()}
    )
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    index = path / INDEX_NAME
    if not index.is_file():
        return read_state(find_state(path, (FILE_NAME,)))
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    foreign = [name for name in shards if Path(name).name != name]
    if foreign:
        raise ValueError(f"{index} names {foreign[0]!r}, which is not a file beside it")
    return {key: value for name in shards for key, value in read_state(find_state(path / name, ())).items()}


def _config(state: dict[str, Tensor], overrides: dict) -> TokenFlowT2IConfig:
    """What the shapes decide, then the overrides. Raises KeyError: a tensor that says something is not there."""
    V, D = state["model.embed_tokens.weight"].shape
    K = state[_CODES[0]].shape[0]
    layers = [int(match[1]) for key in state if (match := re.match(r"model\.layers\.(\d+)\.", key))]
    fields = {
        "vocab_size": V,
        "codebook_size": K,
        "group_dims": tuple(state[name].shape[1] for name in _CODES),
        "width": D,
        "depth": 1 + max(layers, default=-1),
        "num_heads": D // state["model.layers.0.self_attn.qknorm.query_norm.weight"].shape[0],
        "hidden": state["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    return TokenFlowT2IConfig(**{**fields, **overrides})


def official_state(model: TokenFlowT2I) -> dict[str, Tensor]:
    """Weights of a model under their official names."""
    out: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        names = _official_names(key)
        parts = value.split(model.settings.group_dims, dim=1) if key == _CODEBOOK else value.chunk(len(names))
        out |= dict(zip(names, parts))
    return out


def to_official(model: TokenFlowT2I, folder: str | os.PathLike) -> None:
    """Write model.safetensors under the official names, the tokenizer's codes among them."""
    write_weights(Path(folder) / FILE_NAME, official_state(model))
