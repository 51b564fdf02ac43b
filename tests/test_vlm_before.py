"""Pruning before the language model: every method and family, held against masking the dropped tokens in the unpruned model."""

import pytest
import torch

pytest.importorskip("transformers")

import vlm_toys
from vlm_toys import FAMILIES, SPECIAL, build, build_video, full_matrix

import vistok
from vistok.pruning.families import FAMILIES as KNOWN
from vistok.pruning.families import vision_layers
from vistok.pruning.features import VisualFeatures
from vistok.pruning.selectors import selectors
from vistok.pruning.towers import TowerTap
from vistok.testing import assert_matches_mask_oracle

GENERATION = {
    "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": SPECIAL,
}  # fmt: skip
SECOND_TURN = torch.tensor([[9, 17, 33, 21], [40, 41, 42, 43]])
RECURRENT = ("qwen3_5", "lfm2_vl")
MAPPED = [name for name in FAMILIES if KNOWN[name].tower]
ON_IMAGES = [name for name in selectors() if name != "evs"]


@pytest.mark.parametrize("name", full_matrix([name for name in FAMILIES if name not in RECURRENT]))
def test_pruning_equals_masking_the_dropped_tokens_over_two_turns(name):
    model, inputs = build(name)
    report = assert_matches_mask_oracle(
        model, inputs, "divprune", keep_ratio=0.5, second_turn=SECOND_TURN, suppress_tokens=SPECIAL, num_new_tokens=2
    )
    assert report.distance_from_unpruned > 1e-2  # the comparison has power


@pytest.mark.parametrize("name", full_matrix(list(FAMILIES)))
def test_keeping_every_visual_token_gives_bit_identical_logits(name):
    model, inputs = build(name)
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "dart", keep_ratio=1.0):
        result = model.generate(**inputs, **GENERATION)
    assert torch.equal(result.sequences, plain.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("method", ON_IMAGES)
def test_every_method_shortens_the_prompt_and_gives_the_original_prompt_back(method):
    model, inputs = build("llava")
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, method, keep_ratio=0.5) as pruned:
        result = model.generate(**inputs, **GENERATION)
    report, length = pruned.stats(), inputs["input_ids"].shape[1]
    slack = 3 if method == "prumerge+" else 0  # its grid may meet the tokens that attention keeps
    assert all(8 <= kept <= 8 + slack for kept in report.num_kept)
    assert torch.equal(result.sequences[:, :length], inputs["input_ids"])
    assert result.past_key_values.get_seq_length() == report.pruned_length + 2 < length
    assert not torch.equal(result.logits[0], plain.logits[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, selector in selectors().items() if selector.layers or selector.reads_text])
@pytest.mark.parametrize("name", MAPPED)
def test_methods_that_read_the_tower_or_the_text_run_on_every_mapped_family(name, method):
    model, inputs = build(name)
    if method in ("hiprune", "vscan") and name == "llava_next":
        with vistok.prune(model, method, keep_ratio=0.5), pytest.raises(ValueError, match="no grid"):
            model.generate(**inputs, **GENERATION)
        return
    if selectors()[method].merges or name in RECURRENT:
        with vistok.prune(model, method, keep_ratio=0.5) as pruned:
            model.generate(**inputs, **GENERATION)
        assert sum(pruned.stats().num_kept) < sum(pruned.stats().num_visual)
    else:
        assert_matches_mask_oracle(model, inputs, method, keep_ratio=0.5, suppress_tokens=SPECIAL)


def test_an_adaptive_method_keeps_as_many_tokens_as_attention_has_outliers():
    model, inputs = build("llava")
    with vistok.prune(model, "prumerge") as pruned:
        model.generate(**inputs, **GENERATION)
    assert all(2 <= kept < 16 for kept in pruned.stats().num_kept)
    with pytest.raises(ValueError, match="either keep"):
        vistok.prune(model, "divprune")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava"])
