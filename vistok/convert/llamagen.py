"""LlamaGen checkpoints (the VQ tokenizer, the class and the caption GPT) to VQGAN and GPT and back: same tensors, other names.

    official                                               here
    VQ    conv_blocks.L.res.i, attn.i (1x1 convolutions)   levels.L.resnets.i, attentions.i (linear layers)
          mid.0, mid.1, mid.2                              middle.resnets.0, attentions.0, resnets.1
          quantize.embedding                               quantizer.codebook
          quantize.codebook_used                           none: the training run's usage window, written as zeros
    GPT   attention.wqkv, wo                               attention.qkv, proj
          feed_forward.w1, w3 [F, D]; w2                   mlp.gate_up [2 F, D]; out
          cls_embedding.embedding_table                    prefix.classes.table
          cls_embedding.cap_proj.fc1, fc2                  prefix.caption.mlp.0, 2
          cls_embedding.uncond_embedding                   prefix.caption.null

A checkpoint does not say its image size, grid, head count or text model: known sizes have the published ones, else give them as overrides.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, plain_names, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.generators.gpt import GPT, GPTConfig
from vistok.modeling import VisualModel
from vistok.quantizers.vq import TRAINING_STATE
from vistok.tokenizers.vqgan import VQGAN, VQGANConfig

FILE_NAME = "model.pt"
ENTRIES = ("ema", "model", "module", "state_dict")  # where published files hold the weights; averaged ones are the better ones
USAGE_WINDOW = ("quantize.codebook_used", 65536)
_TRAINING_STATE = frozenset(f"quantizer.{name}" for name in TRAINING_STATE)
# (width, depth) -> heads of the published sizes: B, L, XL, XXL, XXXL, 1B, 3B, 7B
_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (2560, 48): 40, (2048, 22): 32, (3200, 24): 32, (4096, 32): 32}

# -- names of the tokenizer: (ours, official), first match wins -------------------------------------------------------------------------
_VQ_NAMES = [
    (r"to_code\.(.+)", r"quant_conv.\1"),
    (r"from_code\.(.+)", r"post_quant_conv.\1"),
    (r"quantizer\.codebook", r"quantize.embedding.weight"),
    (r"(encoder|decoder)\.stem\.(.+)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.norm\.(.+)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.head\.(.+)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.resnets\.0\.(.+)", r"\1.mid.0.\2"),
    (r"(encoder|decoder)\.middle\.attentions\.0\.(.+)", r"\1.mid.1.\2"),
    (r"(encoder|decoder)\.middle\.resnets\.1\.(.+)", r"\1.mid.2.\2"),
    (r"(encoder|decoder)\.levels\.(\d+)\.resnets\.(.+)", r"\1.conv_blocks.\2.res.\3"),
    (r"(encoder|decoder)\.levels\.(\d+)\.attentions\.(.+)", r"\1.conv_blocks.\2.attn.\3"),
    (r"encoder\.levels\.(\d+)\.downsamplers\.0\.(.+)", r"encoder.conv_blocks.\1.downsample.\2"),
    (r"decoder\.levels\.(\d+)\.upsamplers\.0\.(.+)", r"decoder.conv_blocks.\1.upsample.\2"),
]
_PARTS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}
_PART = re.compile("|".join(rf"(?<=\.){re.escape(part)}(?=\.)" for part in _PARTS))


def vq_name(ours: str) -> str:
    """Official key of one of VQGAN's. Raises ValueError: it has none."""
    for pattern, official in _VQ_NAMES:
        if re.fullmatch(pattern, ours):
            return _PART.sub(lambda match: _PARTS[match[0]], re.sub(pattern, official, ours))
    raise ValueError(f"{ours} has no name in LlamaGen's tokenizer")


# -- names of the generator -------------------------------------------------------------------------------------------------------------
_GPT_NAMES = {
    "embedding.weight": ("tok_embeddings.weight",),
    "norm.weight": ("norm.weight",),
    "head.weight": ("output.weight",),
    "prefix.classes.table.weight": ("cls_embedding.embedding_table.weight",),
    "prefix.caption.null": ("cls_embedding.uncond_embedding",),
    "prefix.caption.mlp.0.weight": ("cls_embedding.cap_proj.fc1.weight",),
    "prefix.caption.mlp.2.weight": ("cls_embedding.cap_proj.fc2.weight",),
}
_BLOCK_NAMES = {
    "attention_norm.weight": ("attention_norm.weight",),
    "attention.qkv.weight": ("attention.wqkv.weight",),
    "attention.proj.weight": ("attention.wo.weight",),
    "mlp_norm.weight": ("ffn_norm.weight",),
    "mlp.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "mlp.out.weight": ("feed_forward.w2.weight",),
}


