"""The official FlexTok configuration: what it may say, checked step by step, and written back.

An official configuration is a program: a list of named modules that read and write keys of one shared dictionary. Here it is only data. The
data flow is followed symbolically: every module must come in the known order, be of the known class, and read what the known FlexTok puts
there, whatever the keys are called. A class, an argument or a wiring that is not understood is an error that names its full path.
"""

import logging
from dataclasses import dataclass, field

from vistok.tokenizers.flextok_nets import FlexTokConfig

log = logging.getLogger("vistok")


@dataclass(frozen=True)
class Step:
    """One module of the official program.

    path: where it stands in the configuration; kind: last part of its `_target_`.
    reads, writes: argument -> what is found, or put, under the key it names (a tuple for an argument that lists keys).
    options: argument -> the values it may have, or None where any will do (read elsewhere, or without influence on inference).
    """

    path: str
    kind: str
    reads: dict
    writes: dict
    options: dict = field(default_factory=dict)
    is_optional: bool = False


_PATCHING = {"channels_in": None, "dim": None, "patch_sizes": None, "flatten_patches": None}
_POSITIONS = {"dim": None, "max_sizes": None, "posemb_scaling": ("absolute", "interpolate")}
_PACKING = {"pad_to_multiple": None, "per_subseq_embs": None}
_TRANSFORMER = {
    "dim": None, "depth": None, "head_dim": None, "mlp_ratio": None, "use_act_checkpoint": None, "adaLN_expansion": None,
    "gated_mlp": (True,), "qk_norm": (True,), "qkv_bias": (False,), "proj_bias": (False,), "mlp_bias": (False,), "drop": None,
    "attn_drop": None, "proj_drop": None, "drop_path_rate": None, "act_layer": ("SiLU",), "intermediate_layers": None,
}  # fmt: skip
_HEAD = {
    "dim": None, "dim_out": None, "channels_out": None, "patch_sizes": None, "use_mup_readout": (True, False), "weight_init_style": None,
    "dtype_override": None,
}  # fmt: skip
_E, _D = "encoder.module_dict.", "decoder.module_dict."

