"""LaVIT against tensors of the reference implementation, read through the official key names.

Every tensor of every case is checked; sizes, heads and the kind of decoder come from its case.json. `argmax_*` is the path without noise,
`sampled_*` the one with the case's Gumbel noise.
"""

import re

import pytest
import torch

from vistok.convert.lavit import from_official, official_state, read_official, to_official
from vistok.tokenizers.lavit_parts import kept_rows
from vistok.tokens import VisualTokens

FAMILY = "lavit"
KNOWN_CONFIG = {
    "vit", "eva_embed_dim", "merger_layers", "merger_heads", "merger_mlp_ratio", "merger_layernorm_eps", "n_code", "code_dim", "llm_dim",
    "decoder", "image_start_id", "image_end_id", "code_id_offset",
}  # fmt: skip
KNOWN_DECODER = {
    "kind", "embed_dim", "depth", "num_heads", "mlp_ratio", "layernorm_eps", "out_dim", "unet_dim", "unet_dim_1", "unet_dim_2",
    "pool_heads",
}  # fmt: skip
INPUTS = ("image", "gumbel_noise")


def _pool_heads(golden) -> list[int]:
    """Heads of the pooling, as the case says; else all that it may have: the decoder's own, the published 16, or any that divide."""
    decoder = golden.spec["config"]["decoder"]
    if decoder["kind"] == "lowres":
        return [16]
    if "pool_heads" in decoder:
        return [decoder["pool_heads"]]
    return [heads for heads in dict.fromkeys((decoder["num_heads"], 16, *range(1, 65))) if decoder["out_dim"] % heads == 0]


def _build(golden, pool_heads: int):
    config = golden.spec["config"]
    vit, decoder = config["vit"], config["decoder"]
    return from_official(
        golden.folder / "state.safetensors",
        image_size=(vit["img_size"],) * 2 if isinstance(vit["img_size"], int) else tuple(vit["img_size"]),
        vision_heads=vit["width"] // vit["head_width"],
        vision_norm_eps=vit["layernorm_eps"],
        merger_heads=config["merger_heads"],
        merger_norm_eps=config["merger_layernorm_eps"],
        decoder_heads=decoder["num_heads"],
        decoder_norm_eps=decoder["layernorm_eps"],
        pool_heads=pool_heads,
        **{name: config[name] for name in ("image_start_id", "image_end_id", "code_id_offset") if name in config},
    )


@pytest.fixture(scope="module")
def model(golden):
    return _build(golden, _pool_heads(golden)[0])


@pytest.fixture(scope="module")
def patches(model, golden):
    with torch.no_grad():
        return model.vision(golden.io["image"])[:, 1:]


def _check(golden, results, names):
    for name in names:
        assert name in results, f"{golden.folder}: {name} is not understood by this test"
        golden.compare(name, results[name])


def _noise(golden, path):
    return golden.io["gumbel_noise"] if path == "sampled" else None


def test_every_tensor_and_field_of_the_case_is_understood(golden):
    config = golden.spec["config"]
    assert set(config) <= KNOWN_CONFIG and set(config["decoder"]) <= KNOWN_DECODER
    assert config["decoder"]["kind"] in ("lowres", "highres")
    assert set(golden.spec["tensors"]) == set(golden.io)
    ours = r"(argmax|sampled)_(keep|token_num|merged|indices|quantised|llm_ids_image\d+|llm_features|condition|pooled)"
    known = re.compile(ours + r"|image|gumbel_noise|vit_features|selector_logprob|merged_all_kept|merged_first_only")
    assert not [name for name in golden.io if not known.fullmatch(name)]


def test_the_converted_config_says_what_the_case_says(model, golden):
    config, settings = golden.spec["config"], model.settings
    vit, decoder = config["vit"], config["decoder"]
    sizes = (decoder["unet_dim"],) if decoder["kind"] == "lowres" else (decoder["unet_dim_1"], decoder["unet_dim_2"])
    assert (settings.vision_width, settings.vision_depth, settings.patch_size) == (vit["width"], vit["depth"], vit["patch_size"])
    assert settings.vision_hidden == int(vit["width"] * vit["mlp_ratio"])
    assert (settings.merger_depth, settings.merger_hidden) == (config["merger_layers"], int(vit["width"] * config["merger_mlp_ratio"]))
    assert (model.codebook_size, model.code_dim, settings.llm_width) == (config["n_code"], config["code_dim"], config["llm_dim"])
    assert (settings.decoder_width, settings.decoder_depth) == (decoder["embed_dim"], decoder["depth"])
    assert settings.decoder_hidden == int(decoder["embed_dim"] * decoder["mlp_ratio"])
    assert (settings.feature_width, settings.condition_sizes) == (decoder["out_dim"], sizes)