def test_evs_keeps_the_first_frame_and_what_changed(name):
    model, inputs = build_video(name)
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "evs", keep_ratio=0.5):
        result = model.generate(**inputs, **GENERATION)
    # the second half repeats a frame, so nothing is lost but the tokens' weight in the attention: it must differ, and match the oracle
    assert not torch.equal(result.logits[0], plain.logits[0])
    report = assert_matches_mask_oracle(model, inputs, "evs", keep_ratio=0.5, suppress_tokens=SPECIAL)
    if name == "qwen2_5_vl":
        gone = (inputs["input_ids"] == vlm_toys.VIDEO).nonzero()[8:, 1]
        with vistok.prune(model, "evs", keep_ratio=0.5) as pruned:
            model.generate(**inputs, **GENERATION)
        assert torch.equal(pruned.drops()[0][1][0].nonzero()[:, 0], gone)
    assert report.num_dropped[0][1] > 0


def test_the_towers_view_is_the_attention_that_the_eager_tower_returns():
    model, inputs = build("llava")
    with TowerTap(model, [0, 1]) as tap, torch.no_grad():
        outputs = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]
    views = tap.views(VisualFeatures(model, outputs, inputs).num_patches, inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    for layer in (0, 1):
        torch.testing.assert_close(views.attention(layer, [2, 0]), attention[layer][[2, 0], :, 0, 1:].mean(dim=1))
        torch.testing.assert_close(views.received(layer, [1]), attention[layer][[1], :, :, 1:].mean(dim=(1, 2)))


@pytest.mark.parametrize("name", full_matrix([name for name in MAPPED if name not in ("qwen3_5", "qwen3_vl_moe")]))
def test_patches_are_mapped_to_the_features_they_become(name):
    """Changing the tower's last patch states changes the feature that the map names, and no other."""
    model, inputs = build(name)

    def features():
        with torch.no_grad():
            outputs = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]
        return VisualFeatures(model, outputs, inputs)

    with TowerTap(model, [0]) as tap:
        before = features()
    views = tap.views(before.num_patches, inputs)
    patch = int(views._index[1][3, -1])  # the last patch of the fourth feature of the second image

    def swapped(x, place):
        flat = x.flatten(0, -2).clone()
        flat[place] = flat[place].roll(1)  # not a shift of all channels, which a norm would take back
        return flat.view_as(x)

    if "llava" in name or name == "aya_vision":  # hidden states are collected beside the layers: change what the projector gets
        tokens = 16 + views.num_prefix if name != "aya_vision" else 64
        place = patch // tokens * (tokens - views.num_prefix) + patch % tokens - views.num_prefix
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: (swapped(args[0], place), *args[1:]))
    else:
        hook = vision_layers(model)[-1].register_forward_hook(lambda module, args, output: swapped(output, patch))
    after = features()
    hook.remove()
    changed = [(x - y).abs().amax(dim=-1) > 1e-4 for x, y in zip(before.features, after.features)]
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [[], [3], []]


def test_newlines_are_no_patches_and_always_stay():
    model, inputs = build("llava_next")
    with vistok.prune(model, "random", keep=1) as pruned:
        model.generate(**inputs, **GENERATION)
    # 16 patches of the overview and tiles of 16; a newline for each row of patches
    assert pruned.stats().num_visual == (72, 88, 52)
    assert pruned.stats().num_kept == (9, 9, 5)


def test_merging_happens_in_front_of_a_pointwise_projector():
    model, inputs = build("llava")
    seen = []
    with vistok.prune(model, "visionzip", keep=6):
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        model.generate(**inputs, **GENERATION)
        hook.remove()
    assert seen == [(3, 16, 16)] + [(1, 6, 16)] * 3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_come_back_with_the_original_prompt_and_match_the_unpruned_model_when_all_is_kept(name):
    model, inputs = build(name)
    beams = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "suppress_tokens": SPECIAL}
    plain = model.generate(**inputs, **beams)
    with vistok.prune(model, "random", keep_ratio=1.0):
        assert torch.equal(model.generate(**inputs, **beams), plain)
    with vistok.prune(model, "random", keep=3, seed=4):
        sequences = model.generate(**inputs, **beams)
        assert torch.equal(sequences, model.generate(**inputs, **beams))
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, dim=0))


