"""VAR checkpoints, the multi-scale tokenizer and the transformer, to VARVQVAE and VAR and back: same tensors, other names.

    official                                                   here
    vae   encoder.down.L, decoder.up.L (0 is the finest)       levels.L of the encoder, levels.(last - L) of the decoder
          attn.qkv [3 C, C, 1, 1]                              attentions.to_q, to_k, to_v [C, C]
          quantize.embedding                                   quantizer.quantizer.codebook
          quantize.quant_resi.qresi_ls.J, .qresi, .J           quantizer.refine.convs.J    (J phis by place, one phi, one a scale)
          quantize.ema_vocab_hit_SV                            usage
    var   pos_start, pos_1LC, class_emb, lvl_embed, word_embed start, positions, classes.table, levels, word
          blocks.I.attn.mat_qkv, q_bias, v_bias, proj          blocks.I.attention
          blocks.I.attn.scale_mul_1H11 [1, h, 1, 1]            blocks.I.attention.temperature [h]
          blocks.I.ada_lin.1, ada_gss; shared_ada_lin.1        blocks.I.modulation, offsets; shared_modulation
          lvl_1L, attn_bias_for_masking, zero_k_bias           none: they follow from the scales, and are compared with that

The transformer's file lacks the codes it is fed, so reading it takes the tokenizer too.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import PICKLED, plain_names, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.generators.var import VAR, VARConfig
from vistok.quantizers.vq import TRAINING_STATE
from vistok.tokenizers.var_vqvae import SCALES_256, VARVQVAE, ScaleCodesConfig, VARVQVAEConfig

TOKENIZER_NAME, GENERATOR_NAME = "vae.pth", "var.pth"
WRAPPERS = ("trainer", "var_wo_ddp", "vae_local", "model", "module", "state_dict")

# -- names of the tokenizer: (ours, official), first match wins -------------------------------------------------------------------------
_VAE_NAMES = [
    (r"to_code\.(.+)", r"quant_conv.\1"),
    (r"from_code\.(.+)", r"post_quant_conv.\1"),
    (r"usage", r"quantize.ema_vocab_hit_SV"),
    (r"quantizer\.quantizer\.codebook", r"quantize.embedding.weight"),
    (r"(encoder|decoder)\.stem\.(.+)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.norm\.(.+)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.head\.(.+)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.middle\.attentions\.0\.(.+)", r"\1.mid.attn_1.\2"),
    (r"(encoder|decoder)\.middle\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.levels\.(\d+)\.resnets\.(.+)", r"\1.LEVEL.\2.block.\3"),
    (r"(encoder|decoder)\.levels\.(\d+)\.attentions\.(.+)", r"\1.LEVEL.\2.attn.\3"),
    (r"encoder\.levels\.(\d+)\.downsamplers\.0\.(.+)", r"encoder.LEVEL.\1.downsample.\2"),
    (r"decoder\.levels\.(\d+)\.upsamplers\.0\.(.+)", r"decoder.LEVEL.\1.upsample.\2"),
]
_TRAINING = frozenset(f"quantizer.quantizer.{name}" for name in TRAINING_STATE)
_PARTS = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}
_PART = re.compile("|".join(rf"(?<=\.){re.escape(part)}(?=\.)" for part in _PARTS))


def _vae_name(ours: str, settings: VARVQVAEConfig) -> str:
    if phi := re.fullmatch(r"quantizer\.refine\.convs\.(\d+)\.(.+)", ours):
        place = {0: phi[1], 1: "qresi"}.get(settings.codes.num_phis, f"qresi_ls.{phi[1]}")
        return f"quantize.quant_resi.{place}.{phi[2]}"
    for pattern, official in _VAE_NAMES:
        if re.fullmatch(pattern, ours):
            name = _PART.sub(lambda match: _PARTS[match[0]], re.sub(pattern, official, ours))
            name = re.sub(r"^encoder\.LEVEL\.", "encoder.down.", name)
            level = re.match(r"decoder\.LEVEL\.(\d+)", name)
            return name if level is None else f"decoder.up.{len(settings.multipliers) - 1 - int(level[1])}" + name[level.end() :]
    raise ValueError(f"{ours} has no name in VAR's tokenizer")


# -- names of the generator -------------------------------------------------------------------------------------------------------------
_VAR_NAMES = [
    (r"start", "pos_start"),
    (r"positions", "pos_1LC"),
    (r"levels\.weight", "lvl_embed.weight"),
    (r"classes\.table\.weight", "class_emb.weight"),
    (r"word\.(.+)", r"word_embed.\1"),
    (r"shared_modulation\.(.+)", r"shared_ada_lin.1.\1"),
    (r"head_modulation\.(.+)", r"head_nm.ada_lin.1.\1"),
    (r"head\.(.+)", r"head.\1"),
    (r"(blocks\.\d+)\.attention\.qkv\.weight", r"\1.attn.mat_qkv.weight"),
    (r"(blocks\.\d+)\.attention\.temperature", r"\1.attn.scale_mul_1H11"),
    (r"(blocks\.\d+)\.attention\.(.+)", r"\1.attn.\2"),
    (r"(blocks\.\d+)\.mlp\.up\.(.+)", r"\1.ffn.fc1.\2"),
    (r"(blocks\.\d+)\.mlp\.out\.(.+)", r"\1.ffn.fc2.\2"),
    (r"(blocks\.\d+)\.modulation\.(.+)", r"\1.ada_lin.1.\2"),
    (r"(blocks\.\d+)\.offsets", r"\1.ada_gss"),
]


def _var_name(ours: str) -> str:
    for pattern, official in _VAR_NAMES:
        if re.fullmatch(pattern, ours):
            return re.sub(pattern, official, ours)
    raise ValueError(f"{ours} has no name in VAR's transformer")


def _derived(settings: VARConfig) -> dict[str, Tensor]:
    """Official tensors that follow from the config."""
    levels = torch.cat([torch.full((side * side,), number) for number, side in enumerate(settings.codes.scales)])
    bias = torch.zeros(len(levels), len(levels)).masked_fill(levels[:, None] < levels, float("-inf"))
    out = {"lvl_1L": levels[None], "attn_bias_for_masking": bias[None, None]}
    return {**out, **{f"blocks.{i}.attn.zero_k_bias": torch.zeros(settings.width) for i in range(settings.depth)}}


# -- both ways --------------------------------------------------------------------------------------------------------------------------


def official_state(model: VARVQVAE | VAR) -> dict[str, Tensor]:
    """The weights of a model under their official names and shapes; those of a VAR without its tokenizer's codes."""
    if isinstance(model, VARVQVAE):
        joined: dict[str, list[Tensor]] = {}
        for key, value in model.state_dict().items():
            if key in _TRAINING:
                continue
            is_linear = ".attentions." in key and value.ndim == 2
            joined.setdefault(_vae_name(key, model.settings), []).append(value[:, :, None, None] if is_linear else value)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}
    state = {_var_name(key): value for key, value in model.state_dict().items() if not key.startswith("quantizer.")}
    for name, value in state.items():
        if name.endswith("scale_mul_1H11"):
            state[name] = value.view(1, -1, 1, 1)
        elif name in ("pos_start", "pos_1LC"):
            state[name] = value[None]
        elif name.endswith("ada_gss"):
            state[name] = value[None, None]
    return {**state, **_derived(model.settings)}


