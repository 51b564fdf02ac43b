"""VAR's tokenizer and transformer against tensors of the reference implementation, read through the official checkpoint format.

Every tensor of every case is checked; what a case is made of (sizes, scales, phis, heads, guidance, filters) comes from its case.json.
"""

import re

import pytest
import torch

from vistok.convert.var import from_official, official_state, to_official
from vistok.decoding import SamplingConfig, generate, warp
from vistok.quantizers.phi import phi_of_scales
from vistok.training.tasks.generator import token_loss

FAMILY = "var"
GROUPS = {"vae", "var", "gen", "filter"}
VAE_FIELDS = {"vocab_size", "z_channels", "ch", "ch_mult", "num_res_blocks", "using_znorm", "quant_resi", "share_quant_resi", "patch_nums"}
VAR_FIELDS = {"num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "shared_aln", "attn_l2_norm", "cond_drop_rate"}


@pytest.fixture(scope="module")
def tokenizer(golden):
    vae = golden.spec["config"]["vae"]
    metric = "cosine" if vae["using_znorm"] else "euclidean"
    return from_official(
        golden.folder / "vae_state.safetensors", scales=tuple(vae["patch_nums"]), metric=metric, phi_ratio=vae["quant_resi"]
    )


@pytest.fixture(scope="module")
def model(golden, tokenizer):
    config = golden.spec["config"]
    options = dict(num_heads=config["var"]["num_heads"], norm_eps=config["norm_eps"])
    return from_official(golden.folder / "var_state.safetensors", tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def guidance(golden):
    return 1 + golden.spec["config"]["cfg_scale"]  # the reference's t is s - 1


def test_every_tensor_of_the_case_belongs_to_a_group_that_is_checked(golden):
    assert {name.split(".")[0] for name in golden.io} <= GROUPS
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_the_converted_config_says_what_the_case_says(tokenizer, model, golden):
    config, vae, var = golden.spec["config"], tokenizer.settings, model.settings
    assert set(config) == {"vae", "var", "batch", "cfg_scale", "L", "norm_eps"}
    assert set(config["vae"]) == VAE_FIELDS and set(config["var"]) == VAR_FIELDS
    assert config["vae"] == {
        "vocab_size": vae.codes.codebook_size, "z_channels": vae.codes.code_dim, "ch": vae.width, "ch_mult": list(vae.multipliers),
        "num_res_blocks": vae.blocks, "using_znorm": vae.codes.metric == "cosine", "quant_resi": vae.codes.phi_ratio,
        "share_quant_resi": vae.codes.num_phis, "patch_nums": list(vae.codes.scales),
    }  # fmt: skip
    assert config["var"] | {"cond_drop_rate": None} == {
        "num_classes": var.num_classes, "depth": var.depth, "embed_dim": var.width, "num_heads": var.num_heads, "mlp_ratio": var.mlp_ratio,
        "shared_aln": var.shared_modulation, "attn_l2_norm": var.unit_attention, "cond_drop_rate": None,
    }  # fmt: skip
    assert (config["L"], config["norm_eps"]) == (model.max_tokens, var.norm_eps)


def test_the_official_checkpoints_are_written_back_bit_equal(tokenizer, model, golden, tmp_path):
    for part, name in ((tokenizer, "vae"), (model, "var")):
        golden.check_weights(official_state(part), f"{name}_state.safetensors")
        to_official(part, tmp_path)
    codes, settings = tokenizer.settings.codes, model.settings
    options = dict(metric=codes.metric, phi_ratio=codes.phi_ratio, num_heads=settings.num_heads, norm_eps=settings.norm_eps)
    again = from_official(tmp_path, **options)
    assert again.settings == model.settings
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_which_phi_a_scale_uses(golden, tokenizer):
    table = golden.spec.get("phi_index_per_scale", {})
    for name, expected in table.items():
        num_scales, count = map(int, re.fullmatch(r"K(\d+)_S(\d+)", name).groups())
        assert list(phi_of_scales(num_scales, count)) == expected, name


def test_tokenizer(tokenizer, golden):
    images, ms = golden.io["vae.image"], tokenizer.quantizer
    tokens = tokenizer.encode(images)
    totals = ms.totals(tokens.ids)
    reduced = [torch.nn.functional.interpolate(f, size=scale, mode="area") for f, scale in zip(totals, ms.scales[1:])]
    with torch.no_grad():
        results = {
            "vae.f": tokenizer.features(images),
            "vae.indices": tokens.ids,
            "vae.fhat_per_scale": torch.stack(totals, dim=1),
            "vae.var_input": torch.cat([part.flatten(2).transpose(1, 2) for part in reduced], dim=1),
            "vae.recon": tokenizer.decode(tokens),
        }
    golden.check("vae", results, inputs=("vae.image",))


def test_encoding_fewer_scales_gives_the_first_reference_tokens(tokenizer, model, golden):
    for end in model.ends:
        golden.compare("vae.indices", tokenizer.encode(golden.io["vae.image"], num_tokens=end).ids, golden.io["vae.indices"][:, :end])


def _dropped(model, golden):
    io = golden.io
    dropped = io["var.label_drop_u"] < golden.spec["config"]["var"]["cond_drop_rate"]
    return model.make_condition(len(dropped), labels=io["var.labels"]).drop(dropped, dropped)


@pytest.mark.parametrize("cached", [False, True], ids=["one-pass", "scale-by-scale"])
def test_teacher_forced_logits_and_loss(model, golden, cached):
    ids, condition = golden.io["vae.indices"], _dropped(model, golden)
    with torch.no_grad():
        logits = _by_scale(model, ids, condition) if cached else model(ids, condition)
    results = {"var.logits": logits, "var.loss": token_loss(logits, ids)[0][None]}
    golden.check("var", results, inputs=("var.labels", "var.label_drop_u"))


def _by_scale(model, ids, condition):
    cache, new, rows = model.new_cache(len(ids)), ids[:, :0], []
    for part in ids.split(model.sizes, dim=1):
        rows.append(model(new, condition, cache=cache))
        new, condition = part, None
    return torch.cat(rows, dim=1)


def test_greedy_generation_with_guidance(model, tokenizer, golden, guidance):
    io = golden.io
    condition = model.make_condition(len(io["var.labels"]), labels=io["var.labels"])
    drawn = torch.full((len(io["var.labels"]), model.max_tokens), 0.5)
    options = dict(uniforms=drawn, guidance_scale=guidance)
    tokens, stats = generate(model, condition, sampling=SamplingConfig(top_k=1), **options)
    assert stats.target_passes == len(model.sizes)
    assert torch.equal(generate(model, condition, sampling=SamplingConfig(temperature=0), **options)[0].ids, tokens.ids)
    schedule = model.guidance_schedule(guidance)
    scales = torch.tensor([schedule(k) for k in range(len(model.sizes))])[model.scale_numbers][:, None]
    with torch.no_grad():
        c, u = model(tokens.ids, condition), model(tokens.ids, condition.null())
    results = {
        "gen.indices": tokens.ids,
        "gen.guided_logits": u + scales * (c - u),
        "gen.fhat_per_scale": torch.stack(model.quantizer.totals(tokens.ids), dim=1),
        "gen.image": tokenizer.decode(tokens) / 2 + 0.5,
    }
    golden.check("gen", results)


def test_filters(golden):
    results = {}
    for name in golden.names("filter"):
        found = re.fullmatch(r"filter\.probs(?:_top_k(\d+))?(?:_(?:top_)?p(\d+))?", name)
        if found and (found[1] or found[2]):
            p = int(found[2]) / 10 ** (len(found[2]) - 1) if found[2] else 0
            law = warp(golden.io["filter.in"], SamplingConfig(top_k=int(found[1] or 0), top_p=p or 1.0))
            results[name] = law.softmax(-1)
    golden.check("filter", results, inputs=("filter.in",))
