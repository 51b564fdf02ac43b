"""Official TokenFlow checkpoints to TokenFlow and back: same tensors, other names.

    official                                           here
    encoder, decoder, quant_conv, post_quant_conv      pixel_encoder, pixel_decoder, to_pixel_code, from_pixel_code (names as LlamaGen's)
    encoder_vqkd (CLIP, SigLIP or timm names)          semantic_encoder
    decoder_vqkd (BEiT names; biases of q and v)       semantic_decoder (a bias of k changes nothing: it moves all logits of a query alike)
    encode_task_layer, decode_task_layer               to_semantic_code, from_semantic
    quantize.embedding_vqkd [K, 32], _vqgan [K, 8]     quantizer.quantizer.codebook [K, 40]
    scaling_layer.shift, scale                         mean, std of the config
    quantize.codebook_used; SigLIP's last layer, post_layernorm and head: never used; written as zeros, since official loaders ask for them

A checkpoint does not say its scales, image size and head counts: published ones are known, others are given as overrides.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vistok.convert.llamagen import vq_name
from vistok.convert.pickles import find_state, plain_names, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.quantizers.vq import TRAINING_STATE
from vistok.tokenizers.tokenflow import CLIP_MEAN, CLIP_STD, TokenFlow, TokenFlowConfig
from vistok.tokenizers.tokenflow_nets import SemanticEncoderConfig

FILE_NAME = "tokenflow.pt"
ENTRIES = ("ema", "model", "state_dict")
USAGE_WINDOW = ("quantize.codebook_used", 131072)
SIGLIP_SIZE = 384  # the size SigLIP-based models decode to, whatever goes in
SCALES = {
    14: (1, 2, 4, 6, 8, 10, 12, 14),
    16: (1, 2, 4, 6, 8, 10, 12, 14, 16),
    27: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
}
_TOWER = "encoder_vqkd.vision_model."
_NEVER_USED = re.compile(
    rf"quantize\.codebook_used|scaling_layer\.(shift|scale)|{re.escape(_TOWER)}(post_layernorm|head|embeddings\.position_ids).*"
)

# -- names: (ours, official parts, how they are one tensor), first match wins -------------------------------------------------------------
_CLIP, _LAYER, _BEIT = r"encoder_vqkd.transformer.resblocks.\1", rf"{_TOWER}encoder.layers.\1", r"decoder_vqkd.blocks.\1"
_NAMES = {
    "any": [
        (r"to_pixel_code\.(.+)", (r"quant_conv.\1",), "same"),
        (r"from_pixel_code\.(.+)", (r"post_quant_conv.\1",), "same"),
        (r"to_semantic_code\.(.+)", (r"encode_task_layer.\1",), "same"),
        (r"from_semantic\.(.+)", (r"decode_task_layer.\1",), "same"),
        (r"quantizer\.quantizer\.codebook", ("quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight"), "channels"),
        (rf"quantizer\.quantizer\.({'|'.join(TRAINING_STATE)})", (), "ours alone"),
        (r"semantic_decoder\.cls", ("decoder_vqkd.cls_token",), "same"),
        (r"semantic_decoder\.positions", ("decoder_vqkd.pos_embed",), "same"),
        (r"semantic_decoder\.patches\.(.+)", (r"decoder_vqkd.patch_embed.proj.\1",), "same"),
        (r"semantic_decoder\.post_norm\.(.+)", (r"decoder_vqkd.fc_norm.\1",), "same"),
        (r"semantic_decoder\.blocks\.(\d+)\.attention_norm\.(.+)", (_BEIT + r".norm1.\2",), "same"),
        (r"semantic_decoder\.blocks\.(\d+)\.attention\.qkv\.bias", (_BEIT + ".attn.q_bias", _BEIT + ".attn.v_bias"), "no k"),
        (r"semantic_decoder\.blocks\.(\d+)\.attention\.(.+)", (_BEIT + r".attn.\2",), "same"),
        (r"semantic_decoder\.blocks\.(\d+)\.mlp_norm\.(.+)", (_BEIT + r".norm2.\2",), "same"),
        (r"semantic_decoder\.blocks\.(\d+)\.mlp\.up\.(.+)", (_BEIT + r".mlp.fc1.\2",), "same"),
        (r"semantic_decoder\.blocks\.(\d+)\.mlp\.out\.(.+)", (_BEIT + r".mlp.fc2.\2",), "same"),
    ],
    "clip": [
        (r"semantic_encoder\.cls", ("encoder_vqkd.class_embedding",), "same"),
        (r"semantic_encoder\.positions", ("encoder_vqkd.positional_embedding",), "same"),
        (r"semantic_encoder\.patches\.(.+)", (r"encoder_vqkd.conv1.\1",), "same"),
        (r"semantic_encoder\.(pre|post)_norm\.(.+)", (r"encoder_vqkd.ln_\1.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention_norm\.(.+)", (_CLIP + r".ln_1.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention\.qkv\.(.+)", (_CLIP + r".attn.in_proj_\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention\.proj\.(.+)", (_CLIP + r".attn.out_proj.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp_norm\.(.+)", (_CLIP + r".ln_2.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp\.up\.(.+)", (_CLIP + r".mlp.c_fc.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp\.out\.(.+)", (_CLIP + r".mlp.c_proj.\2",), "same"),
    ],
    "siglip": [
        (r"semantic_encoder\.positions", (f"{_TOWER}embeddings.position_embedding.weight",), "same"),
        (r"semantic_encoder\.patches\.(.+)", (rf"{_TOWER}embeddings.patch_embedding.\1",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention_norm\.(.+)", (_LAYER + r".layer_norm1.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention\.qkv\.(.+)", tuple(rf"{_LAYER}.self_attn.{n}_proj.\2" for n in "qkv"), "rows"),
        (r"semantic_encoder\.blocks\.(\d+)\.attention\.proj\.(.+)", (_LAYER + r".self_attn.out_proj.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp_norm\.(.+)", (_LAYER + r".layer_norm2.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp\.up\.(.+)", (_LAYER + r".mlp.fc1.\2",), "same"),
        (r"semantic_encoder\.blocks\.(\d+)\.mlp\.out\.(.+)", (_LAYER + r".mlp.fc2.\2",), "same"),
    ],
    "timm": [(r"semantic_encoder\.tower\.(.+)", (r"encoder_vqkd.\1",), "same")],
}  # fmt: skip
# transformers has SigLIP's names for CLIP too
_TRANSFORMERS = [
    *_NAMES["siglip"],
    (r"semantic_encoder\.cls", (f"{_TOWER}embeddings.class_embedding",), "same"),
    (r"semantic_encoder\.pre_norm\.(.+)", (rf"{_TOWER}pre_layrnorm.\1",), "same"),
    (r"semantic_encoder\.post_norm\.(.+)", (rf"{_TOWER}post_layernorm.\1",), "same"),
]


def _official_names(settings: TokenFlowConfig, ours: str) -> tuple[tuple[str, ...], str]:
    """The official tensors that one of ours is made of, and how."""
    if ours.startswith("pixel_"):
        return (vq_name(ours.removeprefix("pixel_")),), "same"
    for pattern, parts, how in (*_NAMES["any"], *_NAMES[settings.encoder.kind]):
        if match := re.fullmatch(pattern, ours):
            return tuple(match.expand(part) for part in parts), how
    raise ValueError(f"{ours} has no name in TokenFlow's format")


def _to_official(settings: TokenFlowConfig, ours: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our tensors as the official ones."""
    names, how = _official_names(settings, ours)
    if not names:
        return {}
    if how == "channels":
        return dict(zip(names, tensor.split((settings.semantic_dim, settings.pixel_dim), dim=1)))
    if how == "rows":
        return dict(zip(names, tensor.chunk(3)))
    if how == "no k":
        return dict(zip(names, tensor.chunk(3)[::2]))
    if ours.startswith("pixel_") and ".attentions." in ours and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]  # 1x1 convolutions there, linear layers here
    if ours in ("semantic_decoder.cls", "semantic_decoder.positions"):
        tensor = tensor.view(1, -1, tensor.shape[-1])
    return {names[0]: tensor}


