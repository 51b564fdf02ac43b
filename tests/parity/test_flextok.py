"""FlexTok against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked; what a case is made of (sizes, levels, schedules, the names of its decodes) comes from its case.json.
"""

import re

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.flextok import from_official, official_state, to_official
from vistok.flow import AdaptiveProjectedGuidance, classifier_free, interpolate, sample_times
from vistok.layers.positions import time_features
from vistok.quantizers import FSQ, FSQConfig
from vistok.tokenizers.flextok_nets import TIME_MAX_PERIOD
from vistok.tokens import VisualTokens

FAMILY = "flextok"
GROUPS = {"images", "fsq", "vae", "enc", "time", "dec", "guid", "detok", "sched", "train"}
FOLDED = pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])


@pytest.fixture(scope="module")
def model(golden):
    hyper = golden.spec["hyper"]
    model = from_official(
        golden.folder / "state.safetensors",
        config=golden.spec["hydra_config"],
        norm_groups=hyper.get("vae_norm_groups"),
        image_size=tuple(golden.spec["image_size"]),
    )
    return model


def _context(model, golden, folded, *, counts=None):
    counts = golden.io["dec.keep_k"] if counts is None else counts
    return model.decoder.context(model.embed(golden.io["enc.tokens"][:, : int(counts.max())]), counts, folded=folded)


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    assert {name.split(".")[0] for name in golden.io} <= GROUPS
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_config_says_what_the_case_says(model, golden):
    settings = model.settings
    known = {
        "enc_dim": settings.encoder_width, "enc_depth": settings.encoder_depth, "enc_head_dim": settings.head_width,
        "dec_dim": settings.decoder_width, "dec_depth": settings.decoder_depth, "dec_head_dim": settings.decoder_head_width,
        "n_registers": settings.num_registers, "patch_size": list(settings.patch_size), "max_grid": list(settings.max_grid),
        "mlp_ratio": settings.mlp_ratio, "posemb_scaling": settings.position_scaling, "adaLN_expansion": 2,
        "latent_channels": settings.latent_channels, "fsq_levels": list(settings.levels), "freq_dim": settings.frequency_width,
        "max_timestep": settings.max_time, "scaling_factor": settings.vae.scaling_factor,
        "vae_block_out": list(settings.vae.block_channels),
        "vae_layers_per_block": settings.vae.layers_per_block, "vae_norm_groups": settings.vae.norm_groups,
    }  # fmt: skip
    for name, value in golden.spec["hyper"].items():
        if name != "sample_posterior":  # ours takes the mode unless the caller gives generators
            assert known[name] == value, name


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    golden.check_weights(load_file(tmp_path / "model.safetensors"))
    again = from_official(tmp_path, norm_groups=model.settings.vae.norm_groups, image_size=model.settings.image_size)
    assert again.settings == model.settings


def test_fsq(golden):
    fsq = FSQ(FSQConfig(levels=tuple(golden.spec["hyper"]["fsq_levels"])))
    z = golden.io["fsq.z"]
    out = fsq(z)
    results = {
        "fsq.bounded": fsq.bound(z),
        "fsq.quant": out.codes,
        "fsq.indices": out.ids,
        "fsq.all_codes": fsq.decode(torch.arange(fsq.codebook_size)),
    }
    golden.check("fsq", results, inputs=("fsq.z",))
    torch.testing.assert_close(results["fsq.quant"], golden.io["fsq.quant"], rtol=0, atol=1e-6)
    torch.testing.assert_close(fsq.decode(out.ids), golden.io["fsq.quant"], rtol=0, atol=1e-6)


def test_vae(model, golden):
    io, scale = golden.io, model.settings.vae.scaling_factor
    with torch.no_grad():
        mean, logvar = model.vae.posterior(io["images"])
        mode = model.encode_latents(io["images"])
    results = {"vae.posterior_mean": mean, "vae.posterior_logvar": logvar}
    if "vae.eps" in io:
        results["vae.latents_sampled"] = (mean + torch.exp(0.5 * logvar) * io["vae.eps"]) * scale
    results["vae.latents"] = results["vae.latents_sampled"] if golden.spec["hyper"]["sample_posterior"] else mode
    golden.check("vae", results, inputs=("vae.eps",))


