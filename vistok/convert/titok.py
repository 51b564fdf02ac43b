"""Official TiTok and TA-TiTok checkpoints to TiTok and back: same tensors, other names.

An official checkpoint is `model.safetensors` (older ones: a pickled `.bin`) with a `config.json`. Shapes in the file decide widths, depths
and counts; the configuration, where there is one, decides what no shape tells: image size, heads, and whether codes are unit vectors.

    official                                       here
    latent_tokens [N, D]                           encoder.registers
    encoder.class_embedding [1, D]                 encoder.trunk.class_token [D]
    transformer.I.attn.in_proj_weight [3 D, D]     trunk.blocks.I.attention.qkv.weight
    encoder.conv_out [d, D, 1, 1]                  encoder.head [d, D]
    quantize.embedding, quantize.embed_prob        quantizer.codebook, quantizer.shares
    pixel_quantize.embedding                       pixel_decoder.codebook

The two-stage models (is_legacy) reinterpret the registers in front of conv_out: TiTokConfig.interleaved_head.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from vistok.convert.pickles import find_state, read_state
from vistok.convert.safe_reader import read_json_object
from vistok.convert.strict import check_shapes, shape_reader, shapes_of
from vistok.convert.writing import CONFIG_NAME, write_config, write_weights
from vistok.quantizers.vq import TRAINING_STATE
from vistok.tokenizers.maskgit_vqgan import PixelDecoderConfig
from vistok.tokenizers.titok import SIZES, TiTok, TiTokConfig

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
# Keys of the frozen text tower that some TA-TiTok files may carry; text features are made outside.
_IGNORED = re.compile(r"(clip_encoder|text_encoder)\..+")

# -- names ------------------------------------------------------------------------------------------------------------------------------

_BLOCK = (
    ("attention_norm", "ln_1"), ("attention.proj", "attn.out_proj"), ("mlp_norm", "ln_2"), ("mlp.up", "mlp.c_fc"),
    ("mlp.out", "mlp.c_proj"),
)  # fmt: skip
_PREFIXES = [
    (r"(encoder|decoder)\.trunk\.class_token", r"\1.class_embedding"),
    (r"(encoder|decoder)\.trunk\.positions", r"\1.positional_embedding"),
    (r"(encoder|decoder)\.register_positions", r"\1.latent_token_positional_embedding"),
    (r"(encoder|decoder)\.trunk\.norm_in\.", r"\1.ln_pre."),
    (r"(encoder|decoder)\.trunk\.norm_out\.", r"\1.ln_post."),
    (r"(encoder|decoder)\.trunk\.blocks\.(\d+)\.attention\.qkv\.", r"\1.transformer.\2.attn.in_proj_"),
    *((rf"(encoder|decoder)\.trunk\.blocks\.(\d+)\.{re.escape(ours)}\.", rf"\1.transformer.\2.{official}.") for ours, official in _BLOCK),
    (r"encoder\.registers", "latent_tokens"),
    (r"encoder\.patches\.", "encoder.patch_embed."),
    (r"encoder\.head\.", "encoder.conv_out."),
    (r"decoder\.from_codes\.", "decoder.decoder_embed."),
    (r"decoder\.mask_token", "decoder.mask_token"),
    (r"decoder\.from_text\.", "decoder.text_guidance_proj."),
    (r"decoder\.text_positions", "decoder.text_guidance_positional_embedding"),
    (r"decoder\.head\.(\d)\.", r"decoder.ffn.\1."),
    (r"decoder\.head\.", "decoder.ffn.0."),
    (r"decoder\.smooth\.", "decoder.conv_out."),
    (r"quantizer\.codebook", "quantize.embedding.weight"),
    (r"quantizer\.shares", "quantize.embed_prob"),
    (r"pixel_decoder\.codebook\.", "pixel_quantize.embedding."),
    (r"pixel_decoder\.middle\.", "pixel_decoder.mid."),
    (r"pixel_decoder\.up\.(\d+)\.blocks\.(\d+)\.shortcut\.", r"pixel_decoder.up.\1.block.\2.nin_shortcut."),
    (r"pixel_decoder\.up\.(\d+)\.blocks\.", r"pixel_decoder.up.\1.block."),
    (r"pixel_decoder\.up\.(\d+)\.conv\.", r"pixel_decoder.up.\1.upsample_conv."),
]
_NAMES = [(re.compile(ours), official) for ours, official in _PREFIXES]


def official_name(key: str) -> str:
    """The official key of one of ours."""
    for pattern, official in _NAMES:
        if pattern.match(key):
            return re.sub(r"middle\.(\d+)", r"mid.\1", pattern.sub(official, key, count=1))
    return key  # the rest of the pixel decoder has the same names


def official_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ours (weights or gradients) under their official names and shapes."""
    state = {}
    for key, value in tensors.items():
        if key.removeprefix("quantizer.") in TRAINING_STATE:
            continue
        name = official_name(key)
        if name.endswith("class_embedding"):
            value = value[None]
        elif name == "decoder.mask_token":
            value = value[None, None]
        elif name == "encoder.conv_out.weight":
            value = value[:, :, None, None]
        state[name] = value
    return state


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def from_official(path: str | os.PathLike, *, config: dict | None = None, **overrides) -> TiTok:
    """TiTok of an official checkpoint, strictly.

    path: a folder with model.safetensors or pytorch_model.bin, or such a file. config: the official configuration as plain data, where it
    is not beside the file. overrides: fields of TiTokConfig. Heads and sizes that nobody says are those of the published widths.
    Raises ValueError: a configuration or keys that are not TiTok's; every key at fault is named. OSError: nothing there.
    """
    file = find_state(path, WEIGHT_NAMES)
    state = {key: value for key, value in read_state(file).items() if not _IGNORED.fullmatch(key)}
    if config is None and (file.parent / CONFIG_NAME).is_file():
        config = read_json_object(file.parent / CONFIG_NAME)
    shapes = shapes_of(state)
    fields = {**_measured(file, shapes), **_said(file, config or {}, shapes), **overrides}
    lacking = [name for name in ("encoder_heads", "decoder_heads") if name not in fields]
    if lacking:
        raise ValueError(f"{file}: no published TiTok has these widths, so give {' and '.join(lacking)} as overrides")
    settings = TiTokConfig(**fields)
    with torch.device("meta"):
        expected = TiTok(settings).state_dict()
    check_shapes(str(file), "TiTok", shapes_of(official_state(expected)), shapes)
    model = TiTok(settings)
    model.load_state_dict({key: state[official_name(key)].reshape(value.shape) for key, value in expected.items()}, strict=True)
    return model.eval()


