"""KL-VAEs in diffusers' own folder format (`config.json`, `diffusion_pytorch_model.safetensors`) to KLVAE and back, bit-equal."""

import os
import re
from pathlib import Path

import torch

from vistok.convert.safe_reader import find_weights, read_json_object, read_shapes, read_tensors
from vistok.convert.writing import write_config, write_weights
from vistok.tokenizers.vae import KLVAE, VAEConfig, encoder_blocks

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Attention keys of files older than diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# config.json field -> the only value understood here; absent ones have it.
_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None,
    "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
_FREE = {"down_block_types", "up_block_types", "sample_size", "force_upcast", "scaling_factor", "norm_num_groups", "block_out_channels",
         "layers_per_block", "latent_channels", "mid_block_add_attention"}  # fmt: skip


def vae_fields(shapes: dict[str, tuple[int, ...]], prefix: str, *, norm_groups: int | None, where: str) -> dict:
    """VAEConfig fields read off the shapes of an AutoencoderKL whose keys start with prefix.

    Raises ValueError: the keys are not an AutoencoderKL's, or the channels do not divide into 32 groups and norm_groups is not given.
    """
    block = re.compile(re.escape(prefix) + r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight")
    found = {tuple(map(int, match.groups())): shape for key, shape in shapes.items() if (match := block.fullmatch(key))}
    latent = shapes.get(prefix + "post_quant_conv.weight")
    if not found or latent is None:
        raise ValueError(f"{where}: keys under {prefix!r} are not those of an AutoencoderKL with quant_conv")
    channels = tuple(found[level, 0][0] for level in range(1 + max(level for level, _ in found)) if (level, 0) in found)
    if norm_groups is None:
        norm_groups = 32
        if any(c % 32 for c in channels):
            raise ValueError(f"{where}: {channels} channels do not divide into diffusers' usual 32 groups; give norm_groups=")
    return {
        "block_channels": channels,
        "layers_per_block": 1 + max(block for _, block in found),
        "latent_channels": latent[0],
        "mid_attention": any(key.startswith(prefix + "encoder.mid_block.attentions.") for key in shapes),
        "encoder_attention": any(key.startswith(f"{prefix}encoder.down_blocks.{len(channels) - 1}.attentions.") for key in shapes),
        "norm_groups": norm_groups,
    }


def _read_config(path: Path) -> dict:
    """Checked diffusers config. Raises ValueError: a field or value that is not understood."""
    data = {key: value for key, value in read_json_object(path).items() if not key.startswith("_")}
    for key, value in data.items():
        if key not in _FREE and (key not in _FIXED or value != _FIXED[key]):
            raise ValueError(f"{path}: {key}={value!r} is not understood here" + (f"; only {_FIXED[key]!r}" if key in _FIXED else ""))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = data.get(key, [kind])
        if key == "down_block_types" and kinds[-1:] == [f"Attn{kind}"]:
            kinds = [*kinds[:-1], kind]
        if set(kinds) - {kind} or not kinds:
            raise ValueError(f"{path}: {key}={data[key]!r}; only {kind} is understood here, and in the encoder Attn{kind} as the last")
    return data


def from_official(path: str | os.PathLike, **overrides) -> KLVAE:
    """KLVAE of a diffusers AutoencoderKL folder or weight file.

    overrides: VAEConfig fields, for what the folder does not say (image_size, norm_groups, scaling_factor).
    Raises ValueError: a configuration or keys that are not understood. OSError: nothing there.
    """
    file = find_weights(path, WEIGHT_NAMES)
    data = _read_config(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    shapes, _ = read_shapes(file)
    groups = overrides.pop("norm_groups", data.get("norm_num_groups"))
    fields = vae_fields(shapes, "", norm_groups=groups, where=str(file))
    if "scaling_factor" in data:
        fields["scaling_factor"] = float(data["scaling_factor"])
    size = data.get("sample_size")
    if isinstance(size, int):
        fields["image_size"] = (size, size)
    model = KLVAE(VAEConfig(**{**fields, **overrides}))
    names = {_new_name(key): key for key in shapes}
    expected = model.vae.state_dict()
    if set(names) != set(expected):
        odd = sorted(set(names) ^ set(expected))
        raise ValueError(f"{file} does not fit an AutoencoderKL; keys on one side only: {', '.join(odd[:10])}")
    keys = list(expected)
    state = dict(zip(keys, read_tensors(file, [names[key] for key in keys])))
    # files older than diffusers 0.18 may hold 1x1 convolutions where there are linear layers now
    model.vae.load_state_dict({key: value.reshape(expected[key].shape) for key, value in state.items()})
    return model.eval()


def _new_name(key: str) -> str:
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", key)


def to_official(model: KLVAE, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers AutoencoderKL folder; dtype: of the weights on disk, the model's own by default.

    Raises ValueError: the VAE folds pixels into channels first, which the format cannot say.
    """
    if model.settings.stem != 1:
        raise ValueError(f"the diffusers format has no form for a VAE with stem={model.settings.stem}; only 1")
    settings, levels = model.settings, len(model.settings.block_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(settings.block_channels),
        "down_block_types": list(encoder_blocks(settings)),
        "in_channels": 3,
        "latent_channels": settings.latent_channels,
        "layers_per_block": settings.layers_per_block,
        "mid_block_add_attention": settings.mid_attention,
        "norm_num_groups": settings.norm_groups,
        "out_channels": 3,
        "sample_size": settings.image_size[0],
        "scaling_factor": settings.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    write_weights(Path(folder) / WEIGHT_NAMES[0], model.vae.state_dict(), dtype=dtype)
    write_config(Path(folder), config)