STEPS = (
    Step("vae", "StableDiffusionVAE", {}, {"images_read_key": "images", "vae_latents_write_key": "latents",
         "images_reconst_write_key": "reconstruction", "vae_kl_loss_write_key": "kl"},
         {"latent_channels": None, "scaling_factor": None, "sample_posterior": None, "dtype_override": None, "frozen": None,
          "hf_hub_path": None, "learnable_logvar": None, "vae_latents_read_key": None}),
    Step(_E + "enc_channels_to_last", "PerSampleOp", {"read_key": "latents"}, {"write_key": "latents last"},
         {"per_sample_op": ("channels_first_to_last",)}),
    Step(_E + "enc_patch_emb", "PatchEmbedder", {"input_tensor_list_read_key": "latents last"},
         {"patches_list_write_key": "patches", "n_patches_write_key": "counts"}, _PATCHING),
    Step(_E + "enc_posemb_module", "PositionalEmbeddingAdder", {"read_key": "patches"}, {"write_key": "placed patches"},
         {**_POSITIONS, "posemb_type": ("sincos",)}),
    Step(_E + "enc_register_module", "Registers1D", {"input_tensor_list_read_key": "placed patches"},
         {"register_sizes_read_write_key": "sizes", "registers_write_key": "registers"},
         {"dim": None, "n_min": None, "n_max": None, "size_sampling_mode": None, "ordering_mode": ("nested",)}),
    Step(_E + "enc_seq_packer", "BlockWiseSequencePacker", {"input_list_read_keys": ("placed patches", "registers")},
         {"packed_seq_write_key": "packed", "block_mask_write_key": "mask", "inner_packed_shapes_write_key": "inner",
          "outer_packed_shapes_write_key": "outer", "emb_packing_fn_write_key": "packing"},
         {**_PACKING, "mask_mode": ("causal_last",)}),
    Step(_E + "enc_transformer", "FlexTransformer", {"input_seq_read_key": "packed", "block_mask_read_key": "mask"},
         {"output_seq_write_key": "encoded", "intermediate_layer_write_key": "tapped"}, _TRANSFORMER),
    Step(_E + "enc_unpacker", "SequenceUnpacker",
         {"packed_seq_read_key": "encoded", "inner_packed_shapes_read_key": "inner", "outer_packed_shapes_read_key": "outer"},
         {"inner_seq_write_keys": ("encoded patches", "encoded registers")}),
    Step(_E + "enc_to_latents", "LinearHead", {"read_key": "encoded registers"}, {"write_key": "continuous tokens"}, _HEAD),
    Step("regularizer", "FSQ", {"latents_read_key": "continuous tokens"}, {"quants_write_key": "codes", "tokens_write_key": "ids"},
         {"levels": None, "drop_quant_p": None, "corrupt_tokens_p": None, "packed_call": None}),
    Step("flow_matching_noise_module", "MinRFNoiseModule", {"clean_images_read_key": "latents"},
         {"noised_images_write_key": "noisy latents", "timesteps_write_key": "times", "sigmas_write_key": "sigmas"},
         {"ln": None, "stratisfied": None, "mode_scale": None}),
    Step(_D + "dec_from_latents", "LinearLayer", {"read_key": "codes"}, {"write_key": "projected codes"}, {"dim_in": None, "dim": None}),
    Step(_D + "dec_registers_posemb_module", "PositionalEmbeddingAdder", {"read_key": "projected codes"}, {"write_key": "placed codes"},
         {**_POSITIONS, "posemb_type": ("learnable_sum",)}),
    Step(_D + "dec_nested_dropout", "MaskedNestedDropout", {"read_write_key": "placed codes"}, {"read_write_key": "kept codes"},
         {"dim": None, "size_sampling_mode": None}),
    Step(_D + "dec_latent_dropout", "LearnedNullCond", {"read_write_key": "kept codes"}, {"read_write_key": "context"},
         {"dim": None, "dropout_prob": None}),
    Step(_D + "dec_noise_channels_to_last", "PerSampleOp", {"read_key": "noisy latents"}, {"write_key": "noisy last"},
         {"per_sample_op": ("channels_first_to_last",)}),
    Step(_D + "dec_noise_patch_emb", "PatchEmbedder", {"input_tensor_list_read_key": "noisy last"},
         {"patches_list_write_key": "noisy patches", "n_patches_write_key": "counts"}, _PATCHING),
    Step(_D + "dec_patches_posemb_module", "PositionalEmbeddingAdder", {"read_key": "noisy patches"}, {"write_key": "placed noisy patches"},
         {**_POSITIONS, "posemb_type": ("sincos",)}),
    Step(_D + "dec_seq_packer", "BlockWiseSequencePacker", {"input_list_read_keys": ("placed noisy patches", "context")},
         {"packed_seq_write_key": "packed", "block_mask_write_key": "mask", "inner_packed_shapes_write_key": "inner",
          "outer_packed_shapes_write_key": "outer", "emb_packing_fn_write_key": "packing"},
         {**_PACKING, "per_subseq_embs": (True,), "mask_mode": ("full",)}),
    Step(_D + "dec_time_embedder", "TimestepEmbedder", {"timesteps_read_key": "times"}, {"time_embedding_write_key": "time"},
         {"dim": None, "frequency_embedding_size": None, "max_timestep": None}),
    Step(_D + "dec_transformer", "FlexTransformer",
         {"input_seq_read_key": "packed", "block_mask_read_key": "mask", "adaLN_emb_read_key": "time",
          "adaLN_packing_fn_read_key": "packing"},
         {"output_seq_write_key": "decoded", "intermediate_layer_write_key": "tapped"}, _TRANSFORMER),
    Step(_D + "dec_unpacker", "SequenceUnpacker",
         {"packed_seq_read_key": "decoded", "inner_packed_shapes_read_key": "inner", "outer_packed_shapes_read_key": "outer"},
         {"inner_seq_write_keys": ("decoded patches", "decoded registers")}),
    Step(_D + "dec_repa_unpacker", "SequenceUnpacker",
         {"packed_seq_read_key": "tapped", "inner_packed_shapes_read_key": "inner", "outer_packed_shapes_read_key": "outer"},
         {"inner_seq_write_keys": ("tapped patches", "tapped registers")}, is_optional=True),
    Step(_D + "dec_to_patches", "ToPatchesLinearHead", {"read_key": "decoded patches", "adaLN_emb_read_key": "time"},
         {"write_key": "velocity last"}, _HEAD),
    Step(_D + "dec_channels_to_first", "PerSampleOp", {"read_key": "velocity last"}, {"write_key": "velocity"},
         {"per_sample_op": ("channels_last_to_first",)}),
    Step("pipeline", "MinRFPipeline", {"latents_read_key": "codes", "timesteps_read_key": "times",
         "noised_images_read_key": "noisy latents", "reconst_write_key": "velocity"}, {},
         {"noise_read_key": None, "target_sizes_read_key": None, "out_channels": None}),
)  # fmt: skip
_REQUIRED_OPTIONS = {"per_sample_op", "mask_mode", "per_subseq_embs", "posemb_type"}
_MODULE_LISTS = ("encoder", "decoder")


