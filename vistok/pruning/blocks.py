"""Where the hooks of a vision transformer go: one `BlockParts` a layer, for timm and for the vision towers of transformers.

    timm           VisionTransformer (ViT, DeiT, CLIP, DINOv2, SigLIP; registers, LayerScale, qk-norm) and Eva (EVA02, DINOv3)
    transformers   CLIP, SigLIP, ViT, DINOv2 with and without registers, DINOv3: the tower alone or in a model with a head

All are pre-norm blocks, x + branch(norm(x)) twice; what differs is names. A block of any other kind is refused by name. B images, N tokens,
H heads, d width of a head, P prefix tokens.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TIMM_BLOCKS = ("timm.models.vision_transformer.Block", "timm.models.eva.EvaBlock")


@dataclass(frozen=True)
class BlockParts:
    """One block: modules to hook and how to read them."""

    block: nn.Module
    attention: nn.Module
    query: nn.Module
    """Its output is the queries, [B, H, N, d] or (heads side by side) [B, N, H d]."""
    key: nn.Module
    norm: nn.Module
    """Its input is what the feed-forward branch starts from."""
    branch: nn.Module
    """Its output is (up to `finish`) what the feed-forward branch adds."""
    mlp: nn.Module
    width: int
    """H d."""
    scale: float
    mask: str
    """The keyword (or second argument) under which the attention takes an additive mask."""
    rope: str | None = None
    """The keyword under which the block takes rotary positions of the patches."""
    finish: Sequence[nn.Module] = ()
    """Applied to the branch's output before it is added."""
    map_input: nn.Module | None = None
    """Its input is the attention map, where the attention is written out."""
    rotate: Callable[[Tensor, object], Tensor] | None = None
    """(patch queries or keys [B, H, T, d], rotary positions) -> the same, turned."""

    def heads(self, x: Tensor) -> Tensor:
        """Queries or keys as [B, H, N, d]."""
        return x if x.ndim == 4 else x.unflatten(2, (-1, self.attention.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class ViTParts:
    """A whole model."""

    blocks: Sequence[BlockParts]
    num_prefix: int
    stem: nn.Module
    """Turns pixels into patches; counted once a patch."""
    heads: Sequence[nn.Module] = ()
    """What is counted once an image."""
    tower: nn.Module | None = None
    """transformers: the module whose `last_hidden_state` holds the tokens."""
    pools: Sequence[nn.Module] = ()
    """transformers: modules that pool patches inside the tower: they must see all of them, restored."""
    head_reads_patches: bool = False
    """transformers: what comes after the tower pools its patches."""


def parts_of(model: nn.Module) -> ViTParts:
    """The parts of a model. Raises ValueError naming what is not supported."""
    return _transformers_parts(model) if _is_transformers(model) else _timm_parts(model)


def is_vision_tower(model: nn.Module) -> bool:
    """Whether this is a vision model of transformers whose tokens can be reduced (not a vision-language model, which may hold one)."""
    return _is_transformers(model) and model.config.model_type in _MODEL_TYPES


def _is_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def _timm_parts(model: nn.Module) -> ViTParts:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name = type(model).__name__
    if not isinstance(model, (VisionTransformer, Eva)):
        raise ValueError(
            f"{name} is not supported: token reduction knows timm's VisionTransformer (ViT, DeiT, CLIP, DINOv2, SigLIP) and Eva, and the "
            f"vision towers of transformers ({', '.join(_TOWERS)})"
        )
    blocks = []
    for index, block in enumerate(model.blocks):
        kind = f"{type(block).__module__}.{type(block).__name__}"
        if kind not in TIMM_BLOCKS:
            known = ", ".join(known.removeprefix("timm.models.") for known in TIMM_BLOCKS)
            raise ValueError(
                f"block {index} of this {name} is a {kind.removeprefix('timm.models.')}; supported are the pre-norm blocks {known}"
            )
        attention = block.attn
        missing = [part for part in ("q_norm", "k_norm", "attn_drop") if not isinstance(getattr(attention, part, None), nn.Module)]
        if missing:
            raise ValueError(f"the attention of block {index}, {type(attention).__name__}, has no {' and '.join(missing)} to read from")
        blocks.append(
            BlockParts(
                block, attention, attention.q_norm, attention.k_norm, block.norm2, block.drop_path2, block.mlp,
                width=attention.proj.in_features, scale=attention.scale, mask="attn_mask", rope="rope", map_input=attention.attn_drop,
                rotate=_timm_rotation(attention),
            )
        )  # fmt: skip
    return ViTParts(blocks, model.num_prefix_tokens, model.patch_embed, [model.head])


def _timm_rotation(attention: nn.Module) -> Callable:
    from timm.layers import apply_rot_embed_cat

    return lambda x, rope: apply_rot_embed_cat(x, rope, half=getattr(attention, "rotate_half", False))


# model class of transformers: (path of the layers, attention, norm before the feed-forward, modules after it, number of prefix tokens)
_TOWERS = {
    "CLIPVisionModel": ("encoder.layers", "self_attn", "layer_norm2", (), lambda config: 1),
    "SiglipVisionModel": ("encoder.layers", "self_attn", "layer_norm2", (), lambda config: 0),
    "ViTModel": ("layers", "attention", "layernorm_after", ("dropout",), lambda config: 1),
    "Dinov2Model": ("encoder.layer", "attention", "norm2", ("layer_scale2", "drop_path"), lambda config: 1),
    "Dinov2WithRegistersModel": (
        "encoder.layer", "attention", "norm2", ("layer_scale2", "drop_path"), lambda config: 1 + config.num_register_tokens,
    ),
    "DINOv3ViTModel": ("model.layer", "attention", "norm2", ("layer_scale2", "drop_path"), lambda config: 1 + config.num_register_tokens),
}  # fmt: skip
_MODEL_TYPES = ("clip_vision_model", "clip", "siglip_vision_model", "siglip", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
_PATCH_READERS = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")


def _transformers_parts(model: nn.Module) -> ViTParts:
    towers = [module for module in model.modules() if type(module).__name__ in _TOWERS]
    if len(towers) != 1:
        found = "no" if not towers else f"{len(towers)}"
        raise ValueError(
            f"{type(model).__name__} is not supported: it holds {found} vision tower{'s' * (len(towers) != 1)} that token reduction knows "
            f"({', '.join(_TOWERS)})"
        )
    tower = towers[0]
    path, attention_name, norm, after, count_prefix = _TOWERS[type(tower).__name__]
    blocks = []
    for index, block in enumerate(tower.get_submodule(path)):
        attention = getattr(block, attention_name, None)
        parts = [attention, *(getattr(attention, name, None) for name in ("q_proj", "k_proj")), getattr(block, norm, None)]
        if not all(isinstance(part, nn.Module) for part in [*parts, getattr(block, "mlp", None)]):
            raise ValueError(f"layer {index} of this {type(tower).__name__}, {type(block).__name__}, is not built as this version knows it")
        finish = [module for name in after if isinstance(module := getattr(block, name, None), nn.Module)]
        scale = attention.scale if hasattr(attention, "scale") else attention.scaling
        blocks.append(
            BlockParts(
                block, *parts, block.mlp, block.mlp, attention.q_proj.out_features, scale, "attention_mask", finish=finish,
                rope="position_embeddings", rotate=_turn,
            )
        )  # fmt: skip
    head = getattr(tower, "head", None)  # SigLIP pools with attention over all patches
    inside = {id(module) for part in (tower.embeddings, tower.get_submodule(path)) for module in part.modules()}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    pools = [head] if isinstance(head, nn.Module) else []
    return ViTParts(blocks, count_prefix(tower.config), tower.embeddings, heads, tower, pools, type(model).__name__ in _PATCH_READERS)


def _turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def check_mask(parts: ViTParts) -> None:
    """Raise ValueError unless every attention takes an additive mask, which proportional attention needs."""
    for part in parts.blocks:
        if part.mask not in inspect.signature(part.attention.forward).parameters:
            raise ValueError(f"{type(part.attention).__name__} takes no {part.mask}; update timm, or turn is_proportional off")
        kernel = getattr(getattr(part.attention, "config", None), "_attn_implementation", None)
        if kernel not in (None, "sdpa", "eager"):
            raise ValueError(f"the {kernel} kernel takes no additive mask: set sdpa, or turn is_proportional off")


def weights(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> int:
    """Weights of the matrices (or convolutions) of a module: its multiply-adds for one token."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kind))