def test_a_row_of_a_batch_is_what_it_is_alone():
    model, inputs = build("llava")
    alone = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][:2]}
    with vistok.prune(model, "cdpruner", keep_ratio=0.3):
        both, one = (torch.stack(model.generate(**x, **GENERATION).logits) for x in (inputs, alone))
    torch.testing.assert_close(both[:, :1], one, atol=1e-4, rtol=1e-4)


def test_static_and_eager_and_uncached_runs_give_the_same_logits():
    model, inputs = build("llava")
    single = {name: value[:1] for name, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:2]}
    with vistok.prune(model, "uniform", keep_ratio=0.5):
        runs = [model.generate(**single, **GENERATION, **more) for more in ({}, {"use_cache": False}, {"cache_implementation": "static"})]
    model.set_attn_implementation("eager")
    with vistok.prune(model, "uniform", keep_ratio=0.5):
        runs.append(model.generate(**single, **GENERATION))
    first, *others = [torch.stack(run.logits) for run in runs]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)


def test_compact_positions_count_anew():
    model, inputs = build("llava")
    with vistok.prune(model, "uniform", keep=4, positions="compact") as pruned:
        new, rows = pruned.rewrite(**inputs)
        model.generate(**inputs, **GENERATION)
    for position, row in zip(new["position_ids"], rows):
        assert position[row >= 0].tolist() == list(range(int((row >= 0).sum())))
    model, inputs = build("qwen2_vl")
    with vistok.prune(model, "uniform", keep=4, positions="compact"), pytest.raises(ValueError, match="rows and columns"):
        model.generate(**inputs, **GENERATION)


def test_the_model_is_as_it_was_after_an_exception():
    model, inputs = build("llava")
    with pytest.raises(KeyError), vistok.prune(model, "visionzip", keep=3):
        model.generate(**inputs, **GENERATION)
        raise KeyError
    assert "generate" not in model.__dict__ and not model._forward_pre_hooks and not model.model.language_model._forward_pre_hooks
    assert all("_vistok_tap" not in module.__dict__ for module in model.modules())
    first = vistok.prune(model, "uniform", keep=3)
    with pytest.raises(ValueError, match="already pruned"):
        vistok.prune(model, "uniform", keep=3)
    first.remove()


def test_what_would_silently_not_be_pruned_is_refused():
    model, inputs = build("llava")
    with vistok.prune(model, "uniform", keep=3) as pruned:
        with pytest.raises(RuntimeError, match="plain forward"):
            model(**inputs)
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(**inputs, max_length=60)
        with pytest.raises(RuntimeError, match="no generate"):
            pruned.stats()
        result = model.generate(**inputs, **GENERATION)
        more = {"input_ids": result.sequences, "past_key_values": result.past_key_values}
        with pytest.raises(ValueError, match="new conversation"):
            model.generate(**more, pixel_values=inputs["pixel_values"])
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "uniform", keep=3), pytest.raises(ValueError, match="not made by a pruned"):
        model.generate(input_ids=plain.sequences, past_key_values=plain.past_key_values)
    with pytest.raises(ValueError, match="there are divprune"):
        vistok.prune(model, "tome", keep=3)
    with pytest.raises(ValueError, match="either keep"):
        vistok.prune(model, "uniform")
    with vistok.prune(model, "evs", keep_ratio=0.5), pytest.raises(ValueError, match="for videos"):
        model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "visionzip", keep=3) as pruned:
        model.generate(**inputs, **GENERATION)
        with pytest.raises(ValueError, match="merges"):
            pruned.drops()


def test_what_cannot_be_exact_is_refused_with_the_reason():
    model, inputs = build("gemma3", sliding_window=16)
    with vistok.prune(model, "uniform", keep=3), pytest.raises(ValueError, match="sliding window of 16"):
        model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "uniform", keep=3, positions="compact"):
        model.generate(**inputs, **GENERATION)
    model, _ = build("mistral3")
    with pytest.raises(ValueError, match="not mapped"):
        vistok.prune(model, "visionzip", keep=3)


def test_an_unsupported_family_is_refused_with_the_ones_that_work():
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vlm_toys.TEXT))
    assert set(FAMILIES) == set(KNOWN)
    with pytest.raises(ValueError, match="llama is not supported.*llava"):
        vistok.prune(model, "divprune", keep=3)