def _to_ours(how: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    if how == "channels":
        return torch.cat(parts, dim=1)
    if how == "no k":
        return torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
    return torch.cat(parts).reshape(shape)


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def from_official(path: str | os.PathLike, **overrides) -> TokenFlow:
    """TokenFlow of an official checkpoint, strictly, in eval mode.

    path: a `.pt` file as published or as written by the training script, `.safetensors` with the same keys, or a folder with one.
    overrides: fields of TokenFlowConfig that the file does not say (image_size=(256, 256) and its scales for TokenFlow-B at 256 px), and
    encoder_heads, encoder_depth, timm_name of its semantic encoder.
    Raises ValueError: keys or shapes that are not TokenFlow's (all at fault are named), or sizes that must be given. OSError: no file.
    """
    file = find_state(path, (FILE_NAME, "model.safetensors"))
    state = plain_names(read_state(file, wrappers=ENTRIES), str(file))
    settings = config_of(state, **overrides)
    with torch.device("meta"):
        expected = TokenFlow(settings).state_dict()
    wanted = {name: tuple(part.shape) for key, value in expected.items() for name, part in _to_official(settings, key, value).items()}
    unused = [name for name in state if name not in wanted and _is_unused(name, settings)]
    check_shapes(str(file), "TokenFlow", wanted, {name: tuple(value.shape) for name, value in state.items() if name not in unused})
    model = TokenFlow(settings)
    loaded = {}
    for key, value in model.state_dict().items():
        names, how = _official_names(settings, key)
        loaded[key] = _to_ours(how, [state[name] for name in names], value.shape).to(value.dtype) if names else value
    model.load_state_dict(loaded, strict=True)
    return model.eval()


def _is_unused(name: str, settings: TokenFlowConfig) -> bool:
    last = f"{_TOWER}encoder.layers.{settings.encoder.depth}."
    return bool(_NEVER_USED.fullmatch(name)) or (settings.encoder.kind == "siglip" and name.startswith(last))


def load_tower(model: TokenFlow, tower: nn.Module) -> None:
    """Copy a teacher's weights into the semantic encoder: of transformers' CLIP or SigLIP vision tower, or of the same timm model.

    Raises ValueError: it is of another kind or shape.
    """
    settings, state = model.settings, {f"{_TOWER}{key}": value for key, value in tower.state_dict().items()}
    if settings.encoder.kind == "timm":
        ours, theirs = model.semantic_encoder.state_dict(), tower.state_dict()
        check_shapes("the teacher", settings.encoder.timm_name, shapes_of(ours), shapes_of(theirs))
        model.semantic_encoder.load_state_dict(theirs)
        return
    names = {}
    for key in model.semantic_encoder.state_dict():
        match, parts = next((m, parts) for pattern, parts, _ in _TRANSFORMERS if (m := re.fullmatch(pattern, f"semantic_encoder.{key}")))
        names[key] = tuple(match.expand(part) for part in parts)
    lacking = sorted(name for parts in names.values() for name in parts if name not in state)
    if lacking:
        raise ValueError(
            f"the teacher is no {settings.encoder.kind} tower: it lacks {', '.join(n.removeprefix(_TOWER) for n in lacking[:5])}"
        )
    loaded = {key: torch.cat([state[name] for name in parts]) for key, parts in names.items()}
    check_shapes("the teacher", "the semantic encoder", shapes_of(model.semantic_encoder.state_dict()), shapes_of(loaded))
    model.semantic_encoder.load_state_dict(loaded)


def config_of(state: dict[str, Tensor], **overrides) -> TokenFlowConfig:
    """TokenFlowConfig read off an official state dict; overrides as for `from_official`.

    Raises ValueError: a key that says something is not there, or something no key says is not given.
    """
    shapes = shapes_of(state)
    try:
        encoder = _encoder_config(shapes, {key: overrides.pop(key, None) for key in ("encoder_heads", "encoder_depth", "timm_name")})
        fields = _measured(shapes)
    except KeyError as error:
        raise ValueError(f"this is no complete TokenFlow checkpoint: it lacks {error.args[0]}") from error
    native = encoder.table_grid * encoder.patch_size
    fields["image_size"] = (SIGLIP_SIZE,) * 2 if encoder.kind == "siglip" and native == 378 else (native, native)
    fields = {**fields, "encoder": encoder, **_normalisation(state, encoder.kind), **overrides}
    grid = fields["semantic_decoder_grid"] if encoder.kind == "timm" else fields["image_size"][0] // encoder.patch_size
    if "scales" not in fields:
        if grid not in SCALES:
            raise ValueError(f"no published TokenFlow has a {grid} x {grid} grid, so its scales are not known; give scales=")
        fields["scales"] = SCALES[grid]
    if encoder.kind == "siglip" and fields["image_size"][0] != SIGLIP_SIZE:
        fields.setdefault("decoded_size", SIGLIP_SIZE)
    return TokenFlowConfig(**fields)


def _encoder_config(shapes: dict[str, tuple[int, ...]], said: dict) -> SemanticEncoderConfig:
    """The semantic encoder from its shapes; said: encoder_heads, encoder_depth and timm_name, None where not given."""
    E = shapes["encode_task_layer.0.weight"][0]
    if "encoder_vqkd.class_embedding" in shapes:
        kind, table, patches = "clip", "encoder_vqkd.positional_embedding", "encoder_vqkd.conv1.weight"
        depth = _count(shapes, r"encoder_vqkd\.transformer\.resblocks\.(\d+)\.")
        hidden = shapes["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"][0]
    elif any(key.startswith(_TOWER) for key in shapes):
        kind, table, patches = "siglip", f"{_TOWER}embeddings.position_embedding.weight", f"{_TOWER}embeddings.patch_embedding.weight"
        depth = _count(shapes, re.escape(_TOWER) + r"encoder\.layers\.(\d+)\.") - 1  # tokens leave before the last layer
        hidden = shapes[f"{_TOWER}encoder.layers.0.mlp.fc1.weight"][0]
    else:
        grid = math.isqrt(shapes["decoder_vqkd.pos_embed"][1] - 1)
        return SemanticEncoderConfig(kind="timm", timm_name=said["timm_name"] or "vitamin_xlarge_256", width=E, table_grid=grid)
    heads = said["encoder_heads"] or (16 if (kind, E) == ("siglip", 1152) else E // 64 if E % 64 == 0 else None)
    if heads is None:
        raise ValueError(f"no published {kind} encoder is {E} wide, so its head count is not known; give encoder_heads=")
    return SemanticEncoderConfig(
        kind=kind, width=E, depth=depth if said["encoder_depth"] is None else said["encoder_depth"], num_heads=heads, hidden=hidden,
        patch_size=shapes[patches][-1], table_grid=math.isqrt(shapes[table][0]),
    )  # fmt: skip


def _measured(shapes: dict[str, tuple[int, ...]]) -> dict:
    """What the shapes decide beside the semantic encoder."""
    encoder_widths = _level_widths(shapes, "encoder")
    decoder_widths = _level_widths(shapes, "decoder")[::-1]
    width, decoder_width = shapes["encoder.conv_in.weight"][0], math.gcd(*decoder_widths)
    K, semantic_dim = shapes["quantize.embedding_vqkd.weight"]
    return {
        "codebook_size": K,
        "semantic_dim": semantic_dim,
        "pixel_dim": shapes["quantize.embedding_vqgan.weight"][1],
        "latent_channels": shapes["quant_conv.weight"][1],
        "pixel_width": width,
        "pixel_multipliers": tuple(channels // width for channels in encoder_widths),
        "pixel_blocks": _count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_width": decoder_width,
        "decoder_multipliers": tuple(channels // decoder_width for channels in decoder_widths),
        "decoder_blocks": _count(shapes, r"decoder\.conv_blocks\.0\.res\.(\d+)\.") - 1,
        "semantic_decoder_depth": _count(shapes, r"decoder_vqkd\.blocks\.(\d+)\."),
        "semantic_decoder_hidden": shapes["decoder_vqkd.blocks.0.mlp.fc1.weight"][0],
        "semantic_decoder_grid": math.isqrt(shapes["decoder_vqkd.pos_embed"][1] - 1),
        "teacher_width": shapes["decode_task_layer.2.weight"][0],
    }


def _normalisation(state: dict[str, Tensor], kind: str) -> dict:
    """mean and std: the file's where it has them (averaged weights leave them out), else the kind's; CLIP gets raw images."""
    if "scaling_layer.shift" in state and "scaling_layer.scale" in state:
        mean, std = (tuple(state[f"scaling_layer.{name}"].float().flatten().tolist()) for name in ("shift", "scale"))
    elif kind == "clip":
        mean = std = None
    else:
        mean, std = (CLIP_MEAN, CLIP_STD) if kind == "timm" else ((0.5,) * 3, (0.5,) * 3)
    return {"mean": mean, "std": std}


def _level_widths(shapes: dict[str, tuple[int, ...]], side: str) -> list[int]:
    """Channels of each level of a CNN, in the order it computes them."""
    levels = _count(shapes, rf"{side}\.conv_blocks\.(\d+)\.")
    if not levels:
        raise KeyError(f"{side}.conv_blocks")
    return [shapes[f"{side}.conv_blocks.{i}.res.0.conv1.weight"][0] for i in range(levels)]


def _count(shapes: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in shapes if (match := re.match(pattern, key))), default=-1)


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def official_state(model: TokenFlow, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of a model, or other tensors named and shaped like some of them (gradients), under their official names."""
    chosen = model.state_dict() if tensors is None else tensors
    return {name: part for key, value in chosen.items() for name, part in _to_official(model.settings, key, value).items()}


def to_official(model: TokenFlow, folder: str | os.PathLike) -> None:
    """Write `tokenflow.pt` as the official scripts read it: {"model": weights}.

    Raises ValueError: the model folds pixels (pixel_patch), which theirs cannot.
    """
    if model.settings.pixel_patch != 1:
        raise ValueError(f"pixel_patch={model.settings.pixel_patch} is ours alone: the official TokenFlow folds no pixels")
    state = {key: value.detach().cpu().clone() for key, value in official_state(model).items()}
    state[USAGE_WINDOW[0]] = torch.zeros(USAGE_WINDOW[1])
    settings = model.settings
    if settings.mean is not None:
        for name, values in (("shift", settings.mean), ("scale", settings.std)):
            state[f"scaling_layer.{name}"] = torch.tensor(values).view(1, 3, 1, 1)
    if settings.encoder.kind == "siglip":
        state |= _unused_siglip(settings.encoder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, folder / FILE_NAME)


def _unused_siglip(encoder: SemanticEncoderConfig) -> dict[str, Tensor]:
    """The last layer, final norm and pooling head that SigLIP has and TokenFlow never runs, as zeros."""
    E, F = encoder.width, encoder.hidden
    pair = {"weight": (E,), "bias": (E,)}
    square, mlp = {"weight": (E, E), "bias": (E,)}, {"fc1.weight": (F, E), "fc1.bias": (F,), "fc2.weight": (E, F), "fc2.bias": (E,)}
    layer = {f"{norm}.{k}": v for norm in ("layer_norm1", "layer_norm2") for k, v in pair.items()}
    layer |= {f"self_attn.{proj}.{k}": v for proj in ("q_proj", "k_proj", "v_proj", "out_proj") for k, v in square.items()}
    layer |= {f"mlp.{k}": v for k, v in mlp.items()}
    head = {"probe": (1, 1, E), "attention.in_proj_weight": (3 * E, E), "attention.in_proj_bias": (3 * E,)}
    head |= {f"attention.out_proj.{k}": v for k, v in square.items()} | {f"layernorm.{k}": v for k, v in pair.items()}
    head |= {f"mlp.{k}": v for k, v in mlp.items()}
    shapes = {f"encoder.layers.{encoder.depth}.{k}": v for k, v in layer.items()} | {f"head.{k}": v for k, v in head.items()}
    shapes |= {f"post_layernorm.{k}": v for k, v in pair.items()}
    return {_TOWER + name: torch.zeros(shape) for name, shape in shapes.items()}
