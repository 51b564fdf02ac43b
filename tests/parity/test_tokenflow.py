"""TokenFlow against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked; sizes, scales, teacher and semantic encoder come from its case.json.
"""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.pickles import read_state
from vistok.convert.tokenflow import FILE_NAME, from_official, official_state, to_official
from vistok.quantizers import VQ
from vistok.tokens import VisualTokens

FAMILY = "tokenflow"
CHECKED = {
    "image", "semantic_encoder_tokens", "residual_first_scale", "residual_last_scale", "quant", "indices", "d_vqkd_norm_mean",
    "d_vqgan_norm_mean", "semantic_recon", "pixel_recon", "decode_code_pixel", "decode_code_semantic", "decode_code_pixel_partial",
    "entries", "vq_in", "vq_out", "vq_indices", "vq_loss", "vq_commit_loss", "vq_entropy_loss", "vq_d_sem_norm", "vq_d_pix_norm",
    "vq_grad_weight", "vq_grad_in", "vq_grad_sem_codebook", "vq_grad_pix_codebook", "ar_features", "ar_features_refine1", "ar_decode_image",
}  # fmt: skip
TEACHERS = {"clipb_224": "clip", "siglip_384": "siglip"}


@pytest.fixture(scope="module")
def model(golden):
    config = golden.spec["config"]
    weights = config.get("distance_weights", {})
    assert config.get("l2_norm", True) and weights.get("sem", 1.0) == 1.0, (
        "codes are always unit vectors, and the semantic half has weight 1"
    )
    kind = TEACHERS[config["teacher"]]
    if kind == "clip":
        encoder = {"encoder_heads": config["clip"]["heads"], "encoder_depth": config["clip"]["layers"]}
    else:
        encoder = {"encoder_heads": config["siglip"]["num_attention_heads"], "encoder_depth": config["siglip"]["num_hidden_layers"] - 1}
    return from_official(
        golden.folder / "state.safetensors",
        image_size=(config["image_size"],) * 2,
        scales=tuple(config["scale_rq_layers"]),
        semantic_decoder_heads=config["semantic_decoder"]["num_heads"],
        commitment_weight=config["commit_loss_beta"],
        entropy_weight=config["entropy_loss_ratio"],
        pixel_weight=weights.get("pix", 1.0),
        decoded_size=golden.spec["tensors"]["pixel_recon"]["shape"][-1],
        **encoder,
    )


@pytest.fixture(scope="module")
def encoded(model, golden):
    with torch.no_grad():
        return model.quantizer.encode(model.features(golden.io["image"]))


def _spread(model, inputs):
    """Mean over vectors of the sum over codes of the squared distance squared, for the semantic and the pixel half, float64."""
    vq, split = model.quantizer.quantizer, (model.settings.semantic_dim, model.settings.pixel_dim)
    z = vq.place(inputs.permute(0, 2, 3, 1).flatten(0, 2)).double()
    return [torch.cdist(a, b).pow(4).sum(1).mean().float() for a, b in zip(z.split(split, 1), vq.vectors().double().split(split, 1))]


def test_every_tensor_of_the_case_is_one_that_is_checked(golden):
    assert set(golden.io) <= CHECKED
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_config_says_what_the_case_says(model, golden):
    config, settings = golden.spec["config"], model.settings
    assert settings.encoder.kind == TEACHERS[config["teacher"]] and settings.encoder.width == config["semantic_embed_dim"]
    assert settings.pixel_width == config["ch"] and list(settings.pixel_multipliers) == config["encoder_ch_mult"]
    assert settings.pixel_blocks == config["encoder_num_res_blocks"] and settings.decoder_blocks == config["decoder_num_res_blocks"]
    widths = [settings.decoder_width * factor for factor in settings.decoder_multipliers]
    assert widths == [config["decoder_ch"] * factor for factor in config["decoder_ch_mult"]]
    assert settings.latent_channels == config["z_channels"] and settings.codebook_size == config["codebook_size"]
    assert (settings.semantic_dim, settings.pixel_dim) == (config["semantic_code_dim"], config["codebook_embed_dim"])
    assert settings.teacher_width == config["decoder_out_dim"]
    decoder = config["semantic_decoder"]
    assert (settings.semantic_decoder_grid, settings.semantic_decoder_depth) == (decoder["grid"], decoder["depth"])
    assert settings.semantic_decoder_hidden == decoder["mlp_ratio"] * settings.encoder.width and decoder.get("layernorm_eps", 1e-6) == 1e-6
    if "clip" in config:
        assert settings.encoder.depth == config["clip"]["layers"] and settings.encoder.patch_size == config["clip"]["patch_size"]
    else:
        siglip = config["siglip"]
        assert settings.encoder.hidden == siglip["intermediate_size"] and settings.encoder.patch_size == siglip["patch_size"]


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    written, original = read_state(tmp_path / FILE_NAME), load_file(golden.folder / "state.safetensors")
    used = official_state(model)
    assert set(original) <= set(written)
    assert all(torch.equal(written[key], original[key]) for key in original if key in used)
    assert set(used) <= set(original)


