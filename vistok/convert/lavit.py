"""Official LaVIT visual tokenizers to LaVIT and back: same tensors, other names.

Official files, safetensors or pickled (`.bin`), in one folder:

    tokenizer_encoder              selector, merger, codebook; the vision transformer too, under `encoder.`, where it has no file of its own
    eva_vitg_psz14                 the vision transformer
    tokenizer_decoder              feature decoder with the conditioning of SD 1.5 ("lowres")
    highres_tokenizer_decoder      the same for SDXL ("highres")

or one file with all of it under `tokenizer_encoder.` and `tokenizer_decoder.`. In the published snapshot that folder is `visual_tokenizer`;
beside it, `language_model/visual_weight` holds the merger and the projection as they are for understanding: what a language model reads
images by, while the tokens it writes go through the merger of `tokenizer_encoder`.

    official                                       here
    cls_token, pos_embed, query_embed [1, ...]     without the leading axes
    attn.q_bias, attn.v_bias                       attention.qkv.bias, its middle third zero
    token_cross_attn.key, value                    cross_attention.key_value
    unet_attnpool.q_proj, k_proj, v_proj           conditioning.pool.qkv

The transformer's last `norm` and `head` are not read: LaVIT takes the features before them.
"""

import logging
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.rules import Rule, both, to_official_names
from vistok.convert.strict import check_shapes, num_children, shape_reader, shapes_of
from vistok.convert.writing import write_weights
from vistok.quantizers import VQConfig
from vistok.tokenizers.lavit import LaVIT, LaVITConfig

log = logging.getLogger("vistok")

ENCODER, DECODER, VISION = "tokenizer_encoder", {"lowres": "tokenizer_decoder", "highres": "highres_tokenizer_decoder"}, "eva_vitg_psz14"
SNAPSHOT, UNDERSTANDING = "visual_tokenizer", ("language_model", "visual_weight")
WEIGHTS = ("generation", "understanding")
_SUFFIXES = (".safetensors", ".bin", ".pt")
_OWNERS = re.compile(r"^(model\.)?(visual_tokenizer\.|tokenizer_encoder\.)?")
_UNDERSTOOD = ("causal_encoder.", "vit_proj.")
_IGNORED = re.compile(r"tokenizer_encoder\.encoder\.(norm|head)\..+")
PUBLISHED_WIDTH, PUBLISHED_HEADS = 1408, 16

# -- names ------------------------------------------------------------------------------------------------------------------------------


def _mlp(ours: str, official: str) -> list[Rule]:
    return both(f"{ours}.mlp.up", f"{official}.mlp.fc1") + both(f"{ours}.mlp.out", f"{official}.mlp.fc2")


def _reading_block(ours: str, official: str, self_name: str, cross_name: str) -> list[Rule]:
    """A block with self-attention and cross-attention: the merger's and the decoder's."""
    cross = f"{official}.{cross_name}"
    return [
        *both(f"{ours}.self_norm", f"{official}.norm0"),
        *both(f"{ours}.self_attention.qkv", f"{official}.{self_name}.qkv"),
        *both(f"{ours}.self_attention.proj", f"{official}.{self_name}.proj"),
        *both(f"{ours}.cross_norm", f"{official}.norm1"),
        *both(f"{ours}.cross_attention.query", f"{cross}.query"),
        *both(f"{ours}.cross_attention.key_value", f"{cross}.key", f"{cross}.value"),
        *both(f"{ours}.cross_attention.proj", f"{cross}.proj"),
        *both(f"{ours}.mlp_norm", f"{official}.norm2"),
        *_mlp(ours, official),
    ]


def _vision_rules(depth: int) -> list[Rule]:
    E = "tokenizer_encoder.encoder."
    found = both("vision.patches", E + "patch_embed.proj")
    found += [Rule("vision.cls", (E + "cls_token",), "rows"), Rule("vision.positions", (E + "pos_embed",), "row")]
    for i in range(depth):
        ours, official = f"vision.blocks.{i}", f"{E}blocks.{i}"
        found += both(f"{ours}.attention_norm", f"{official}.norm1") + both(f"{ours}.mlp_norm", f"{official}.norm2") + _mlp(ours, official)
        found += [Rule(f"{ours}.attention.qkv.weight", (f"{official}.attn.qkv.weight",))]
        found += [Rule(f"{ours}.attention.qkv.bias", (f"{official}.attn.q_bias", f"{official}.attn.v_bias"), "no_key_bias")]
        found += both(f"{ours}.attention.proj", f"{official}.attn.proj")
    return found


