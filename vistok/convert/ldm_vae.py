"""KL-VAEs in the format of LDM, as MAR's `kl16.ckpt` under xAR, to KLVAE and back: same tensors, diffusers' names inside.

    official                                                      here (below `vae.`)
    {en,de}coder.conv_in, norm_out, conv_out                      conv_in, conv_norm_out, conv_out
    encoder.down.L, decoder.up.L (0: the highest resolution)      encoder.down_blocks.L, decoder.up_blocks.(levels - 1 - L)
    ....block.I.{norm1,conv1,norm2,conv2,nin_shortcut}            ....resnets.I.{norm1,conv1,norm2,conv2,conv_shortcut}
    ....attn.I.{norm,q,k,v,proj_out}, 1 x 1 convolutions          ....attentions.I.{group_norm,to_q,to_k,to_v,to_out.0}, matrices
    ....downsample.conv, upsample.conv                            ....downsamplers.0.conv, upsamplers.0.conv
    mid.block_1, attn_1, block_2                                  mid_block.resnets.0, attentions.0, resnets.1
    quant_conv, post_quant_conv                                   the same

Attention is known at the lowest resolution of the encoder (after every block, or not at all) and in the middle of both halves.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, plain_names, read_state
from vistok.convert.strict import check_shapes, shapes_of
from vistok.tokenizers.vae import KLVAE, VAEConfig

WEIGHT_NAMES = ("kl16.ckpt", "vae.ckpt", "model.ckpt", "model.safetensors")
SCALING = 0.2325  # of MAR's and xAR's latents; the file does not say it
_PARTS = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out",
}  # fmt: skip
_TRAINING = re.compile(r"(loss|discriminator|perceptual_loss|model_ema)\.")


def _official_name(key: str, levels: int) -> str:
    """Official key of one of AutoencoderKL's."""
    key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets.", "block.").replace("attentions.", "attn.")
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    stem, _, leaf = key.rpartition(".")
    for ours, theirs in _PARTS.items():
        if stem.endswith(f".{ours}"):
            return f"{stem.removesuffix(ours)}{theirs}.{leaf}"
    return key


def _layout(settings: VAEConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Official key -> (ours, official shape) of a VAE of these settings."""
    with torch.device("meta"):
        state = KLVAE(settings).vae.state_dict()
    levels, out = len(settings.block_channels), {}
    for key, value in state.items():
        is_matrix = value.ndim == 2 and ".attentions." in key  # a 1 x 1 convolution there
        out[_official_name(key, levels)] = key, (*value.shape, 1, 1) if is_matrix else tuple(value.shape)
    return out


def from_official(path: str | os.PathLike, **overrides) -> KLVAE:
    """KLVAE of an official checkpoint, strictly, in eval mode; what trained it (loss, discriminator) is left out.

    overrides: fields of VAEConfig that the file does not say: image_size (256 x 256 by default), scaling_factor (0.2325), norm_groups (32).
    Raises ValueError: keys or shapes that are not such a VAE's, all of them named. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = plain_names(read_state(file), str(file))
    state = {key: value for key, value in state.items() if not _TRAINING.match(key)}
    settings = VAEConfig(**{"scaling_factor": SCALING, **_measured(file, state), **overrides})
    layout = _layout(settings)
    wanted = {name: shape for name, (_, shape) in layout.items()}
    check_shapes(str(file), "a VAE of LDM's format", wanted, shapes_of(state))
    model = KLVAE(settings)
    expected = model.vae.state_dict()
    model.vae.load_state_dict({key: state[name].reshape(expected[key].shape).to(expected[key].dtype) for name, (key, _) in layout.items()})
    return model.eval()


def _measured(file: Path, state: dict[str, Tensor]) -> dict:
    """What names and shapes decide. Raises ValueError: they are not such a VAE's."""
    blocks = {}
    for key, value in state.items():
        if match := re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", key):
            blocks[int(match[1]), int(match[2])] = value.shape[0]
    levels = 1 + max((level for level, _ in blocks), default=-1)
    latent = state.get("post_quant_conv.weight")
    if not levels or latent is None or any((level, 0) not in blocks for level in range(levels)):
        raise ValueError(f"{file} is no VAE of LDM's format: it needs encoder.down.*.block.* and post_quant_conv.weight")
    return {
        "block_channels": tuple(blocks[level, 0] for level in range(levels)),
        "layers_per_block": 1 + max(block for _, block in blocks),
        "latent_channels": latent.shape[0],
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "encoder_attention": f"encoder.down.{levels - 1}.attn.0.q.weight" in state,
    }


def official_state(model: KLVAE) -> dict[str, Tensor]:
    """The weights of a model under their official names and shapes. Raises ValueError: it folds pixels into channels first."""
    if model.settings.stem != 1:
        raise ValueError(f"LDM's format has no form for a VAE with stem={model.settings.stem}; only 1")
    state = model.vae.state_dict()
    return {name: state[key].detach().cpu().reshape(shape).clone() for name, (key, shape) in _layout(model.settings).items()}


def to_official(model: KLVAE, folder: str | os.PathLike) -> None:
    """Write `kl16.ckpt`, a state dict under "model" as MAR's and xAR's scripts read it. Raises ValueError: see `official_state`."""
    folder, state = Path(folder), official_state(model)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, folder / WEIGHT_NAMES[0])
