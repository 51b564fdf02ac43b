"""Official xAR checkpoints to XAR and back: same tensors, other names.

    official                                                   here
    z_proj, z_proj_ln; decoder_embed; pred                     encoder_in, in_norm; decoder_in; out
    encoder_pos_embed_learned, decoder_... [1, S, D]           encoder_positions, decoder_positions [S, D], a row a slot
    class_emb, time_embed.mlp                                  classes.table, time_mlp
    {encoder,decoder}_blocks.I.mlp.fc1_g, fc1_x                ....mlp.gate_up, joined
    {encoder,decoder}_blocks.I.ada_lin.1                       ....modulation
    mask, attn.rope.freqs, freqs_cos, freqs_sin                none: they follow from the order, and are compared with that where given

The released code knows one order, square cells on a square grid; the mask tells the size of a cell, the tables that of the grid.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, plain_names, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.generators.order import OrderConfig
from vistok.generators.xar import XAR, XARConfig

WEIGHT_NAMES = ("xar.pth", "xAR-B.pth", "xAR-L.pth", "xAR-H.pth", "model.safetensors", "checkpoint-last.pth")
WRAPPERS = {True: ("model_ema", "model", "module", "state_dict"), False: ("model", "module", "state_dict")}
RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width, for files without the rope tables
_PARTS = {
    "encoder_in": "z_proj",
    "in_norm": "z_proj_ln",
    "decoder_in": "decoder_embed",
    "out": "pred",
    "classes.table": "class_emb",
    "time_mlp.0": "time_embed.mlp.0",
    "time_mlp.2": "time_embed.mlp.2",
    "encoder_norm": "encoder_norm",
    "decoder_norm": "decoder_norm",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "mlp.out": "mlp.fc2",
    "modulation": "ada_lin.1",
}
_DERIVED = re.compile(r"mask|(encoder|decoder)_blocks\.\d+\.attn\.rope\.(freqs|freqs_cos|freqs_sin)")


def _names(key: str) -> tuple[str, ...]:
    """Official keys of one of ours: one, or the two that are joined here."""
    if key in ("encoder_positions", "decoder_positions"):
        return (key.replace("positions", "pos_embed_learned"),)
    block, part, leaf = re.fullmatch(r"((?:en|de)coder_blocks\.\d+\.)?(.+)\.(\w+)", key).groups(default="")
    if part == "mlp.gate_up":
        return f"{block}mlp.fc1_g.{leaf}", f"{block}mlp.fc1_x.{leaf}"
    return (f"{block}{_PARTS[part]}.{leaf}",)


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours under their official names and shapes."""
    state = {}
    for key, value in tensors.items():
        names = _names(key)
        state.update(zip(names, value.chunk(2)) if len(names) == 2 else [(names[0], value[None] if key.endswith("_positions") else value)])
    return state


def _derived(model: XAR) -> dict[str, Tensor]:
    """Official tensors that follow from the config."""
    settings, half = model.settings, model.settings.width // model.settings.num_heads // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
    angles = (model.order.coordinates[:, :, None] * frequencies).repeat_interleave(2, -1).flatten(1)
    out = {"mask": torch.zeros(1, 1, model.order.num_slots, model.order.num_slots).masked_fill(~model.order.mask(), float("-inf"))}
    for half_name, depth in (("encoder", settings.encoder_depth), ("decoder", settings.decoder_depth)):
        for i in range(depth):
            rope = f"{half_name}_blocks.{i}.attn.rope."
            out |= {f"{rope}freqs": frequencies, f"{rope}freqs_cos": angles.cos(), f"{rope}freqs_sin": angles.sin()}
    return out


def official_state(model: XAR) -> dict[str, Tensor]:
    """The weights of a model under their official names and shapes, with the tables that follow from its config.

    Raises ValueError: its order is not square cells on a square grid, which is all the official code reads.
    """
    order = model.settings.order
    if order.kind != "cell" or len(set(order.layout_shape)) > 1:
        raise ValueError(f"xAR's format holds square cells on a square grid; this model has {order.kind} on {order.layout_shape}")
    return {**_weights(model.state_dict()), **_derived(model)}