def _built(kind: type, config: VARVQVAEConfig | VARConfig, state: dict[str, Tensor], where: str) -> VARVQVAE | VAR:
    """A model with these official tensors. Raises ValueError: they are not exactly the model's; all at fault are named."""
    with torch.device("meta"):  # nothing is allocated for a file that does not fit
        expected = shapes_of(official_state(kind(config)))
    check_shapes(where, kind.__name__, expected, shapes_of(state))
    if kind is VAR:
        wrong = [name for name, value in _derived(config).items() if not torch.equal(state[name].to(value), value)]
        if wrong:
            raise ValueError(f"{where}: {', '.join(wrong[:10])} do not hold what the scales {config.codes.scales} make")
    model = kind(config)
    ours = model.state_dict()
    for key, value in ours.items():
        given = _given(model, key, state)
        if given is not None:
            ours[key] = given.reshape(value.shape).to(value.dtype)
    model.load_state_dict(ours)
    return model.eval()


def _given(model: VARVQVAE | VAR, key: str, state: dict[str, Tensor]) -> Tensor | None:
    """The official tensor, or the part of one, that a weight of ours is; None where the format has none."""
    if isinstance(model, VAR):
        return None if key.startswith("quantizer.") else state[_var_name(key)]
    if key in _TRAINING:
        return None
    value, part = state[_vae_name(key, model.settings)], re.search(r"\.to_([qkv])\.", key)
    return value.chunk(3)["qkv".index(part[1])] if part else value


def _weights(path: str | os.PathLike) -> list[Path]:
    """The weight files meant by a path: the file itself, or those of a folder, by name. Raises OSError: there are none."""
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in {".safetensors", *PICKLED})
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise OSError(f"{path} " + ("holds no weight files" if path.is_dir() else "does not exist"))
    return found


