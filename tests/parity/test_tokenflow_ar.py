"""TokenFlow's text-to-image model against tensors of the reference implementation, read through the official names.

Images are replayed where a tokenizer case with the same codebooks is at hand (ROOT/tokenflow or tests/golden/tokenflow).
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vistok.convert.tokenflow import from_official as tokenizer_from_official
from vistok.convert.tokenflow_t2i import FILE_NAME, from_official, to_official
from vistok.decoding.generate import generate
from vistok.decoding.multi_pass import generate_multi_pass
from vistok.decoding.sampling import SamplingConfig
from vistok.generators.tokenflow_t2i import Prompt
from vistok.rng import image_generators

FAMILY = "tokenflow_ar"
INPUTS = {"prefix_ids", "codes", "input_ids", "labels", "uncond_ids"}
CHECKED = INPUTS | {"position_ids", "attention_mask", "inputs_embeds", "logits", "loss"}
GENERATED = re.compile(r"(\w+)_(codes|image)")


@pytest.fixture(scope="module")
def model(golden):
    config = golden.spec["config"]
    model = from_official(
        golden.folder / "state.safetensors",
        scales=tuple(config["scale_rq_layers"]),
        image_token_start=config["image_token_start"],
        pad_token=config["pad_token_id"],
        norm_eps=config["ar"]["rms_norm_eps"],
    )
    shape, settings = config["ar"], model.settings
    assert (settings.width, settings.depth, settings.num_heads) == (shape["hidden_size"], shape["layers"], shape["heads"])
    assert settings.hidden == shape["intermediate_size"]
    return model


def _after(golden):
    """Ids behind the image."""
    return golden.io["input_ids"][:, golden.io["prefix_ids"].shape[1] + golden.io["codes"].shape[1] :]


def _prompt(golden):
    ids = golden.io["prefix_ids"]
    return Prompt(ids, golden.io["uncond_ids"].expand_as(ids))


def _runs(golden):
    """Name of each generation, its passes and its guidance, from what case.json says of it."""
    for name in sorted(golden.io):
        if name not in CHECKED and name.endswith("_codes"):
            said = re.search(r"topk_list=(\[[^\]]*\]).*topp_list=(\[[^\]]*\]).*cfg=([\d.]+)", golden.what(name))
            assert said, f"{name}: case.json does not say how it was drawn"
            top_k, top_p = ast.literal_eval(said[1]), ast.literal_eval(said[2])
            assert set(top_k) == {1} and len(top_k) == len(top_p), f"{name} is not greedy, so it cannot be replayed"
            yield name.removesuffix("_codes"), [SamplingConfig(temperature=0)] * len(top_k), float(said[3])


def test_every_tensor_of_the_case_is_one_that_is_checked(golden):
    runs = {name for name, _, _ in _runs(golden)}
    for name in set(golden.io) - CHECKED:
        match = GENERATED.fullmatch(name)
        assert match and match[1] in runs, f"{name} is not understood by this test"
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    golden.check_weights(load_file(tmp_path / FILE_NAME))


def test_teacher_forcing(model, golden):
    io, after = golden.io, _after(golden)
    P, L = io["prefix_ids"].shape[1], io["codes"].shape[1]
    golden.compare("input_ids", torch.cat([io["prefix_ids"], io["codes"] + model.settings.image_token_start, after], dim=1))
    golden.compare("position_ids", torch.arange(P + L + after.shape[1]).expand_as(io["input_ids"]).contiguous())
    with torch.no_grad():
        inputs, mask = model.sequence(io["prefix_ids"], io["codes"], after), model.mask(io["prefix_ids"], after.shape[1])
        logits = model.run(inputs, mask)
        codes_only = model(io["codes"], _prompt(golden))
    golden.compare("inputs_embeds", inputs)
    golden.compare("attention_mask", mask.to(io["attention_mask"].dtype))
    is_text = F.pad(io["prefix_ids"] != model.settings.pad_token, (0, logits.shape[1] - P), value=True)
    golden.compare("logits", logits[is_text], io["logits"][is_text])
    golden.compare("loss", F.cross_entropy(logits[:, :-1].flatten(0, 1), io["labels"][:, 1:].flatten(), ignore_index=-100))
    golden.compare("logits", codes_only, model.code_logits(io["logits"][:, P - 1 : P - 1 + L]))


def test_generation(model, golden):
    prompt, generators = _prompt(golden), image_generators(0, len(golden.io["prefix_ids"]))
    for name, passes, cfg in _runs(golden):
        tokens, stats = generate_multi_pass(model, prompt, generators=generators, passes=passes, guidance_scale=1 + cfg)
        golden.compare(f"{name}_codes", tokens.ids)
        assert stats.target_passes == 1 + (len(model.settings.scales) - 1) * len(passes)


def test_images(model, golden):
    tokenizer = _tokenizer(golden)
    if tokenizer is None:
        pytest.skip("no tokenizer case with these codebooks is at hand, so images cannot be replayed")
    for name, _, _ in _runs(golden):
        total = model.quantizer.decode(golden.io[f"{name}_codes"])
        with torch.no_grad():
            images = tokenizer.pixel_decoder(tokenizer.from_pixel_code(total[:, tokenizer.settings.semantic_dim :]))
        if tokenizer.settings.encoder.kind == "siglip":  # its images always end at one size
            images = F.interpolate(images, size=golden.io[f"{name}_image"].shape[1:3], mode="bicubic")
        images = (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        golden.compare(f"{name}_image", images)


def _tokenizer(golden):
    """The tokenizer whose codebooks the case uses."""
    codes = load_file(golden.folder / "state.safetensors")["tokenizer.quantize.embedding_vqkd.weight"]
    for root in (golden.folder.parent.parent, Path(__file__).parent.parent / "golden"):
        for folder in sorted(path.parent for path in (root / "tokenflow").glob("*/state.safetensors")):
            state = load_file(folder / "state.safetensors")
            if torch.equal(state["quantize.embedding_vqkd.weight"], codes):
                config = json.loads((folder / "case.json").read_text(encoding="utf-8"))["config"]
                heads = config["clip"]["heads"] if "clip" in config else config["siglip"]["num_attention_heads"]
                return tokenizer_from_official(
                    folder / "state.safetensors", encoder_heads=heads, scales=tuple(config["scale_rq_layers"]),
                    image_size=(config["image_size"],) * 2, semantic_decoder_heads=config["semantic_decoder"]["num_heads"],
                )  # fmt: skip
    return None


def test_the_plain_loop_gives_what_one_pass_gives(model, golden):
    prompt = _prompt(golden)
    drawn = dict(sampling=SamplingConfig(temperature=0), guidance_scale=4.0)
    tokens, _ = generate(model, prompt, generators=image_generators(0, len(prompt.ids)), **drawn)
    once, _ = generate_multi_pass(
        model, prompt, generators=image_generators(0, len(prompt.ids)), passes=[SamplingConfig(temperature=0)], guidance_scale=4.0
    )
    assert torch.equal(tokens.ids, once.ids)