def from_official(path: str | os.PathLike, *, ema: bool = True, **overrides) -> XAR:
    """XAR of an official checkpoint, strictly, in eval mode.

    path: a flat state dict (`xAR-B.pth`, `.safetensors`), a training checkpoint, or a folder with one of the usual names.
    ema: of a training checkpoint, the averaged weights where it has them. overrides: fields of XARConfig that the file does not say
    (classes; num_heads and order where it lacks the rope tables or the mask).
    Raises ValueError: keys or shapes that are not xAR's, all of them named, or tables that its order does not make. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = plain_names(read_state(file, wrappers=WRAPPERS[bool(ema)]), str(file))
    config = XARConfig(**{**_measured(file, state, overrides), **overrides})
    with torch.device("meta"):
        expected = shapes_of(_weights(XAR(config).state_dict()))
    given = {name: value for name, value in state.items() if not _DERIVED.fullmatch(name)}
    check_shapes(str(file), "xAR", expected, shapes_of(given))
    model = XAR(config)
    _check_derived(file, state, _derived(model))
    model.load_state_dict({key: _joined(key, value, state) for key, value in model.state_dict().items()}, strict=True)
    return model.eval()


def _joined(key: str, ours: Tensor, state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name] for name in _names(key)]).view(ours.shape).to(ours.dtype)


def _check_derived(file: Path, state: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    found = {name: value for name, value in state.items() if _DERIVED.fullmatch(name)}
    wanted = {name: tuple(value.shape) for name, value in tables.items() if name in found}
    check_shapes(str(file), "xAR", wanted, shapes_of(found))
    # another machine's cosine, or half precision on disk, is still the same table
    wrong = [
        name for name, value in found.items() if not torch.allclose(value.float(), tables[name], atol=1e-2 if value.itemsize < 4 else 1e-4)
    ]
    if wrong:
        raise ValueError(f"{file}: {', '.join(sorted(wrong)[:10])} do not hold what the order makes")


def _measured(file: Path, state: dict[str, Tensor], overrides: dict) -> dict:
    """What the shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != rank or not state[key].numel():
            raise ValueError(f"{file} is no xAR checkpoint: {key} must be there with {rank} axes, got {_shown(state, key)}")
        return tuple(state[key].shape)

    width, code_dim = shape("z_proj.weight", 2)
    slots = shape("encoder_pos_embed_learned", 3)[1]
    blocks = {(match[1], match[2]) for key in state if (match := re.match(r"(encoder|decoder)_blocks\.(\d+)\.", key))}
    depths = {half: sum(name == half for name, _ in blocks) for half in ("encoder", "decoder")}
    some = "encoder" if depths["encoder"] else "decoder"
    out = {
        "code_dim": code_dim,
        "width": width,
        "encoder_depth": depths["encoder"],
        "decoder_depth": depths["decoder"],
        "hidden": shape(f"{some}_blocks.0.mlp.fc2.weight", 2)[1],
        "num_classes": shape("class_emb.weight", 2)[0] - 1,
    }
    if "num_heads" not in overrides:
        rope = state.get(f"{some}_blocks.0.attn.rope.freqs")
        if rope is None and width not in RELEASED_HEADS:
            raise ValueError(f"{file} has no rope tables to tell the heads of a width of {width}; give num_heads=")
        out["num_heads"] = RELEASED_HEADS[width] if rope is None else max(width // max(4 * rope.numel(), 1), 1)
    if "order" not in overrides:
        side = round(slots**0.5)
        mask = state.get("mask")
        tokens = slots // 4 if mask is None else int((mask.flatten()[:slots] == 0).sum())
        cell = round(tokens**0.5)
        if side * side != slots or cell * cell != tokens or not cell or side % cell:
            raise ValueError(f"{file}: {slots} slots in entities of {tokens} are no square cells on a square grid; give order=")
        out["order"] = OrderConfig(kind="cell", layout_shape=(side, side), size=cell)
    return out


def _shown(state: dict[str, Tensor], key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "nothing"


def to_official(model: XAR, folder: str | os.PathLike) -> None:
    """Write `xar.pth`, a flat state dict as xAR's own scripts read it. Raises ValueError: the order is not square cells."""
    folder = Path(folder)
    state = {key: value.detach().cpu().clone() for key, value in official_state(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHT_NAMES[0])