def test_encoding(model, golden, encoded):
    io = golden.io
    with torch.no_grad():
        golden.compare("semantic_encoder_tokens", model.semantic_tokens(io["image"]))
    golden.compare("residual_first_scale", encoded.inputs[0])
    golden.compare("residual_last_scale", encoded.inputs[-1])
    golden.compare("quant", encoded.total)
    golden.compare("indices", encoded.ids)
    golden.compare("indices", model.encode(io["image"]).ids)
    semantic, pixel = zip(*(_spread(model, inputs) for inputs in encoded.inputs))
    golden.compare("d_vqkd_norm_mean", torch.stack(semantic).mean())
    golden.compare("d_vqgan_norm_mean", torch.stack(pixel).mean())


def test_decoding(model, golden):
    io = golden.io
    tokens = VisualTokens.from_ids(io["indices"], model.layout)
    with torch.no_grad():
        golden.compare("semantic_recon", model.decode_meaning(io["quant"]))
        golden.compare("pixel_recon", model.decode_pixels(io["quant"]))
        golden.compare("decode_code_semantic", model.decode_semantic(tokens))
        golden.compare("decode_code_pixel", model.decode_pixels(model.total(tokens)))
        golden.compare("ar_decode_image", model.decode_pixels(model.total(tokens)))
        golden.compare("entries", model.embed(io["indices"]))
        prefix = tokens.truncate(model.max_tokens - model.quantizer.sizes[-1])
        golden.compare("decode_code_pixel_partial", model.decode_pixels(model.total(prefix)))
        golden.compare("decode_code_pixel_partial", model.decode(prefix), io["decode_code_pixel_partial"].clamp(-1, 1))


def test_the_inputs_of_the_next_scale(model, golden):
    def features(**options):
        return torch.cat([part.flatten(2) for part in model.quantizer.next_scale_inputs(golden.io["indices"], **options)], dim=2).mT

    golden.compare("ar_features", features())
    refined = re.search(r"scale index (\d+)", golden.what("ar_features_refine1"))
    assert refined, "case.json does not say which scale is refined"
    golden.compare("ar_features_refine1", features(refined=int(refined[1])))


def test_the_quantizer_and_its_gradients(model, golden):
    io, settings = golden.io, model.settings
    trained = model.quantizer.quantizer
    vq = VQ(replace(trained.config, entropy_weight=golden.spec["config"]["entropy_loss_ratio"]))
    vq.load_state_dict(trained.state_dict())
    z = io["vq_in"].clone().requires_grad_()
    out = vq.quantize(z.permute(0, 2, 3, 1))
    codes = out.codes.permute(0, 3, 1, 2)
    golden.compare("vq_out", codes)
    golden.compare("vq_indices", out.ids.flatten())
    golden.compare("vq_loss", out.terms["codebook"])
    golden.compare("vq_commit_loss", out.terms["commitment"])
    golden.compare("vq_entropy_loss", out.terms.get("entropy", torch.zeros(())))
    for name, spread in zip(("vq_d_sem_norm", "vq_d_pix_norm"), _spread(model, io["vq_in"])):
        golden.compare(name, spread)
    ((codes * io["vq_grad_weight"]).sum() + out.loss).backward()
    golden.compare("vq_grad_in", z.grad)
    semantic, pixel = vq.codebook.grad.split((settings.semantic_dim, settings.pixel_dim), dim=1)
    golden.compare("vq_grad_sem_codebook", semantic)
    golden.compare("vq_grad_pix_codebook", pixel)