def test_the_official_checkpoint_is_written_back_bit_equal(model, golden, tmp_path):
    to_official(model, tmp_path)
    kind = golden.spec["config"]["decoder"]["kind"]
    written, original = read_official(tmp_path, condition=kind), read_official(golden.folder / "state.safetensors")
    unused = {key for key in original if re.match(r"tokenizer_encoder\.encoder\.(norm|head)\.", key)}
    assert written.keys() == original.keys() - unused
    assert all(torch.equal(written[key], original[key]) for key in written)
    assert official_state(model.settings, model.state_dict()).keys() == written.keys()


def test_patch_features_and_selection(model, golden, patches):
    with torch.no_grad():
        results = {"vit_features": model.vision(golden.io["image"]), "selector_logprob": model.selector(patches)}
    _check(golden, results, ("vit_features", "selector_logprob"))


def test_colours_reach_the_vision_transformer_normalised_as_clip_does(model, golden):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.settings.image_mean, model.settings.image_std))
    images = ((golden.io["image"] * std + mean) * 2 - 1).float()
    with torch.no_grad():
        golden.compare("vit_features", model.patches(images), golden.io["vit_features"][:, 1:])


@pytest.mark.parametrize("path", ["argmax", "sampled"])
def test_tokens(model, golden, patches, path):
    with torch.no_grad():
        keep = model.select(model.selector(patches), noise=_noise(golden, path))
        merged = model.merger(patches, keep.float())
        compact, counts = model.merger.kept(patches, keep)
        ids = model.quantizer.nearest(model.code_vectors(merged))[keep]
        results = {
            f"{path}_keep": keep.float(),
            f"{path}_token_num": counts,
            f"{path}_merged": merged,
            f"{path}_indices": ids,
            f"{path}_quantised": model.embed(ids),
            f"{path}_llm_features": model.to_llm(merged[keep]),
        }
        rows, _ = kept_rows(keep)
    tokens = _tokens(model, golden, path)
    results.update({f"{path}_llm_ids_image{i}": row for i, row in enumerate(model.llm_ids(tokens, frame=True))})
    given = [name for name in golden.io if name.startswith(f"{path}_") and not name.endswith(("_condition", "_pooled"))]
    _check(golden, results, given)
    valid = torch.arange(rows.shape[1]) < counts[:, None]
    expected = golden.io[f"{path}_merged"].gather(1, rows[..., None].expand(-1, -1, merged.shape[-1]))
    golden.compare(f"{path}_merged", compact[valid], expected[valid])
    golden.compare(f"{path}_indices", model.quantizer.nearest(model.code_vectors(compact))[valid])


def _tokens(model, golden, path) -> VisualTokens:
    counts = golden.io[f"{path}_token_num"]
    ids = torch.zeros(len(counts), model.max_tokens, dtype=torch.int64)
    ids[torch.arange(model.max_tokens) < counts[:, None]] = golden.io[f"{path}_indices"]
    return VisualTokens.from_ids(ids, model.layout, counts)


def test_encoding_an_image_gives_the_reference_tokens(model, golden):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.settings.image_mean, model.settings.image_std))
    tokens = model.encode(((golden.io["image"] * std + mean) * 2 - 1).float())
    expected = _tokens(model, golden, "argmax")
    kept_something = golden.io["argmax_token_num"] > 0  # of an image that keeps nothing, ours keeps one patch
    assert torch.equal(tokens.counts[kept_something], expected.counts[kept_something])
    assert torch.equal(tokens.ids[kept_something], expected.ids[kept_something])


def test_merging_when_everything_or_one_patch_is_kept(model, golden, patches):
    everything = torch.ones(patches.shape[:2])
    first = torch.zeros(patches.shape[:2])
    first[:, 0] = 1
    with torch.no_grad():
        results = {"merged_all_kept": model.merger(patches, everything), "merged_first_only": model.merger(patches, first)}
    _check(golden, results, [name for name in golden.io if name.startswith("merged_")])


def test_conditioning_of_the_diffusion_decoder(golden):
    problems = []
    for heads in _pool_heads(golden):
        model, results = _build(golden, heads), {}
        for path in ("argmax", "sampled"):
            tokens = _tokens(model, golden, path)
            codes = model.embed(tokens.ids.clamp(min=0)[:, : max(1, int(tokens.counts.max()))])
            with torch.no_grad():
                results[f"{path}_condition"], results[f"{path}_pooled"] = model.conditioning(model.decoder(codes, tokens.counts))
        try:
            _check(golden, results, [name for name in golden.io if name.endswith(("_condition", "_pooled"))])
            return
        except AssertionError as error:
            problems.append(f"{heads} pool heads: {error}")
    raise AssertionError("; ".join(problems))