def rules(settings: LaVITConfig) -> list[Rule]:
    """Every tensor of a LaVIT that the official format knows."""
    E, D = "tokenizer_encoder.", "tokenizer_decoder."
    found = _vision_rules(settings.vision_depth)
    found += both("selector.norm", E + "token_predictor.in_conv.0") + both("selector.mix", E + "token_predictor.in_conv.1")
    for i in (0, 2, 4):
        found += both(f"selector.head.{i}", f"{E}token_predictor.out_conv.{i}")
    found += both("merger.origin_norm", E + "causal_encoder.ln_vision") + both("merger.norm", E + "causal_encoder.norm")
    for i in range(settings.merger_depth):
        found += _reading_block(f"merger.blocks.{i}", f"{E}causal_encoder.blocks.{i}", "token_causal_attn", "token_cross_attn")
    found += [Rule("quantizer.codebook", (E + "quantize.embedding.weight",))]
    for i in (0, 2):
        found += both(f"to_code.{i}", f"{E}encode_task_layer.{i}") + both(f"decoder.head.{i}", f"{D}decode_task_layer.{i}")
    if settings.llm_width:
        found += both("to_llm", E + "vit_proj")
    found += both("decoder.from_codes", D + "in_proj") + both("decoder.norm", D + "norm")
    found += [Rule("decoder.positions", (D + "pos_embed",), "row"), Rule("decoder.queries", (D + "query_embed",), "row")]
    for i in range(settings.decoder_depth):
        found += _reading_block(f"decoder.blocks.{i}", f"{D}blocks.{i}", "self_attn", "cross_attn")
    if len(settings.condition_sizes) == 1:
        found += both("conditioning.projections.0", D + "unet_proj")
    if len(settings.condition_sizes) == 2:
        found += both("conditioning.projections.0", D + "unet_proj_1") + both("conditioning.projections.1", D + "unet_proj_2")
        pool = D + "unet_attnpool."
        found += [Rule("conditioning.pool.positions", (pool + "positional_embedding",))]
        found += both("conditioning.pool.qkv", *(f"{pool}{name}_proj" for name in "qkv"))
        found += both("conditioning.pool.proj", pool + "c_proj")
    return found