def _measured(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Config fields that shapes decide. Raises ValueError: a tensor to measure is not there or has another rank."""

    shape = shape_reader(shapes, f"{file} is no TiTok checkpoint")
    fields: dict = {}
    for part in ("encoder", "decoder"):
        count, width = shape(f"{part}.positional_embedding", 2)
        heads = {published: number for published, _, number in SIZES.values()}
        fields[f"{part}_width"] = width
        fields[f"{part}_depth"] = _count(shapes, rf"{part}\.transformer\.(\d+)\.")
        if width in heads:
            fields[f"{part}_heads"] = heads[width]
        fields[f"{part}_grid"] = round((count - 1) ** 0.5)
    fields["patch_size"] = shape("encoder.patch_embed.weight", 4)[2]
    side = fields.pop("encoder_grid") * fields["patch_size"]
    fields["image_size"], fields["decoder_patch_size"] = (side, side), side // max(fields.pop("decoder_grid"), 1)
    fields["num_registers"], fields["code_dim"] = shape("latent_tokens", 2)[0], shape("decoder.decoder_embed.weight", 2)[1]
    fields["quantizer"] = "vae"
    if "quantize.embedding.weight" in shapes:
        fields["quantizer"] = "clustered" if "quantize.embed_prob" in shapes else "vq"
        fields["codebook_size"] = shape("quantize.embedding.weight", 2)[0]
    if "decoder.ffn.2.weight" in shapes:
        # is_legacy: the two-stage models, whose head is the interleaved one
        fields |= {"target": "proxy", "interleaved_head": True, "proxy_codebook_size": shape("decoder.ffn.2.weight", 4)[0]}
    if "decoder.text_guidance_proj.weight" in shapes:
        fields["text_width"] = shape("decoder.text_guidance_proj.weight", 2)[1]
        fields["text_tokens"] = shape("decoder.text_guidance_positional_embedding", 2)[0]
    if "pixel_quantize.embedding.weight" in shapes:
        channels = shape("pixel_decoder.norm_out.weight", 1)[0]
        levels = _count(shapes, r"pixel_decoder\.up\.(\d+)\.")
        widths = [shape(f"pixel_decoder.up.{i}.block.0.norm2.weight", 1)[0] for i in range(levels)]
        if any(width % channels for width in widths):
            raise ValueError(f"{file}: the pixel decoder's widths {widths} are no multiples of {channels}")
        fields["pixel_decoder"] = PixelDecoderConfig(
            code_dim=shape("pixel_quantize.embedding.weight", 2)[1],
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=_count(shapes, r"pixel_decoder\.mid\.(\d+)\."),
        )
    return fields


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _said(file: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Config fields that an official configuration decides. Raises ValueError: it contradicts the weights."""
    model = _section(config, "model", "vq_model")
    fields = {}
    crop = _section(config, "dataset", "preprocessing").get("crop_size")
    if crop is not None:
        patch, grid = shapes["encoder.patch_embed.weight"][2], round((shapes["encoder.positional_embedding"][0] - 1) ** 0.5)
        if crop != patch * grid:
            raise ValueError(f"{file}: the configuration says crop_size={crop} but the weights are for {patch * grid} pixels")
    if "use_l2_norm" in model:
        fields["cosine"] = bool(model["use_l2_norm"])
    elif "quantize.embedding.weight" in shapes:
        fields["cosine"] = "decoder.ffn.2.weight" in shapes  # true of every published model
    if "commitment_cost" in model:
        fields["commitment_weight"] = float(model["commitment_cost"])
    if bool(model.get("is_legacy", True)) != ("decoder.ffn.2.weight" in shapes) and model:
        raise ValueError(f"{file}: the configuration says is_legacy={model.get('is_legacy', True)} but the weights say the opposite")
    return fields


def _section(config: dict, *path: str) -> dict:
    for name in path:
        config = config.get(name, {})
        if not isinstance(config, dict):
            raise ValueError(f"the configuration's {'.'.join(path)} must be an object, got {type(config).__name__}")
    return config


# -- writing ----------------------------------------------------------------------------------------------------------------------------


def official_config(settings: TiTokConfig) -> dict:
    """The official configuration of a TiTok. Raises ValueError: the official code has no such model."""
    is_legacy = settings.target == "proxy"
    if settings.interleaved_head != is_legacy:
        raise ValueError("the official format reinterprets the registers in two-stage models and only there (interleaved_head)")
    if settings.image_size[0] != settings.image_size[1]:
        raise ValueError(f"the official format knows square images only, not {settings.image_size}")
    model = {
        "quantize_mode": "vae" if settings.quantizer == "vae" else "vq",
        "codebook_size": settings.codebook_size,
        "token_size": settings.code_dim,
        "use_l2_norm": settings.cosine,
        "commitment_cost": settings.commitment_weight,
        "clustering_vq": settings.quantizer == "clustered",
        "vit_enc_model_size": _size(settings, "encoder"),
        "vit_dec_model_size": _size(settings, "decoder"),
        "vit_enc_patch_size": settings.patch_size,
        "vit_dec_patch_size": settings.decoder_patch_size,
        "num_latent_tokens": settings.num_registers,
        "finetune_decoder": settings.pixel_decoder is not None,
        "is_legacy": is_legacy,
    }
    if settings.text_width:
        model |= {"text_context_length": settings.text_tokens, "text_embed_dim": settings.text_width}
    return {"model": {"vq_model": model}, "dataset": {"preprocessing": {"crop_size": settings.image_size[0]}}}


def _size(settings: TiTokConfig, part: str) -> str:
    """small, base or large; "custom" where the official code has no name for the shape."""
    shape = tuple(getattr(settings, f"{part}_{field}") for field in ("width", "depth", "heads"))
    return next((name for name, known in SIZES.items() if known == shape), "custom")


def to_official(model: TiTok, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in the official format; dtype: of the weights on disk, the model's own by default.

    Raises ValueError: the official code has no such model.
    """
    config = official_config(model.settings)
    write_weights(Path(folder) / WEIGHT_NAMES[0], official_state(model.state_dict()), dtype=dtype)
    write_config(Path(folder), config)