def _gpt_names(ours: str) -> tuple[str, ...]:
    """Official tensors that one of ours is made of, joined along axis 0."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    if block and block[2] in _BLOCK_NAMES:
        return tuple(f"layers.{block[1]}.{name}" for name in _BLOCK_NAMES[block[2]])
    if ours not in _GPT_NAMES:
        raise ValueError(f"LlamaGen's format has no form for {ours}: only class or left-padded caption models on a grid are LlamaGen's")
    return _GPT_NAMES[ours]


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def from_official(path: str | os.PathLike, **overrides) -> VQGAN | GPT:
    """The model in a LlamaGen checkpoint, tokenizer or generator, whichever it is, in eval mode.

    path: a `.pt` file as published (DDP, DeepSpeed, FSDP, averaged or not), or `.safetensors` with the same keys; or a folder with one.
    overrides: config fields that the file does not say: image_size; layout_shape, num_heads, text, classes, condition_attention.
    Raises ValueError: keys or shapes that are not LlamaGen's; all of them are named.
    """
    file = find_state(path, (FILE_NAME, "model.safetensors"))
    state = plain_names(read_state(file, wrappers=ENTRIES), str(file))
    is_tokenizer = "quantize.embedding.weight" in state
    if not is_tokenizer and "tok_embeddings.weight" not in state:
        raise ValueError(f"{path} is no LlamaGen checkpoint: it has neither quantize.embedding.weight nor tok_embeddings.weight")
    state.pop(USAGE_WINDOW[0], None)
    shapes = shapes_of(state)
    try:
        config = (vq_config if is_tokenizer else gpt_config)(shapes, **overrides)
    except KeyError as error:
        raise ValueError(f"{path} is no complete LlamaGen checkpoint: it lacks {error.args[0]}") from error
    model = VQGAN(config) if is_tokenizer else GPT(config)
    expected = {key: value for key, value in model.state_dict().items() if key not in _TRAINING_STATE}
    names = {key: _official_names(model, key) for key in expected}
    check_shapes(str(path), type(model).__name__, shapes_of(official_state(model)), shapes)
    loaded = {key: torch.cat([state[name] for name in parts]) if len(parts) > 1 else state[parts[0]] for key, parts in names.items()}
    fitted = {key: value.reshape(expected[key].shape).to(expected[key].dtype) for key, value in loaded.items()}
    model.load_state_dict({**model.state_dict(), **fitted})
    return model.eval()


def vq_config(shapes: dict[str, tuple[int, ...]], **overrides) -> VQGANConfig:
    """VQGANConfig read off the shapes of an official tokenizer. Raises KeyError: a key that says something is not there."""
    levels = _count(shapes, r"encoder\.conv_blocks\.(\d+)\.")
    width = shapes["encoder.conv_in.weight"][0]
    K, d = shapes["quantize.embedding.weight"]
    fields = {
        "width": width,
        "multipliers": tuple(shapes[f"encoder.conv_blocks.{i}.res.0.conv1.weight"][0] // width for i in range(levels)),
        "blocks": _count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": shapes["quant_conv.weight"][1],
        "codebook_size": K,
        "code_dim": d,
    }
    return VQGANConfig(**{**fields, **overrides})


def gpt_config(shapes: dict[str, tuple[int, ...]], **overrides) -> GPTConfig:
    """GPTConfig read off the shapes of an official generator.

    Raises KeyError: a key that says something is not there. ValueError: the head count is not known for such a size.
    """
    K, width = shapes["tok_embeddings.weight"]
    depth = _count(shapes, r"layers\.(\d+)\.")
    fields = {
        "codebook_size": K,
        "layout_shape": (16, 16),
        "width": width,
        "depth": depth,
        "hidden": shapes["layers.0.feed_forward.w1.weight"][0],
        "condition_attention": "uniform",
    }
    if "num_heads" not in overrides:
        if (width, depth) not in _HEADS:
            raise ValueError(f"no published LlamaGen is {width} wide and {depth} deep, so its head count is not known; give num_heads=")
        fields["num_heads"] = _HEADS[width, depth]
    if "cls_embedding.uncond_embedding" in shapes:
        tokens, features = shapes["cls_embedding.uncond_embedding"]
        fields |= dict(text="google/flan-t5-xl", caption_tokens=tokens, caption_width=features, caption_padding="hidden")
    else:
        fields["num_classes"] = shapes["cls_embedding.embedding_table.weight"][0] - 1
    return GPTConfig(**{**fields, **overrides})


def _count(shapes: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in shapes if (match := re.match(pattern, key))), default=-1)


def _official_names(model: VisualModel, ours: str) -> tuple[str, ...]:
    return (vq_name(ours),) if isinstance(model, VQGAN) else _gpt_names(ours)


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def official_state(model: VQGAN | GPT, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of a model, or other tensors named and shaped like some of them (gradients), under their official names.

    Raises ValueError: the model has parts that LlamaGen's format cannot say.
    """
    out: dict[str, Tensor] = {}
    for key, value in (model.state_dict() if tensors is None else tensors).items():
        if key in _TRAINING_STATE:
            continue
        parts = _official_names(model, key)
        for name, part in zip(parts, value.chunk(len(parts))):
            is_linear_there = isinstance(model, GPT) or ".attentions." not in key or part.ndim != 2
            out[name] = part if is_linear_there else part[:, :, None, None]
    return out


def to_official(model: VQGAN | GPT, folder: str | os.PathLike) -> None:
    """Write `model.pt` as LlamaGen's own scripts read it: {"model": weights}.

    Raises ValueError: the model has parts that the format cannot say.
    """
    state = {key: value.detach().cpu().clone() for key, value in official_state(model).items()}
    if isinstance(model, VQGAN):
        if model.settings.pixel_patch != 1:
            raise ValueError(f"pixel_patch={model.settings.pixel_patch} is ours alone: LlamaGen's tokenizer folds no pixels")
        state[USAGE_WINDOW[0]] = torch.zeros(USAGE_WINDOW[1])
    else:
        _check_exportable(model.settings)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, folder / FILE_NAME)


def _check_exportable(settings: GPTConfig) -> None:
    h, w = settings.layout_shape
    if settings.condition_attention != "uniform":
        raise ValueError('LlamaGen turns its condition tokens to zero: only condition_attention="uniform" has an official form')
    if h != w or settings.num_tokens != h * w:
        raise ValueError(f"LlamaGen generates whole square grids, not {settings.num_tokens} tokens of {h} x {w}")
