"""LlamaGen's tokenizer and its class and caption generators against tensors of the reference implementation.

Weights come through the official checkpoint format. Every tensor of every case is checked; sizes, guidance and the names of the decoding
runs come from its case.json. A case may leave out a part (`config.vq`, `config.c2i`, `config.t2i`).
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vistok.convert.llamagen import from_official, official_state, to_official
from vistok.decoding import SamplingConfig, generate, guidance_until, warp

FAMILY = "llamagen"
PARTS = ("vq", "c2i", "t2i")
RUN = re.compile(r"greedy(_nomask)?_cfg(\d+(?:\.\d+)?)?(_interval)?")
WORDS = {"class table": "cls_embedding.embedding_table.weight"}


def load(golden, part):
    """The converted model of one part, or None where the case has none."""
    config, path = golden.spec["config"].get(part), golden.folder / f"{part}_state.safetensors"
    if config is None:
        assert not golden.names(part) and not path.exists()
        return None
    if part == "vq":
        return from_official(path, image_size=(config["image_size"],) * 2)
    side = math.isqrt(config["block_size"])
    sizes = dict(num_heads=config["n_head"], norm_eps=config["norm_eps"], rope_base=float(config["rope_base"]))
    return from_official(path, layout_shape=(side, side), **sizes)


@pytest.fixture(scope="module")
def models(golden):
    return {part: load(golden, part) for part in PARTS}


@pytest.fixture(params=PARTS)
def part(request):
    return request.param


def conditions(golden, name, model, *, masked=True):
    io = golden.io
    if name == "c2i":
        return model.make_condition(len(io["c2i.labels"]), labels=io["c2i.labels"])
    mask = io["t2i.emb_masks"].bool()
    return model.make_condition(len(mask), features=(io["t2i.caption"], mask if masked else torch.ones_like(mask)))


def step_by_step(model, ids, condition):
    cache = model.new_cache(len(ids))
    parts = [model(ids[:, :0], condition, cache=cache)]
    parts += [model(ids[:, n : n + 1], cache=cache) for n in range(ids.shape[1] - 1)]
    return torch.cat(parts, 1)


def run(golden, name, model, tensor):
    """The greedy run that a tensor's name asks for."""
    config = golden.spec["config"]
    unmasked, scale, interval = RUN.fullmatch(tensor.removeprefix(f"{name}.")).groups()
    scale = float(scale) if scale else float(config["cfg_scale"])
    if interval and config["cfg_interval"] >= 0:  # decode step i makes token i + 1, and steps up to cfg_interval are guided; -1: all
        scale = guidance_until(scale, config["cfg_interval"] + 2)
    condition = conditions(golden, name, model, masked=not unmasked)
    uniforms = torch.zeros(golden.io[tensor].shape)
    tokens, _ = generate(model, condition, uniforms=uniforms, sampling=SamplingConfig(temperature=0), guidance_scale=scale)
    return tokens.ids.int()


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    assert {name.split(".")[0] for name in golden.io} <= {*PARTS, "filter"}
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_configs_say_what_the_case_says(models, golden):
    config = golden.spec["config"]
    for name in PARTS:
        if models[name] is None:
            continue
        settings = models[name].settings
        if name == "vq":
            known = {
                "codebook_size": settings.codebook_size, "codebook_embed_dim": settings.code_dim, "z_channels": settings.latent_channels,
                "ch": settings.width, "ch_mult": list(settings.multipliers), "num_res_blocks": settings.blocks,
                "image_size": settings.image_size[0],
            }  # fmt: skip
        else:
            multiple = config[name]["multiple_of"]
            assert settings.hidden_width == -(-int(8 * settings.width / 3) // multiple) * multiple
            known = {
                "dim": settings.width, "n_layer": settings.depth, "n_head": settings.num_heads, "vocab_size": settings.codebook_size,
                "block_size": settings.num_tokens, "cls_token_num": models[name].prefix_length, "norm_eps": settings.norm_eps,
                "rope_base": settings.rope_base, "multiple_of": multiple, "class_dropout_prob": config[name]["class_dropout_prob"],
                **({"num_classes": settings.num_classes} if name == "c2i" else
                   {"caption_dim": settings.caption_width, "uncond_tokens": settings.caption_tokens}),
            }  # fmt: skip
        for key, value in config[name].items():
            assert known[key] == value, (name, key)


def test_the_official_checkpoint_is_written_back_bit_equal(models, golden, tmp_path, part):
    model = models[part]
    if model is None:
        return
    to_official(model, tmp_path)
    original = load_file(golden.folder / f"{part}_state.safetensors")
    written = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original if key != "quantize.codebook_used")
    fields = (
        {} if part == "vq" else {name: getattr(model.settings, name) for name in ("layout_shape", "num_heads", "norm_eps", "rope_base")}
    )
    again = from_official(tmp_path, **fields, **({"image_size": model.settings.image_size} if part == "vq" else {}))
    assert again.settings == model.settings
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_tokenizer(models, golden):
    model, io = models["vq"], golden.io
    if model is None:
        return
    with torch.no_grad():
        vectors = model.vectors(io["vq.image"])
        out = model.quantizer(vectors)
        ids = io["vq.indices"].view(out.ids.shape)
        results = {
            "vq.prequant": vectors.permute(0, 3, 1, 2),
            "vq.indices": out.ids.flatten(),
            "vq.zq": out.codes.permute(0, 3, 1, 2),
            "vq.decoded": model.decode_codes(model.embed(ids)),
            "vq.losses": torch.stack([out.terms["codebook"], out.terms["commitment"]]),
        }
    golden.check("vq", results, inputs=("vq.image",))
    tokens = model.encode(io["vq.image"])
    golden.compare("vq.indices", tokens.ids.flatten())
    golden.compare("vq.decoded", model.decode(tokens), io["vq.decoded"].clamp(-1, 1))


