"""Official SEED-2 tokenizers (`seed_quantizer.pt`, and checkpoints of its training code) to SEED and back: same tensors, other names.

Shapes in the file decide widths, depths, counts and the kind of head; heads of the attention layers are SEED-2's unless given.

    official                                              here
    visual_encoder.blocks.I.attn.q_bias, v_bias [C]       vision.blocks.I.attention.qkv.bias [3 C], 0 for the keys; may be missing
    Qformer.bert...attention.self.query, key, value       qformer.layers.I.attention.qkv [3 D, D]
    Qformer.bert...crossattention.self.key, value         qformer.layers.I.cross.key_value [2 D, C]
    ...intermediate_query, output_query                   mlp                   (intermediate, output: text_mlp)
    query_tokens, pos_embed, pos_embed_image [1, R, D]    qformer.registers, semantic_positions, generation_positions [R, D]
    blocks, blocks_image                                  semantic_blocks, generation_blocks
    image_down, distill_image_proj                        head.layers, head.proj
    Reverse_Qformer, reverse_tokens                       head.qformer
    vision_proj, text_proj, temp                          text                  (checkpoints of stage I)

A bias on the keys changes no attention weight, so writing leaves out one that training may have made.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.rules import Rule, both, to_official_names
from vistok.convert.strict import check_shapes, shape_reader, shapes_of
from vistok.tokenizers.seed import CODES, SEED, SEEDConfig, SEEDTextConfig, SEEDVisionConfig
from vistok.tokenizers.seed_qformer import QFormerConfig

log = logging.getLogger("vistok")

WEIGHT_NAMES = ("seed_quantizer.pt", "seed_quantizer.safetensors", "model.safetensors", "pytorch_model.bin")
CAUSAL_REGISTERS = 32  # the reference code masks at exactly this many
# Constant buffers, and heads of BLIP-2 that neither stage of SEED uses.
_IGNORED = re.compile(r"(Reverse_)?Qformer\.bert\.embeddings\.position_ids|(Reverse_)?Qformer\.cls\..+|itm_head\..+")


# -- names ------------------------------------------------------------------------------------------------------------------------------


def block_rules(ours: str, official: str, *, biases: Literal["qkv", "q and v", "none"]) -> list[Rule]:
    """A ViT block. biases: the official one has one bias for q, k and v, one for q and one for v (EVA), or none of them."""
    found = both(f"{ours}.attention_norm", f"{official}.norm1") + both(f"{ours}.mlp_norm", f"{official}.norm2")
    found += both(f"{ours}.mlp.up", f"{official}.mlp.fc1") + both(f"{ours}.mlp.out", f"{official}.mlp.fc2")
    found += both(f"{ours}.attention.proj", f"{official}.attn.proj")
    qkv = f"{official}.attn.qkv"
    if biases == "qkv":
        return found + both(f"{ours}.attention.qkv", qkv)
    found.append(Rule(f"{ours}.attention.qkv.weight", (f"{qkv}.weight",)))
    if biases == "q and v":
        found.append(Rule(f"{ours}.attention.qkv.bias", (f"{official}.attn.q_bias", f"{official}.attn.v_bias"), "no_key_bias"))
    return found


def _qformer_rules(ours: str, official: str, config: QFormerConfig, *, has_text: bool) -> list[Rule]:
    found = both(f"{ours}.norm", f"{official}.bert.embeddings.LayerNorm")
    for i in range(config.depth):
        here, there = f"{ours}.layers.{i}", f"{official}.bert.encoder.layer.{i}"
        found += both(f"{here}.attention.qkv", *(f"{there}.attention.self.{name}" for name in ("query", "key", "value")))
        parts = [("attention.proj", "attention_end", "attention.output")]
        if i % config.cross_every == 0:
            found += both(f"{here}.cross.query", f"{there}.crossattention.self.query")
            found += both(f"{here}.cross.key_value", *(f"{there}.crossattention.self.{name}" for name in ("key", "value")))
            parts.append(("cross.proj", "cross_end", "crossattention.output"))
        for mlp, suffix in (("mlp", "_query"), ("text_mlp", "")) if has_text else (("mlp", "_query"),):
            found += both(f"{here}.{mlp}.up", f"{there}.intermediate{suffix}.dense")
            parts.append((f"{mlp}.out", f"{mlp}_end", f"output{suffix}"))
        for layer, end, name in parts:
            found += both(f"{here}.{layer}", f"{there}.{name}.dense") + both(f"{here}.{end}.norm", f"{there}.{name}.LayerNorm")
    return found


def rules(settings: SEEDConfig) -> list[Rule]:
    """Every tensor of a SEED without a pixel decoder."""
    found = [
        Rule("vision.cls", ("visual_encoder.cls_token",), "rows"),
        Rule("vision.positions", ("visual_encoder.pos_embed",), "row"),
        Rule("qformer.registers", ("query_tokens",), "row"),
        Rule("semantic_positions", ("pos_embed",), "row"),
        Rule("generation_positions", ("pos_embed_image",), "row"),
        Rule("quantizer.codebook", ("quantize.embedding.weight",)),
    ]
    found += both("vision.patches", "visual_encoder.patch_embed.proj") + both("vision_norm", "ln_vision")
    for i in range(settings.vision.depth):
        biases = "q and v" if settings.vision.qkv_bias else "none"
        found += block_rules(f"vision.blocks.{i}", f"visual_encoder.blocks.{i}", biases=biases)
    found += _qformer_rules("qformer", "Qformer", settings.qformer, has_text=settings.text is not None)
    for i in (0, 2):
        found += both(f"to_code.{i}", f"encode_task_layer.{i}") + both(f"from_code.{i}", f"decode_task_layer.{i}")
    for i in range(settings.block_depth):
        found += block_rules(f"semantic_blocks.{i}", f"blocks.{i}", biases="qkv")
        found += block_rules(f"generation_blocks.{i}", f"blocks_image.{i}", biases="qkv")
    found += both("head.proj", "distill_image_proj")
    if settings.head == "mlp":
        found += [Rule(f"head.layers.{i}.weight", (f"image_down.{2 * i}.weight",)) for i in range(len(settings.head_widths))]
    else:
        found += [Rule("head.qformer.registers", ("reverse_tokens",), "row")]
        shape = replace(settings.qformer, depth=settings.reverse_depth)
        found += _qformer_rules("head.qformer", "Reverse_Qformer", shape, has_text=False)
    if settings.text is not None:
        found += both("text.image_proj", "vision_proj") + both("text.text_proj", "text_proj") + [Rule("text.temperature", ("temp",))]
        for ours in ("words", "positions") if settings.text.vocab_size else ():
            found += [Rule(f"text.{ours}.weight", (f"Qformer.bert.embeddings.{ours.removesuffix('s')}_embeddings.weight",))]
    return found


def official_state(settings: SEEDConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours (weights, or gradients of some of them) under their official names."""
    return to_official_names(rules(settings), tensors)


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def from_official(
    path: str | os.PathLike,
    *,
    vision_heads: int = 16,
    qformer_heads: int = 12,
    vision_eps: float = 1e-6,
    qformer_eps: float = 1e-12,
    **overrides,
) -> SEED:
    """SEED of an official checkpoint, strictly.

    path: a folder with seed_quantizer.pt, or a .pt or .safetensors file; pickles are read as plain tensors only.
    vision_heads, qformer_heads, vision_eps, qformer_eps: what no shape tells. overrides: fields of SEEDConfig (block_heads, is_causal,
    image_size of a grid that is not square).
    Raises ValueError: keys that are not SEED's; every one at fault is named. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = read_state(file)
    ignored = sorted(name for name in state if _IGNORED.fullmatch(name))
    if ignored:
        log.info("%s: not used, so not read: %s", file, ", ".join(ignored))
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    shapes = shapes_of(state)
    fields = _measured(file, shapes, overrides.get("image_size"))
    fields["vision"] = replace(fields["vision"], num_heads=vision_heads, norm_eps=vision_eps)
    fields["qformer"] = replace(fields["qformer"], num_heads=qformer_heads, norm_eps=qformer_eps)
    settings = SEEDConfig(**{**fields, **overrides})
    with torch.device("meta"):
        expected = SEED(settings).state_dict()
    table = rules(settings)
    check_shapes(str(file), "SEED", shapes_of(official_state(settings, expected)), shapes)
    model = SEED(settings)
    model.load_state_dict({rule.ours: rule.to_ours([state[name] for name in rule.official]) for rule in table}, strict=True)
    return model.eval()


def _measured(file: Path, shapes: dict[str, tuple[int, ...]], image_size: tuple[int, int] | None) -> dict:
    """What the shapes decide, as fields of SEEDConfig; heads are placeholders of 1.

    Raises ValueError: a tensor to measure is not there or has another rank, or the grid of patches is not square and has no image_size.
    """

    shape = shape_reader(shapes, f"{file} is no SEED tokenizer")

    def depth(prefix: str, matches: Callable[[str], bool] = lambda key: True) -> list[int]:
        parts = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix) and matches(key)}
        return sorted(int(part) for part in parts if part.isdecimal())

    vision_width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    num_patches = shape("visual_encoder.pos_embed", 3)[1] - 1
    side = round(num_patches**0.5)
    if image_size is None and side * side != num_patches:
        raise ValueError(f"{file} has a position table of {num_patches} patches, which is no square; give image_size=")
    _, num_registers, width = shape("query_tokens", 3)
    towers = ("Qformer.bert.encoder.layer.", "Reverse_Qformer.bert.encoder.layer.")
    crossed = [i for tower in towers for i in depth(tower, lambda key: ".crossattention." in key) if i]
    codebook_size, code_dim = shape("quantize.embedding.weight", 2)
    fields = {
        "image_size": (side * patch, side * patch),
        "vision": SEEDVisionConfig(
            patch_size=patch,
            width=vision_width,
            depth=len(depth("visual_encoder.blocks.")),
            num_heads=1,
            hidden=shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
            qkv_bias="visual_encoder.blocks.0.attn.q_bias" in shapes,
        ),
        "qformer": QFormerConfig(
            width=width,
            depth=len(depth(towers[0])),
            num_heads=1,
            hidden=shape("Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 2)[0],
            cross_every=min(crossed, default=max(2, *(len(depth(tower)) for tower in towers))),
        ),
        "num_registers": num_registers,
        "is_causal": num_registers == CAUSAL_REGISTERS,
        "quantizer": replace(CODES, codebook_size=codebook_size, code_dim=code_dim),
        "block_depth": len(depth("blocks.")),
        "embedding_dim": shape("distill_image_proj.weight", 2)[0],
    }
    if "reverse_tokens" in shapes:
        fields |= {"head": "reverse", "reverse_depth": len(depth(towers[1]))}
    else:
        fields["head_widths"] = tuple(shape(f"image_down.{i}.weight", 2)[0] for i in depth("image_down."))
    if "temp" in shapes:
        words = shapes.get("Qformer.bert.embeddings.word_embeddings.weight", (0,))[0]
        positions = shapes.get("Qformer.bert.embeddings.position_embeddings.weight", (0,))[0]
        fields["text"] = SEEDTextConfig(vocab_size=words, max_words=positions, embedding_dim=shape("vision_proj.weight", 2)[0])
    return fields


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def to_official(
    model: SEED,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    num_positions: int = 512,
    without_pixels: bool = False,
) -> None:
    """Write `seed_quantizer.pt` in the official format, a flat dictionary of tensors.

    dtype: of the weights on disk, the model's own by default. num_positions: length of the constant buffer `position_ids` that the format
    carries. without_pixels: leave out the pixel decoder.
    Raises ValueError: the model has a pixel decoder, which the format cannot hold, or a quantizer that is more than a codebook.
    """
    if model.pixels is not None and not without_pixels:
        raise ValueError("the official format has no place for a pixel decoder; without_pixels=True writes the rest")
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items() if not key.startswith("pixels.")}
    extra = sorted(set(tensors) - {rule.ours for rule in rules(model.settings)})
    if extra:
        raise ValueError(f"the official format has no place for {', '.join(extra)}")
    state = {key: part.to(dtype or part.dtype, copy=True).contiguous() for key, part in official_state(model.settings, tensors).items()}
    for name in ("Qformer", "Reverse_Qformer") if model.settings.head == "reverse" else ("Qformer",):
        state[f"{name}.bert.embeddings.position_ids"] = torch.arange(num_positions)[None]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHT_NAMES[0])