def _last(target) -> str:
    return str(target).rpartition(".")[2]


def _plain_name(value):
    """The last part of a callable's name where a callable is described, else the value."""
    if isinstance(value, dict) and set(value) <= {"_target_", "_partial_"}:
        return _last(value.get("_target_"))
    return _last(value) if isinstance(value, str) else value


def modules_of(config: dict) -> dict[str, dict]:
    """The configuration's modules by path, in order.

    Raises ValueError: a part that is missing, unknown or not an object.
    """
    modules = {}
    top = {step.path.split(".")[0] for step in STEPS}
    for part, value in config.items():
        if part == "_target_" or (part not in top and part.startswith("_")):
            continue
        if part not in top or not isinstance(value, dict):
            raise ValueError(f"{part}: not a part of a FlexTok configuration; known: {', '.join(sorted(top))}")
        if part not in _MODULE_LISTS:
            modules[part] = value
            continue
        if _last(value.get("_target_")) != "SequentialModuleDictWrapper" or set(value) - {"_target_", "module_dict"}:
            raise ValueError(f"{part} must be a SequentialModuleDictWrapper with a module_dict, got {value.get('_target_')!r}")
        if not isinstance(value.get("module_dict"), dict):
            raise ValueError(f"{part}.module_dict must be an object")
        modules.update({f"{part}.module_dict.{name}": module for name, module in value["module_dict"].items()})
    return modules


def check_config(config: dict) -> dict[str, dict]:
    """Modules by path, after following the data through all of them; nothing is imported.

    Raises ValueError: the first module that is not what FlexTok has there, with its full path.
    """
    modules = modules_of(config)
    expected = [step for step in STEPS if not (step.is_optional and step.path not in modules)]
    for part in _MODULE_LISTS:
        have = [path for path in modules if path.startswith(part + ".")]
        want = [step.path for step in expected if step.path.startswith(part + ".")]
        if have != want:
            at = next((h or w for h, w in zip([*have, None], [*want, None]) if h != w), None) or (have + want)[-1]
            raise ValueError(f"{at}: the modules of the {part} must be, in this order, {', '.join(w.rpartition('.')[2] for w in want)}")
    holds: dict[str, str] = {}
    for step in expected:
        if step.path not in modules:
            raise ValueError(f"{step.path} is missing from the configuration")
        _follow(step, modules[step.path], holds)
    if holds.get(modules["vae"].get("vae_latents_read_key")) != "velocity":
        raise ValueError("vae.vae_latents_read_key: the VAE must decode what the pipeline writes (reconst_write_key)")
    return modules