@torch.no_grad()
def test_class_generator(models, golden):
    model, io = models["c2i"], golden.io
    if model is None:
        return
    ids, condition = io["c2i.idx"], conditions(golden, "c2i", model)
    results = {
        "c2i.freqs_cis": model.rotations,
        "c2i.logits_nocache": model(ids[:, :-1], condition),
        "c2i.logits_cache": step_by_step(model, ids, condition),
    }
    if "c2i.guided_logits" in io:
        along = io["c2i.greedy_cfg"][:, :-1].long()
        conditional, unconditional = model(along, condition), model(along, condition.null())
        results["c2i.guided_logits"] = unconditional + golden.spec["config"]["cfg_scale"] * (conditional - unconditional)
    runs = {name: run(golden, "c2i", model, name) for name in golden.names("c2i") if RUN.fullmatch(name.removeprefix("c2i."))}
    training = tuple(name for name in io if name.startswith("c2i.train."))  # the test below
    golden.check("c2i", results | runs, inputs=("c2i.idx", "c2i.labels", *training))


def test_training_loss_and_gradients_of_the_class_generator(models, golden):
    model, io = models["c2i"], golden.io
    names = [name for name in golden.names("c2i") if name.startswith("c2i.train.")]
    if not names:
        return
    ids, condition = io["c2i.idx"], conditions(golden, "c2i", model)
    dropped = io["c2i.train.label_drop_u"] < golden.spec["config"]["c2i"]["class_dropout_prob"]
    model.zero_grad()
    logits = model(ids[:, :-1], condition.drop(dropped, dropped))
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    gradients = official_state(model, {key: parameter.grad for key, parameter in model.named_parameters()})
    model.zero_grad()
    results = {"c2i.train.logits": logits, "c2i.train.loss": loss[None]}
    for name in names:
        found = re.match(r"gradient of (?:the )?([\w. ]+)", golden.what(name))
        if found:
            results[name] = gradients[WORDS.get(found[1], found[1])]
    for name in names:
        if name != "c2i.train.label_drop_u":
            assert name in results, f"{golden.folder}: {name} is not understood by this test"
            golden.compare(name, results[name])


@torch.no_grad()
def test_caption_generator(models, golden):
    model, io = models["t2i"], golden.io
    if model is None:
        return
    ids, condition = io["t2i.idx"], conditions(golden, "t2i", model)
    logits = model(ids[:, :-1], condition)
    runs = {name: run(golden, "t2i", model, name) for name in golden.names("t2i") if RUN.fullmatch(name.removeprefix("t2i."))}
    golden.check("t2i", {"t2i.logits": logits, **runs}, inputs=("t2i.idx", "t2i.caption", "t2i.emb_masks"))
    golden.compare("t2i.logits", step_by_step(model, ids, condition))


@torch.no_grad()
def test_captions_padded_on_the_right_give_the_reference_logits(models, golden):
    """Ours moves the padding to the left itself, so features come as a text model makes them."""
    model, io = models["t2i"], golden.io
    if model is None:
        return
    mask = io["t2i.emb_masks"].bool()
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    features = io["t2i.caption"].gather(1, order[..., None].expand_as(io["t2i.caption"]))
    condition = model.make_condition(len(mask), features=(features, mask.gather(1, order)))
    golden.compare("t2i.logits", model(io["t2i.idx"][:, :-1], condition))


@pytest.mark.parametrize("name", ["c2i", "t2i"])
def test_a_guided_batch_gives_what_its_images_give_alone(name, models, golden):
    model = models[name]
    if model is None:
        return
    condition, sampling = conditions(golden, name, model), SamplingConfig(top_k=20, top_p=0.9, temperature=0.8)
    uniforms = torch.rand(golden.io[f"{name}.idx"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, _ = generate(model, condition, uniforms=uniforms, sampling=sampling, guidance_scale=2.0)
    for i in range(len(uniforms)):
        alone, _ = generate(model, condition[i : i + 1], uniforms=uniforms[i : i + 1], sampling=sampling, guidance_scale=2.0)
        assert torch.equal(alone.ids[0], together.ids[i])


def test_filters(golden):
    """Each filtered law says its settings in words: top_k=K, top_p=P, temperature T; "both filters" are those of filter.both."""
    if not golden.names("filter"):
        return
    logits = golden.io["filter.in"]
    for name in golden.names("filter"):
        text = golden.what(name).replace("both filters", golden.what("filter.both"))
        given = {key: re.search(rf"{key}[= ](\d+(?:\.\d+)?)", text) for key in ("top_k", "top_p", "temperature")}
        given = {key: float(match[1]) for key, match in given.items() if match}
        if name == "filter.in":
            continue
        assert given, f"{golden.folder}: {name} is not understood by this test"
        warped = warp(logits, SamplingConfig(**{**given, "top_k": int(given.get("top_k", 0))}))
        if "probabilities" in text:
            golden.compare(name, warped.softmax(-1))
            continue
        kept = golden.io[name].isfinite()
        assert torch.equal(warped.isfinite(), kept), name
        zero = torch.zeros(())
        golden.compare(name, warped.where(kept, zero), golden.io[name].where(kept, zero))
