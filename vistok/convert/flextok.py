"""Official FlexTok checkpoints to FlexTok and back: same tensors, other names.

An official checkpoint is `model.safetensors` with its configuration beside it (`config.json`) or in its header, one string a part. Shapes
in the file decide widths, depths and counts; the configuration decides the rest (levels, head widths, time scale, latent scale).

    official                                   here
    attn.wq, wk, wv [D, D]                     attn.qkv [3 D, D]
    mlp.fc1, fc3 [F, D]; fc2                   mlp.gate_up [2 F, D]; out
    posembs [1, D, h, w]                       patches.positions [D, h, w]
    posembs [1, 1, D, R]                       register_positions [R, D]
"""

import logging
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.flextok_config import official_config, settings_of
from vistok.convert.kl_vae import vae_fields
from vistok.convert.rules import Rule, both, to_official_names
from vistok.convert.safe_reader import find_weights, parse_value, read_json_object, read_shapes, read_tensors
from vistok.convert.strict import check_shapes, num_children, shape_reader, shapes_of
from vistok.convert.writing import CONFIG_NAME, write_config, write_weights
from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
from vistok.tokenizers.vae import VAEConfig

log = logging.getLogger("vistok")

WEIGHTS_NAME = "model.safetensors"
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
# Training artefacts that published files may carry: the VAE's learned variance and the representation-alignment projector.
_IGNORED = re.compile(r"vae\.logvar|(encoder|decoder)\.module_dict\.[^.]*repa[^.]*\..+|repa[^.]*\..+")
_FROM_CONFIG_ALONE = ("levels", "head_width", "decoder_head_width", "max_time", "scaling_factor", "patch_size")


# -- names ------------------------------------------------------------------------------------------------------------------------------


def _block_rules(ours: str, official: str) -> list[Rule]:
    return [
        Rule(f"{ours}.attn.qkv.weight", tuple(f"{official}.attn.{name}.weight" for name in ("wq", "wk", "wv")), "joined"),
        Rule(f"{ours}.attn.proj.weight", (f"{official}.attn.proj.weight",)),
        Rule(f"{ours}.mlp.gate_up.weight", (f"{official}.mlp.fc1.weight", f"{official}.mlp.fc3.weight"), "joined"),
        Rule(f"{ours}.mlp.out.weight", (f"{official}.mlp.fc2.weight",)),
    ]


def rules(settings: FlexTokConfig, vae_keys: list[str]) -> list[Rule]:
    """Every tensor of a FlexTok; vae_keys: those under `vae.vae.`, named alike on both sides."""
    E, D = "encoder.module_dict.", "decoder.module_dict."
    found = [Rule(key, (key,)) for key in vae_keys]
    found += both("encoder.patches.proj", E + "enc_patch_emb.patch_proj")
    found += [Rule("encoder.patches.positions", (E + "enc_posemb_module.posembs",), "row")]
    found += [Rule("encoder.registers", (E + "enc_register_module.registers",))]
    for i in range(settings.encoder_depth):
        found += _block_rules(f"encoder.blocks.{i}", f"{E}enc_transformer.blocks.{i}")
    found += both("encoder.head", E + "enc_to_latents.proj")
    found += both("decoder.from_codes", D + "dec_from_latents.proj")
    found += [
        Rule("decoder.register_positions", (D + "dec_registers_posemb_module.posembs",), "columns"),
        Rule("decoder.mask_token", (D + "dec_nested_dropout.dropout_mask_token",)),
        Rule("decoder.null_token", (D + "dec_latent_dropout.nullcond",)),
        Rule("decoder.patches.positions", (D + "dec_patches_posemb_module.posembs",), "row"),
    ]
    found += both("decoder.patches.proj", D + "dec_noise_patch_emb.patch_proj")
    for layer in (0, 2):
        found += both(f"decoder.time_mlp.{layer}", f"{D}dec_time_embedder.mlp.{layer}")
    for i in range(settings.decoder_depth):
        found += _block_rules(f"decoder.blocks.{i}", f"{D}dec_transformer.blocks.{i}")
        found += both(f"decoder.blocks.{i}.modulation", f"{D}dec_transformer.blocks.{i}.adaLN_modulation.1")
    found += both("decoder.head_modulation", D + "dec_to_patches.adaLN_modulation.1")
    found += both("decoder.head", D + "dec_to_patches.proj")
    return found