def _follow(step: Step, module: dict, holds: dict[str, str]) -> None:
    """Check one module and update what each key of the shared dictionary holds."""
    if not isinstance(module, dict) or _last(module.get("_target_")) != step.kind:
        found = module.get("_target_") if isinstance(module, dict) else module
        raise ValueError(f"{step.path}._target_: {found!r} is not the expected class {step.kind}; it is not imported")
    arguments = {name: value for name, value in module.items() if name not in ("_target_", "_partial_")}
    for name in arguments:
        if name not in step.reads and name not in step.writes and name not in step.options:
            raise ValueError(f"{step.path}.{name}={arguments[name]!r} is not an argument this reader understands")
    for name, allowed in step.options.items():
        if allowed is None or (name not in arguments and name not in _REQUIRED_OPTIONS):
            continue
        if _plain_name(arguments.get(name)) not in allowed:
            raise ValueError(f"{step.path}.{name}={arguments.get(name)!r}; understood here: {', '.join(map(repr, allowed))}")
    for name, meaning in step.reads.items():
        keys, meanings = _keys(arguments.get(name), meaning)
        if len(keys) != len(meanings) or any(holds.get(key) != what for key, what in zip(keys, meanings)):
            found = [holds.get(key, "nothing") for key in keys]
            raise ValueError(f"{step.path}.{name}={arguments.get(name)!r} must read {meaning!r}, but there is {found} under it")
    for name, meaning in step.writes.items():
        keys, meanings = _keys(arguments.get(name), meaning)
        if arguments.get(name) is not None and len(keys) != len(meanings):
            raise ValueError(f"{step.path}.{name}={arguments[name]!r} must name {len(meanings)} keys")
        holds.update({key: what for key, what in zip(keys, meanings) if key is not None})


def _keys(value, meaning) -> tuple[list, tuple]:
    if isinstance(meaning, tuple):
        return list(value) if isinstance(value, (list, tuple)) else [], meaning
    return [value if isinstance(value, str) else None], (meaning,)


def settings_of(config: dict) -> dict:
    """What the configuration alone decides: fields of FlexTokConfig, `scaling_factor`, and under `shapes` what the file decides instead."""
    modules = check_config(config)
    encoder, decoder = modules[_E + "enc_transformer"], modules[_D + "dec_transformer"]
    if decoder.get("adaLN_expansion", 1) != 2:
        raise ValueError(f"{_D}dec_transformer.adaLN_expansion={decoder.get('adaLN_expansion', 1)!r}; understood here: 2")
    for path in (_E + "enc_to_latents", _D + "dec_to_patches"):
        if modules[path].get("use_mup_readout"):
            log.warning(
                "%s.use_mup_readout is set; it is read as a plain linear layer (width multiplier 1), as the published weights are", path
            )
    positions = [modules[path] for path in (_E + "enc_posemb_module", _D + "dec_patches_posemb_module")]
    patching = [modules[path] for path in (_E + "enc_patch_emb", _D + "dec_noise_patch_emb", _D + "dec_to_patches")]
    pairs = {
        "position_scaling": [p.get("posemb_scaling", "absolute") for p in positions],
        "patch_size": [tuple(p["patch_sizes"]) for p in patching],
        "mlp_ratio": [float(t.get("mlp_ratio", 4.0)) for t in (encoder, decoder)],
    }
    for name, values in pairs.items():
        if len(set(values)) > 1:
            raise ValueError(f"{name} differs between the encoder and the decoder ({values}); understood here: the same in both")
    return {
        **{name: values[0] for name, values in pairs.items()},
        "levels": tuple(modules["regularizer"]["levels"]),
        "head_width": encoder.get("head_dim", 64),
        "decoder_head_width": decoder.get("head_dim", 64),
        "max_time": float(modules[_D + "dec_time_embedder"].get("max_timestep", 1000.0)),
        "scaling_factor": modules["vae"].get("scaling_factor"),
        "shapes": {
            "encoder_width": encoder.get("dim"),
            "encoder_depth": encoder.get("depth"),
            "decoder_width": decoder.get("dim"),
            "decoder_depth": decoder.get("depth"),
            "num_registers": modules[_E + "enc_register_module"].get("n_max"),
            "max_grid": tuple(positions[0].get("max_sizes", ())) or None,
            "frequency_width": modules[_D + "dec_time_embedder"].get("frequency_embedding_size", 256),
        },
    }


