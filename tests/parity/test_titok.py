"""TiTok and TA-TiTok against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked; what a case is made of comes from its case.json.
"""

import pytest
import torch
from safetensors.torch import load_file

from vistok.convert.titok import from_official, official_config, to_official
from vistok.tokens import VisualTokens

FAMILY = "titok"
GROUPS = {"images", "enc", "vq", "tokens", "text", "dec"}


@pytest.fixture(scope="module")
def model(golden):
    hyper = golden.spec["hyper"]
    file = golden.folder / "state.safetensors"
    return from_official(file, config=golden.spec["reference_config"], encoder_heads=hyper["heads"], decoder_heads=hyper["heads"])


@pytest.fixture(scope="module")
def images(golden):
    """The case's images, [0, 1], in our range."""
    return golden.io["images"] * 2 - 1


def channels_first(tokens):
    """[B, N, d] as the reference's [B, d, 1, N]."""
    return tokens.transpose(1, 2)[:, :, None]


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    assert {name.split(".")[0] for name in golden.io} <= GROUPS
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_config_says_what_the_case_says(model, golden):
    settings, pixels = model.settings, model.settings.pixel_decoder
    is_legacy = settings.target == "proxy"
    known = {
        "kind": "legacy" if is_legacy else "ta" if settings.text_width else "rgb",
        "width": settings.encoder_width if settings.encoder_width == settings.decoder_width else None,
        "layers": [settings.encoder_depth, settings.decoder_depth], "heads": settings.encoder_heads,
        "image": settings.image_size[0], "patch": settings.patch_size, "n_tokens": settings.num_registers,
        "token_size": settings.code_dim, "codebook": settings.codebook_size, "l2": settings.cosine,
        "text_len": settings.text_tokens, "text_dim": settings.text_width,
        "pix": pixels and {
            "widths": [pixels.channels * factor for factor in pixels.multipliers], "res": pixels.blocks, "z": pixels.code_dim,
            "n": settings.proxy_codebook_size,
        },
    }  # fmt: skip
    for name, value in golden.spec["hyper"].items():
        if name == "pix" and value:  # only the product can be read off the weights
            value = {"widths": [value["hidden"] * factor for factor in value["mult"]], **{key: value[key] for key in ("res", "z", "n")}}
        if name != "B":
            assert known[name] == value, name
    said, ours = golden.spec["reference_config"], official_config(settings)
    for name, value in said["model"]["vq_model"].items():
        if not name.endswith("model_size"):  # the cases' sizes have no official name
            assert ours["model"]["vq_model"][name] == value, name
    assert ours["dataset"] == said["dataset"]
    assert settings.interleaved_head == is_legacy


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    golden.check_weights(load_file(tmp_path / "model.safetensors"))
    heads = golden.spec["hyper"]["heads"]
    assert from_official(tmp_path, encoder_heads=heads, decoder_heads=heads).settings == model.settings


def losses(out):
    """[quantizer, commitment, codebook] as the reference reports them."""
    return torch.stack([out.loss, out.terms["commitment"], out.terms["codebook"]])


def test_encoder_and_its_tokens(model, golden, images):
    with torch.no_grad():
        z = model.encode_registers(images)
        out = model.quantize(images)
    results = {
        "enc.z": channels_first(z),
        "enc.z_q": channels_first(out.codes),
        "enc.indices": out.ids[:, None],
        "enc.losses": losses(out),
    }
    golden.check("enc", results)
    golden.compare("enc.indices", model.encode(images).ids[:, None])


def test_quantizer(model, golden):
    with torch.no_grad():
        out = model.quantizer(golden.io["vq.z"][:, :, 0].transpose(1, 2))
    results = {"vq.z_q": channels_first(out.codes), "vq.indices": out.ids[:, None], "vq.losses": losses(out)}
    golden.check("vq", results, inputs=("vq.z",))
    golden.compare("vq.z_q", channels_first(model.embed(out.ids)))


def test_decoder(model, golden):
    io, text = golden.io, golden.io.get("text")
    codes = io["enc.z_q"][:, :, 0].transpose(1, 2)
    results = {}
    with torch.no_grad():
        if model.settings.target == "proxy":
            results["dec.logits"] = model.proxy_logits(codes)
        if model.settings.target == "pixels" or model.pixel_decoder is not None:
            results["dec.image"] = (model.decode_codes(codes, text=text) + 1) / 2
            results["dec.image_random"] = (model.decode_codes(model.embed(io["tokens.random"]), text=text) + 1) / 2
    golden.check("dec", results)
    if "dec.image_random" in io:
        decoded = model.decode(VisualTokens.from_ids(io["tokens.random"], model.layout), text=text)
        golden.compare("dec.image_random", (decoded + 1) / 2, io["dec.image_random"].clamp(0, 1))