def official_state(settings: FlexTokConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours (weights, or gradients of some of them) under their official names."""
    return to_official_names(rules(settings, [key for key in tensors if key.startswith("vae.vae.")]), tensors)


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def read_official_config(file: Path, metadata: dict[str, str]) -> dict | None:
    """The configuration beside a weight file, else that in its header, else None."""
    beside = file.parent / CONFIG_NAME
    if beside.is_file():
        data = read_json_object(beside)
        return data["config"] if set(data) == {"config"} else data
    parts = {key: parse_value(text, f"{file} header, {key}") for key, text in metadata.items() if key != "format"}
    return parts or None


def from_official(path: str | os.PathLike, *, config: dict | None = None, **overrides) -> FlexTok:
    """FlexTok of an official checkpoint, strictly.

    path: a folder with model.safetensors, or such a file. config: the official configuration as plain data, where it is not with the file.
    overrides: fields of FlexTokConfig (image_size, decode_steps, ...) or scaling_factor and norm_groups of its VAE; without any
    configuration, levels, max_time, scaling_factor, head_width, decoder_head_width and patch_size are needed.
    Raises ValueError: a configuration or keys that are not FlexTok's; every key at fault is named. OSError: nothing there.
    """
    file = find_weights(path, (WEIGHTS_NAME,))
    shapes, metadata = read_shapes(file)
    names = {key.replace(_CHECKPOINT_WRAPPER, ""): key for key in shapes}
    ignored = sorted(name for name in names if _IGNORED.fullmatch(name))
    if ignored:
        log.info("%s: not used for encoding or decoding, so not read: %s", file, ", ".join(ignored))
    shapes = {name: shapes[key] for name, key in names.items() if name not in ignored}
    config = read_official_config(file, metadata) if config is None else config
    settings = _settings(file, shapes, config, overrides)
    with torch.device("meta"):
        expected = FlexTok(settings).state_dict()
    table = rules(settings, [key for key in expected if key.startswith("vae.vae.")])
    check_shapes(str(file), "FlexTok", shapes_of(official_state(settings, expected)), shapes)
    model = FlexTok(settings)
    state = {rule.ours: rule.to_ours(read_tensors(file, [names[name] for name in rule.official])) for rule in table}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _settings(file: Path, shapes: dict[str, tuple[int, ...]], config: dict | None, overrides: dict) -> FlexTokConfig:
    """Our config, from the shapes, the configuration and the caller's overrides, in rising order of say."""
    said = {} if config is None else settings_of(config)
    measured = _measured(file, shapes)
    for name, value in said.pop("shapes", {}).items():
        if value is not None and value != measured[name]:
            log.warning("%s: the configuration says %s=%s, the weights have %s; the weights decide", file, name, value, measured[name])
    fields = {**measured, **said, **overrides}
    lacking = [name for name in _FROM_CONFIG_ALONE if fields.get(name) is None]
    if lacking:
        raise ValueError(f"{file}: neither the checkpoint nor its configuration says {', '.join(lacking)}; give them as overrides")
    vae = vae_fields(shapes, "vae.vae.", norm_groups=fields.pop("norm_groups", None), where=str(file))
    pixels = 2 ** (len(vae["block_channels"]) - 1)
    full = tuple(cells * patch * pixels for cells, patch in zip(fields["max_grid"], fields["patch_size"]))
    size = tuple(fields.pop("image_size", full))
    vae_config = VAEConfig(**vae, image_size=size, scaling_factor=float(fields.pop("scaling_factor")))
    return FlexTokConfig(**fields, image_size=size, vae=vae_config)


def _measured(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """What the shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""

    shape = shape_reader(shapes, f"{file} is no FlexTok checkpoint")
    num_registers, encoder_width = shape("encoder.module_dict.enc_register_module.registers", 2)
    table = shape("encoder.module_dict.enc_posemb_module.posembs", 4)
    decoder_width, frequency_width = shape("decoder.module_dict.dec_time_embedder.mlp.0.weight", 2)
    return {
        "num_registers": num_registers,
        "encoder_width": encoder_width,
        "encoder_depth": num_children(shapes, "encoder.module_dict.enc_transformer.blocks."),
        "decoder_width": decoder_width,
        "decoder_depth": num_children(shapes, "decoder.module_dict.dec_transformer.blocks."),
        "frequency_width": frequency_width,
        "max_grid": table[2:],
    }


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def to_official(model: FlexTok, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in the official format, the configuration in the header too.

    dtype: of the weights on disk, the model's own by default.
    Raises ValueError: the model works on pixels, which the format cannot say.
    """
    config = official_config(model.settings)
    header = {part: repr(value) for part, value in config.items() if part != "_target_"}
    write_weights(Path(folder) / WEIGHTS_NAME, official_state(model.settings, model.state_dict()), dtype=dtype, metadata=header)
    write_config(Path(folder), config)