_PACKAGES = {
    "StableDiffusionVAE": "vae_wrapper", "FSQ": "regularizers.quantize_fsq", "MinRFNoiseModule": "flow_matching.noise_modules",
    "MinRFPipeline": "flow_matching.pipelines", "PerSampleOp": "model.utils.dict_ops", "PatchEmbedder": "model.preprocessors.patching",
    "PositionalEmbeddingAdder": "model.utils.posembs", "Registers1D": "model.preprocessors.registers",
    "BlockWiseSequencePacker": "model.preprocessors.flex_seq_packing", "FlexTransformer": "model.trunks.transformers",
    "SequenceUnpacker": "model.postprocessors.seq_unpacking", "LinearHead": "model.postprocessors.heads",
    "ToPatchesLinearHead": "model.postprocessors.heads", "LinearLayer": "model.preprocessors.linear",
    "MaskedNestedDropout": "model.preprocessors.token_dropout", "LearnedNullCond": "model.preprocessors.nullcond",
    "TimestepEmbedder": "model.preprocessors.time_embedding",
}  # fmt: skip


def official_config(settings: FlexTokConfig) -> dict:
    """The official configuration of a FlexTok; training options, which our models do not hold, get the published defaults.

    Raises ValueError: it works on pixels, or its VAE folds pixels first; the official format cannot say that.
    """
    if settings.vae is None or settings.vae.stem != 1:
        form = "a model on pixels (vae is None)" if settings.vae is None else f"a VAE with stem={settings.vae.stem}"
        raise ValueError(f"the official FlexTok format has no form for {form}")
    config: dict = {"_target_": "flextok.flextok_wrapper.FlexTok", "vae": {}}
    for part in _MODULE_LISTS:
        config[part] = {"_target_": "flextok.model.utils.wrappers.SequentialModuleDictWrapper", "module_dict": {}}
    values = _argument_values(settings)
    for step in STEPS:
        module = {"_target_": f"flextok.{_PACKAGES[step.kind]}.{step.kind}"}
        for name, meaning in (step.reads | step.writes).items():
            if name in ("emb_packing_fn_write_key", "intermediate_layer_write_key") and step.path.startswith("encoder"):
                continue
            module[name] = [_key(m, step.path) for m in meaning] if isinstance(meaning, tuple) else _key(meaning, step.path)
        module.update(values.get(step.path, {}))
        part, _, name = step.path.partition(".module_dict.")
        if name:
            config[part]["module_dict"][name] = module
        else:
            config[part] = module
    return config


_KEYS = {
    "images": "rgb", "latents": "vae_latents", "reconstruction": "rgb_reconst", "kl": "vae_kl_loss", "latents last": "vae_latents_bhwc",
    "patches": "enc_vae_latents_patched", "placed patches": "enc_vae_latents_patched", "sizes": "register_sizes",
    "registers": "enc_registers", "encoded": "enc_packed_seq", "encoded patches": "enc_vae_latents_patched",
    "encoded registers": "enc_registers", "continuous tokens": "enc_registers", "codes": "enc_registers_quant", "ids": "tokens",
    "noisy latents": "vae_latents_noised", "times": "timesteps", "sigmas": "sigmas", "projected codes": "dec_registers_proj",
    "placed codes": "dec_registers_proj", "kept codes": "dec_registers_proj", "context": "dec_registers_proj",
    "noisy last": "vae_latents_noised_bhwc", "noisy patches": "vae_latents_noised_patched", "placed noisy patches": "dec_patches",
    "time": "dec_temb", "packing": "emb_packing_fn", "decoded": "dec_packed_seq", "decoded patches": "dec_patches",
    "decoded registers": "dec_registers_proj", "tapped": "dec_packed_seq_repa_layer", "tapped patches": "dec_patches_repa_layer",
    "tapped registers": "dec_registers_repa_layer", "velocity last": "dec_patches", "velocity": "vae_latents_reconst",
}  # fmt: skip
_KEYS_PER_PART = {"counts": "n_patches", "packed": "packed_seq", "mask": "block_mask", "inner": "ps_inner", "outer": "ps_outer"}