def test_encoder(model, golden):
    latents = golden.io["vae.latents"]
    R = model.max_tokens
    with torch.no_grad():
        quantized = model.quantize(latents)
        results = {
            "enc.patches_in": model.encoder.patches(latents),
            "enc.registers_out": model.encoder.trunk(latents, R),
            "enc.latents": model.encoder(latents, R),
            "enc.quant": quantized.codes,
            "enc.tokens": quantized.ids,
        }
    golden.check("enc", results)
    if not golden.spec["hyper"]["sample_posterior"]:
        golden.compare("enc.tokens", model.encode(golden.io["images"]).ids)


def test_encoding_k_tokens_gives_the_first_k_reference_tokens(model, golden):
    for k in sorted({1, 2, model.max_tokens // 2, model.max_tokens} - {0}):
        if k <= model.max_tokens:
            golden.compare("enc.tokens", model.quantize(golden.io["vae.latents"], num_tokens=k).ids, golden.io["enc.tokens"][:, :k])


def test_time(model, golden):
    t, settings = golden.io["time.t"], model.settings
    features = time_features(t, width=settings.frequency_width, max_period=TIME_MAX_PERIOD, time_scale=1000.0 / settings.max_time)
    with torch.no_grad():
        golden.check("time", {"time.sinusoid": features, "time.emb": model.decoder.time_mlp(features)}, inputs=("time.t",))


@FOLDED
def test_decoder(model, golden, folded):
    io, decoder = golden.io, model.decoder
    transformer = golden.spec["hydra_config"]["decoder"]["module_dict"]["dec_transformer"]
    tap = transformer.get("intermediate_layers", [None])[0]
    with torch.no_grad():
        modulations = decoder.modulations(io["dec.t"])
        velocity, tapped = decoder(io["dec.x_t"], modulations, _context(model, golden, folded), tap=tap)
        null, _ = decoder(io["dec.x_t"], modulations, decoder.null_context(len(io["dec.t"]), folded=folded))
        everything_dropped = decoder.context(
            model.embed(io["enc.tokens"]), io["dec.keep_k"], is_dropped=torch.ones_like(io["dec.keep_k"], dtype=torch.bool), folded=folded
        )
        dropped, _ = decoder(io["dec.x_t"], modulations, everything_dropped)
    results = {"dec.v_cond": velocity, "dec.v_uncond": null}
    if tapped is not None:
        rows, columns = (side // patch for side, patch in zip(io["dec.x_t"].shape[-2:], model.settings.patch_size))
        results["dec.repa_features"] = tapped.unflatten(1, (rows, columns))
    golden.check("dec", results, inputs=("dec.x_t", "dec.t", "dec.keep_k"))
    golden.compare("dec.v_uncond", dropped)


def test_guidance(golden):
    results = {}
    for name in golden.names("guid"):
        kind, scale = re.match(r"guid\.(apg|cfg)", name), re.search(r"scale (\d+(?:\.\d+)?)", golden.what(name))
        if kind and scale:
            combine = AdaptiveProjectedGuidance() if kind[1] == "apg" else classifier_free
            steps = zip(golden.io["guid.cond"], golden.io["guid.uncond"])
            results[name] = torch.stack([combine(cond, uncond, float(scale[1])) for cond, uncond in steps])
    golden.check("guid", results, inputs=("guid.cond", "guid.uncond"))


def _tokens(model, golden, counts) -> VisualTokens:
    return VisualTokens.from_ids(golden.io["enc.tokens"], model.layout).truncate(torch.tensor(counts))


@FOLDED
def test_decoding_from_noise_to_image(model, golden, schedule, folded):
    io, size, results = golden.io, tuple(golden.spec["image_size"]), {}
    for case in golden.spec["detok_cases"]:
        trajectory = []
        latents = model.decode_to_latents(
            _tokens(model, golden, case["keep_k"]),
            noise=io["detok.noise"],
            num_steps=case["steps"],
            guidance_scale=schedule(case["guidance"]),
            guidance="apg" if case["apg"] else "cfg",
            image_size=size,
            folded=folded,
            on_step=lambda step, x, keep=trajectory: keep.append(x),
        )
        name = f"detok.{case['name']}"
        results |= {f"{name}.traj": torch.stack(trajectory), f"{name}.latents": latents, f"{name}.image": _image(model, latents)}
    for name in golden.names("detok"):
        # a decode described in words: tokens[:, :k], timesteps=N, guidance_scale=S, [norm guidance], generator seed Z
        text = golden.what(name)
        k, steps, scale, seed = (
            re.search(p, text) for p in (r"tokens\[:, ?:(\d+)\]", r"timesteps=(\d+)", r"guidance_scale=([\d.]+)", r"seed (\d+)")
        )
        if name in results or not (name.endswith(".image") and k and steps and scale and seed):
            continue
        generator = torch.Generator().manual_seed(int(seed[1]))
        shape = (1, model.settings.latent_channels, *golden.spec["latent_size"])
        latents = model.decode_to_latents(
            _tokens(model, golden, min(int(k[1]), model.max_tokens)),  # a slice may end behind the last
            noise=torch.cat([torch.randn(shape, generator=generator) for _ in io["enc.tokens"]]),
            num_steps=int(steps[1]),
            guidance_scale=float(scale[1].rstrip(".")),
            guidance="apg" if "norm guidance" in text and "no norm guidance" not in text else "cfg",
            image_size=size,
            folded=folded,
        )
        results[name] = _image(model, latents)
    golden.check("detok", results, inputs=("detok.noise",))


def _image(model, latents):
    with torch.no_grad():
        return model.vae.decode_latents(latents)


def test_time_sampling(golden):
    results = {}
    for name in golden.names("sched"):
        scale = re.search(r"mode sampling, scale (-?[\d.]+)", golden.what(name))
        if scale:
            results[name] = sample_times(golden.io["sched.u"], sampling="mode", mode_scale=float(scale[1].rstrip(".")))
    golden.check("sched", results, inputs=("sched.u",))


@pytest.mark.parametrize("all_registers", [False, True], ids=["kept-registers", "all-registers"])
def test_training_loss_and_gradients(model, golden, all_registers):
    io = golden.io
    if not golden.names("train"):
        return
    counts = io["dec.keep_k"]
    model.zero_grad()
    k = model.max_tokens if all_registers else int(counts.max())
    out, _ = model(io["vae.latents"], noise=io["train.noise"], times=io["train.sigma"], counts=counts, num_tokens=k)
    out.losses["flow"].backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    named = official_state(model.settings, gradients)
    model.zero_grad()
    results = {"train.loss": out.losses["flow"][None], **{f"train.grad.{key}": value for key, value in named.items()}}
    golden.check("train", results, inputs=("train.sigma", "train.noise"))
    for name in golden.names("train"):
        if name.startswith("train.grad."):  # gradients are small against an absolute tolerance, so hold them to their own size too
            largest = float(io[name].abs().max())
            assert float((results[name] - io[name]).abs().max()) <= 0.01 * largest + 1e-7, name


@FOLDED
def test_the_unfolded_decoder_gives_the_reference_loss(model, golden, folded):
    io = golden.io
    if not golden.names("train"):
        return
    with torch.no_grad():
        modulations = model.decoder.modulations(io["train.sigma"])
        x_t = interpolate(io["vae.latents"], io["train.noise"], io["train.sigma"])
        velocity, _ = model.decoder(x_t, modulations, _context(model, golden, folded))
    golden.compare("train.loss", (velocity - (io["train.noise"] - io["vae.latents"])).square().mean()[None])