def from_official(path: str | os.PathLike, *, tokenizer: VARVQVAE | str | os.PathLike | None = None, **overrides) -> VARVQVAE | VAR:
    """The model in a VAR checkpoint, tokenizer or transformer, whichever it is, in eval mode.

    path: a flat state dict (`.pth` or `.safetensors`) as published, or a folder with both files: then the transformer, with its tokenizer.
    tokenizer: of a transformer, where the path is its file alone: a VARVQVAE, or the official file.
    overrides: config fields the file does not say: of the tokenizer scales (those of 256 px where there are ten), metric, phi_ratio and
    norm_groups; of the transformer num_heads (width / 64 where no tensor tells) and classes. With a folder the former go to the tokenizer.
    Raises ValueError: keys or shapes that are not VAR's, all of them named, or a transformer without tokenizer. OSError: nothing there.
    """
    states = {file: plain_names(read_state(file, wrappers=WRAPPERS), str(file)) for file in _weights(path)}
    transformers = {file: state for file, state in states.items() if "pos_1LC" in state}
    tokenizers = {file: state for file, state in states.items() if "quantize.embedding.weight" in state}
    if len(transformers) > 1 or len(tokenizers) > 1 or not (transformers or tokenizers):
        counts = f"{len(transformers)} and {len(tokenizers)}"
        raise ValueError(f"{path} must hold one VAR transformer, one VAR tokenizer or one of each, got {counts}")
    if not transformers:
        ((file, state),) = tokenizers.items()
        return _read_tokenizer(file, state, overrides)
    ((file, state),) = transformers.items()
    if not isinstance(tokenizer, VARVQVAE):
        of_tokenizer = {name: overrides.pop(name) for name in ("metric", "phi_ratio", "norm_groups") if name in overrides}
        of_tokenizer["scales"] = overrides.pop("scales", None) or _sides(file, state)
        if tokenizer is not None:
            tokenizer = from_official(tokenizer, **of_tokenizer)
        elif tokenizers:
            tokenizer = _read_tokenizer(*next(iter(tokenizers.items())), of_tokenizer)
        else:
            raise ValueError(f"{file} is a transformer without the codes it reads: give tokenizer=, its tokenizer or that one's file")
    return _read_generator(file, state, tokenizer, overrides)


def _measure(file: Path, read: Callable[[], dict]) -> dict:
    try:
        return read()
    except KeyError as error:
        raise ValueError(f"{file} is no complete VAR checkpoint: it lacks {error.args[0]}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is no VAR checkpoint: a tensor to measure has another rank or is empty") from error


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _read_tokenizer(file: Path, state: dict[str, Tensor], overrides: dict) -> VARVQVAE:
    def read() -> dict:
        width = state["encoder.conv_in.weight"].shape[0]
        levels = _count(state, r"encoder\.down\.(\d+)\.")
        K, d = state["quantize.embedding.weight"].shape
        return {
            "width": width,
            "multipliers": tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in range(levels)),
            "blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            "codebook_size": K,
            "code_dim": d,
            "num_phis": 1 if "quantize.quant_resi.qresi.weight" in state else _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
            "num_scales": state["quantize.ema_vocab_hit_SV"].shape[0],
        }

    fields = _measure(file, read)
    num_scales = fields.pop("num_scales")
    if num_scales == len(SCALES_256):
        fields["scales"] = SCALES_256
    fields |= overrides
    if len(fields.get("scales", ())) != num_scales:
        raise ValueError(f"{file} has {num_scales} scales; give scales=, their {num_scales} sides")
    codes = ScaleCodesConfig(**{name: fields.pop(name) for name in list(fields) if name in ScaleCodesConfig.__dataclass_fields__})
    return _built(VARVQVAE, VARVQVAEConfig(codes=codes, **fields), state, str(file))


def _sides(file: Path, state: dict[str, Tensor]) -> tuple[int, ...]:
    """Sides of the scales, from the table of each token's scale. Raises ValueError: they are no squares."""
    levels = state.get("lvl_1L")
    if levels is None or levels.ndim != 2 or not levels.numel() or levels.is_floating_point():
        raise ValueError(f"{file} is no complete VAR checkpoint: lvl_1L must be there, [1, N] of whole numbers")
    sizes = levels[0].unique(return_counts=True)[1].tolist()
    sides = tuple(round(size**0.5) for size in sizes)
    if [side * side for side in sides] != sizes:
        raise ValueError(f"{file}: its scales have {sizes} tokens, which are no squares")
    return sides


def _read_generator(file: Path, state: dict[str, Tensor], tokenizer: VARVQVAE, overrides: dict) -> VAR:
    def read() -> dict:
        classes, width = state["class_emb.weight"].shape
        temperature = state.get("blocks.0.attn.scale_mul_1H11")
        return {
            "width": width,
            "depth": _count(state, r"blocks\.(\d+)\."),
            "num_heads": max(width // 64, 1) if temperature is None else temperature.numel(),
            "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / width,
            "num_classes": classes - 1,
            "shared_modulation": "shared_ada_lin.1.weight" in state,
            "unit_attention": temperature is not None,
        }

    config = VARConfig(codes=tokenizer.settings.codes, **{**_measure(file, read), **overrides})
    return _built(VAR, config, state, str(file)).read_codes_of(tokenizer)


def to_official(model: VARVQVAE | VAR, folder: str | os.PathLike) -> None:
    """Write a flat state dict as VAR's own scripts read it: `vae.pth` of a tokenizer, `var.pth` of a transformer, without its codes.

    Raises ValueError: the tokenizer folds pixels (pixel_patch), which theirs cannot.
    """
    if isinstance(model, VARVQVAE) and model.settings.pixel_patch != 1:
        raise ValueError(f"pixel_patch={model.settings.pixel_patch} is ours alone: VAR's tokenizer folds no pixels")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone() for key, value in official_state(model).items()}
    torch.save(state, folder / (TOKENIZER_NAME if isinstance(model, VARVQVAE) else GENERATOR_NAME))