def _key(meaning: str, path: str) -> str:
    """The official shared key for a meaning; what is overwritten in place has one key under all its meanings."""
    return _KEYS[meaning] if meaning in _KEYS else f"{path[:3]}_{_KEYS_PER_PART[meaning]}"


def _argument_values(settings: FlexTokConfig) -> dict[str, dict]:
    """The arguments besides wiring, by module path."""
    E, D, R = settings.encoder_width, settings.decoder_width, settings.num_registers
    channels, patch, d = settings.latent_channels, list(settings.patch_size), len(settings.levels)

    def swap(name: str) -> dict:
        return {"per_sample_op": {"_target_": f"flextok.model.utils.dict_ops.{name}", "_partial_": True}}

    def patching(width: int) -> dict:
        return {"channels_in": channels, "dim": width, "patch_sizes": patch, "flatten_patches": False}

    def positions(width: int, sizes: list[int], kind: str) -> dict:
        scaling = settings.position_scaling if kind == "sincos" else "absolute"
        return {"dim": width, "max_sizes": sizes, "posemb_type": kind, "posemb_scaling": scaling}

    def trunk(width: int, depth: int, head: int) -> dict:
        ratio = {} if settings.mlp_ratio == 4.0 else {"mlp_ratio": settings.mlp_ratio}
        return {"dim": width, "depth": depth, "head_dim": head, **ratio, "use_act_checkpoint": False}

    head = {"use_mup_readout": False, "weight_init_style": "zero"}
    grid = list(settings.max_grid)
    return {
        "vae": {"latent_channels": channels, "scaling_factor": settings.vae.scaling_factor, "sample_posterior": False,
                "dtype_override": "fp32", "frozen": True, "vae_latents_read_key": _KEYS["velocity"]},
        _E + "enc_channels_to_last": swap("channels_first_to_last"),
        _E + "enc_patch_emb": patching(E),
        _E + "enc_posemb_module": positions(E, grid, "sincos"),
        _E + "enc_register_module": {"dim": E, "n_min": R, "n_max": R, "size_sampling_mode": "uniform", "ordering_mode": "nested"},
        _E + "enc_seq_packer": {"mask_mode": "causal_last", "pad_to_multiple": 128},
        _E + "enc_transformer": trunk(E, settings.encoder_depth, settings.head_width),
        _E + "enc_to_latents": {"dim": E, "dim_out": d, **head, "dtype_override": None},
        "regularizer": {"levels": list(settings.levels), "drop_quant_p": 0.0, "packed_call": True},
        "flow_matching_noise_module": {"ln": False, "stratisfied": False, "mode_scale": 0.25},
        _D + "dec_from_latents": {"dim_in": d, "dim": D},
        _D + "dec_registers_posemb_module": positions(D, [R], "learnable_sum"),
        _D + "dec_nested_dropout": {"dim": D, "size_sampling_mode": "pow2"},
        _D + "dec_latent_dropout": {"dim": D, "dropout_prob": 0.2},
        _D + "dec_noise_channels_to_last": swap("channels_first_to_last"),
        _D + "dec_noise_patch_emb": patching(D),
        _D + "dec_patches_posemb_module": positions(D, grid, "sincos"),
        _D + "dec_seq_packer": {"mask_mode": "full", "pad_to_multiple": 128, "per_subseq_embs": True},
        _D + "dec_time_embedder": {"dim": D, "frequency_embedding_size": settings.frequency_width, "max_timestep": settings.max_time},
        _D + "dec_transformer": {**trunk(D, settings.decoder_depth, settings.decoder_head_width), "adaLN_expansion": 2,
                                 "intermediate_layers": [min(1, settings.decoder_depth - 1)]},
        _D + "dec_to_patches": {"dim": D, "channels_out": channels, "patch_sizes": patch, **head},
        _D + "dec_channels_to_first": swap("channels_last_to_first"),
        "pipeline": {"_partial_": True, "noise_read_key": None, "target_sizes_read_key": None, "out_channels": channels},
    }  # fmt: skip
