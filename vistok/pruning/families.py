"""What differs between the vision-language models of transformers, as one table, and where their parts are.

A family is a `config.model_type`. Everything else in `vistok.pruning` treats all of them alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LINEAR = (
    "its linear-attention or convolution layers fold every token into one state, so a token that is dropped in the middle is not masked"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What may be done to one family."""

    tower: str = ""
    """How vision patches become features: "grid" (squares of patches in raster order), "tiles" (LLaVA-NeXT), "blocks" (Qwen: patches of a
    feature lie side by side); "": not mapped, so methods that read the tower's attention are refused."""
    not_inside: str = ""
    """Why no token can leave inside the language model; "": it can."""
    has_positions_from_one: bool = False
    """`generate` counts positions from 1 (PaliGemma)."""
    is_pointwise: bool = False
    """The projector maps each patch by itself, so patches can be merged in front of it, as the papers do."""


FAMILIES: dict[str, Family] = {
    "llava": Family(tower="grid", is_pointwise=True),
    "vipllava": Family(tower="grid", is_pointwise=True),
    "video_llava": Family(tower="grid", is_pointwise=True),
    "llava_next": Family(tower="tiles"),
    "llava_onevision": Family(),
    "qwen2_vl": Family(tower="blocks"),
    "qwen2_5_vl": Family(tower="blocks"),
    "qwen3_vl": Family(tower="blocks"),
    "qwen3_vl_moe": Family(tower="blocks"),
    "qwen3_5": Family(tower="blocks", not_inside=_LINEAR),
    "glm4v": Family(tower="blocks"),
    "smolvlm": Family(tower="grid"),
    "idefics3": Family(tower="grid"),
    "idefics2": Family(),
    "internvl": Family(tower="grid"),
    "gemma3": Family(tower="grid"),
    "gemma4": Family(),
    "paligemma": Family(tower="grid", has_positions_from_one=True),
    "mistral3": Family(),
    "aya_vision": Family(tower="grid"),
    "cohere2_vision": Family(tower="grid"),
    "chameleon": Family(),
    "lfm2_vl": Family(not_inside=_LINEAR),
}

CROSS_ATTENTION = ("mllama",)
QUERY_FORMER = ("blip-2", "instructblip")

_PRIVATE = ("_prepare_position_ids_for_generation", "_prepare_multimodal_encoder_kwargs_for_generation")
_IDS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}


def kind_of(model: nn.Module) -> str:
    """The family name of a model: its `config.model_type`, or its class name where it has none."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def family_of(model: nn.Module) -> Family:
    """The table's entry. Raises ValueError, with the reason, for a model whose visual tokens are not in its prompt or not known."""
    kind = kind_of(model)
    if kind not in FAMILIES:
        raise ValueError(f"{kind} is not supported: token pruning knows {', '.join([*FAMILIES, *CROSS_ATTENTION, *QUERY_FORMER])}")
    missing = [name for name in _PRIVATE if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"this {type(model).__name__} has no {' and '.join(missing)}: give the ...ForConditionalGeneration, on transformers 5"
        )
    return FAMILIES[kind]


def placeholder_id(model: nn.Module, modality: str) -> int | None:
    """The id that stands for one feature of the modality ("image" or "video") in a prompt."""
    return next((value for name in _IDS[modality] if isinstance(value := getattr(model.config, name, None), int)), None)


def visual_mask(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, L] bool: the placeholders of images and videos in the prompts."""
    known = [value for modality in _IDS if (value := placeholder_id(model, modality)) is not None]
    return torch.isin(ids, torch.tensor(known, device=ids.device))


def text_model(model: nn.Module) -> nn.Module:
    """The part of a vision-language model that owns the decoder layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    while not hasattr(decoder, "layers"):
        inner = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
        if inner is None or inner is decoder:
            raise ValueError(f"no decoder layers found in {type(model).__name__}")
        decoder = inner
    return decoder


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a decoder or vision layer, None for a layer of another kind (linear attention, convolution)."""
    return next((getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name)), None)


def vision_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the (image) vision tower, in order."""
    base = model.base_model
    for name in ("vision_tower", "vision_model", "visual", "image_tower"):
        tower = getattr(base, name, None)
        if tower is None:
            continue
        for part in tower.modules():
            if isinstance(part, nn.ModuleList) and len(part) and attention_of(part[0]) is not None:
                return list(part)
    raise ValueError(f"no layers of a vision tower found in {type(model).__name__}")


def is_flash(model: nn.Module) -> bool:
    """Whether the language model runs a FlashAttention kernel, which takes masks as [B, L] and reads positions by itself."""
    return "flash" in (text_model(model).config._attn_implementation or "")


def sliding_window(model: nn.Module) -> int | None:
    """The window of the language model's sliding layers, None where every layer sees everything."""
    config = text_model(model).config
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def newline_of(model: nn.Module) -> Tensor | None:
    """[D]: the learned feature that LLaVA-NeXT and OneVision put at the end of every row of patches; it is no patch and always stays."""
    return getattr(model.base_model, "image_newline", None)