def official_state(settings: LaVITConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under their official names, those the format does not know left out."""
    table = rules(settings)
    return to_official_names(table, {rule.ours: tensors[rule.ours] for rule in table if rule.ours in tensors})


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def read_official(path: str | os.PathLike, *, condition: str = "lowres", weights: str = "generation") -> dict[str, Tensor]:
    """All official tensors under `tokenizer_encoder.` and `tokenizer_decoder.`, from one file or the files of a folder.

    condition: which decoder of a folder, "lowres" or "highres". weights: "generation", or "understanding", which takes merger and
    projection from `visual_weight`.
    Raises OSError: a file is not there. ValueError: a file that cannot be read safely, or an unknown condition or kind of weights.
    """
    if condition not in DECODER:
        raise ValueError(f"condition={condition!r} is not known; allowed: {', '.join(DECODER)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not known; allowed: {', '.join(WEIGHTS)}")
    path = Path(path)
    if not path.is_dir():
        if weights != "generation":
            raise ValueError(f"weights={weights!r} are in a file of their own, so a folder is needed; {path} is a file")
        return read_state(find_state(path, ()))
    home = path / SNAPSHOT if (path / SNAPSHOT).is_dir() else path
    parts = {"tokenizer_encoder.": ENCODER, "tokenizer_decoder.": DECODER[condition]}
    state = {prefix + key: value for prefix, name in parts.items() for key, value in _read(home, name).items()}
    if not any(key.startswith("tokenizer_encoder.encoder.") for key in state):
        state.update({f"tokenizer_encoder.encoder.{key}": value for key, value in _read(home, VISION).items()})
    if weights == "understanding":
        folder, name = UNDERSTANDING
        beside = next((base / folder for base in (path, home.parent) if (base / folder).is_dir()), path)
        state.update(_understanding(beside, _read(beside, name), state))
    return state


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    return read_state(find_state(folder, tuple(name + suffix for suffix in _SUFFIXES)))


def _understanding(folder: Path, found: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `visual_weight` under the names they replace.

    Raises ValueError: it lacks part of the merger, or holds what is not of the merger or the projection; all at fault are named.
    """
    named = {_OWNERS.sub("", key): value for key, value in found.items()}
    replaced = {key.removeprefix("tokenizer_encoder.") for key in state if key.startswith("tokenizer_encoder.")}
    odd = sorted(key for key in named if key not in replaced or not key.startswith(_UNDERSTOOD))
    lacking = sorted(key for key in replaced if key.startswith(_UNDERSTOOD[0]) and key not in named)
    if odd or lacking:
        told = [f"it lacks {', '.join(lacking[:5])}"] * bool(lacking) + [f"it holds {', '.join(odd[:5])}"] * bool(odd)
        raise ValueError(f"{folder / UNDERSTANDING[1]} is no merger for understanding: {'; '.join(told)}")
    return {f"tokenizer_encoder.{key}": value for key, value in named.items()}


def from_official(path: str | os.PathLike, *, condition: str = "lowres", weights: str = "generation", **overrides) -> LaVIT:
    """LaVIT of an official checkpoint, strictly.

    path: a folder with the official files (the snapshot or its visual_tokenizer), or one file with all of them. condition: which decoder of
    a folder, "lowres" or "highres". weights: "generation" makes the tokens; "understanding" makes the features a language model reads
    (`encode_features`), with another merger, whose ids mean nothing to the codebook.
    overrides: fields of LaVITConfig; the heads (vision_heads, merger_heads, decoder_heads, pool_heads) are needed for any width but 1408.
    Raises ValueError: keys that are not LaVIT's; every key at fault is named. OSError: nothing there.
    """
    state = read_official(path, condition=condition, weights=weights)
    ignored = sorted(key for key in state if _IGNORED.fullmatch(key))
    if ignored:
        log.info("%s: behind the features that are used, so not read: %s", path, ", ".join(ignored))
        state = {key: value for key, value in state.items() if key not in ignored}
    fields = _measured(path, shapes_of(state))
    settings = LaVITConfig(**{**_usual_heads(path, fields, overrides), **fields, **overrides})
    with torch.device("meta"):
        expected = LaVIT(settings).state_dict()
    table = rules(settings)
    unknown = sorted(set(expected) - {rule.ours for rule in table})
    if unknown:
        raise ValueError(f"{path}: no official checkpoint holds {', '.join(unknown[:5])}; leave out the overrides that ask for them")
    check_shapes(str(path), "LaVIT", shapes_of(official_state(settings, expected)), shapes_of(state))
    model = LaVIT(settings)
    model.load_state_dict({rule.ours: rule.to_ours([state[name] for name in rule.official]) for rule in table}, strict=True)
    return model.eval()


def _measured(path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Config fields that shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""
    E, D = "tokenizer_encoder.", "tokenizer_decoder."

    shape = shape_reader(shapes, f"{path} is no LaVIT tokenizer")

    def size(key: str) -> int:
        return shape(f"{key}.weight", 2)[0]

    patch, num_patches = shape(E + "encoder.patch_embed.proj.weight", 4)[2], shape(E + "encoder.pos_embed", 3)[1] - 1
    side = patch * round(num_patches**0.5)
    codebook_size, code_dim = shape(E + "quantize.embedding.weight", 2)
    two = f"{D}unet_proj_1.weight" in shapes
    return {
        "image_size": (side, side),
        "patch_size": patch,
        "vision_width": shape(E + "encoder.pos_embed", 3)[2],
        "vision_depth": num_children(shapes, E + "encoder.blocks."),
        "vision_hidden": size(E + "encoder.blocks.0.mlp.fc1"),
        "merger_depth": num_children(shapes, E + "causal_encoder.blocks."),
        "merger_hidden": size(E + "causal_encoder.blocks.0.mlp.fc1"),
        "quantizer": VQConfig(codebook_size=codebook_size, code_dim=code_dim),
        "llm_width": size(E + "vit_proj") if f"{E}vit_proj.weight" in shapes else 0,
        "decoder_width": shape(D + "pos_embed", 3)[2],
        "decoder_depth": num_children(shapes, D + "blocks."),
        "decoder_hidden": size(D + "blocks.0.mlp.fc1"),
        "feature_width": size(D + "decode_task_layer.2"),
        "condition_sizes": tuple(size(D + name) for name in (("unet_proj_1", "unet_proj_2") if two else ("unet_proj",))),
    }


def _usual_heads(path, fields: dict, overrides: dict) -> dict:
    """Heads, which no shape tells, for the published width. Raises ValueError: another width and no override."""
    widths = {"vision_heads": "vision_width", "merger_heads": "vision_width", "decoder_heads": "decoder_width"}
    if len(fields["condition_sizes"]) == 2:
        widths["pool_heads"] = "feature_width"
    lacking = [name for name, width in widths.items() if name not in overrides and fields[width] != PUBLISHED_WIDTH]
    if lacking:
        raise ValueError(f"{path}: a checkpoint does not say {', '.join(lacking)}; give them as overrides")
    return dict.fromkeys(widths, PUBLISHED_HEADS)


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def to_official(model: LaVIT, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write `tokenizer_encoder.safetensors`, the vision transformer in it, and the decoder's file, under the official names.

    dtype: of the weights on disk, the model's own by default.
    Raises ValueError: the model has something that the format cannot say, or lacks something that it needs.
    """
    settings = model.settings
    quantizer = settings.quantizer
    if settings.merger_eps != LaVITConfig.merger_eps or quantizer.metric != "euclidean" or quantizer.groups or quantizer.update == "linear":
        raise ValueError("the official format knows merger_eps=1e-6 and one Euclidean codebook only")
    if not settings.condition_sizes or not settings.llm_width or settings.pixel_width:
        raise ValueError("the official format holds diffusion conditioning and a projection to a language model, and no pixel decoder")
    state = official_state(settings, model.state_dict())
    files = {"tokenizer_encoder.": ENCODER, "tokenizer_decoder.": DECODER["lowres" if len(settings.condition_sizes) == 1 else "highres"]}
    for prefix, name in files.items():
        part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        write_weights(Path(folder) / f"{name}.safetensors", part, dtype=dtype)
