"""Pruning inside the language model: every family and method, held against hiding the dropped tokens as keys in the unpruned model."""

import pytest
import torch

pytest.importorskip("transformers")

from vlm_toys import FAMILIES, IMAGE, SPECIAL, build, full_matrix

import vistok
from vistok.pruning.families import attention_of, text_model
from vistok.pruning.selectors import selectors
from vistok.pruning.stages import INSIDE_ONLY, StageChoice, Stages, StageView, create_stages, layer_methods
from vistok.pruning.tap import AttentionCall
from vistok.testing import assert_matches_mask_oracle, mask_oracle_logits

GENERATION = {
    "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": SPECIAL,
}  # fmt: skip
SECOND_TURN = torch.tensor([[9, 17, 33, 21], [40, 41, 42, 43]])
INSIDE = [name for name in FAMILIES if name not in ("qwen3_5", "lfm2_vl")]
ONE = {"method": "fastv", "layer": 2, "keep_ratio": 0.5}
THREE = {"method": "pyramiddrop", "layers": (1, 2, 3), "keep_ratios": (0.75, 0.5, 0.25)}


@pytest.mark.parametrize("name", full_matrix(INSIDE))
@pytest.mark.parametrize("stages", [ONE, THREE], ids=["one_stage", "three_stages"])
def test_pruning_equals_hiding_the_dropped_tokens_over_two_turns(name, stages):
    model, inputs = build(name)
    report = assert_matches_mask_oracle(model, inputs, **stages, second_turn=SECOND_TURN, suppress_tokens=SPECIAL, num_new_tokens=2)
    assert report.distance_from_unpruned > 1e-2  # the comparison has power
    assert len(report.num_dropped) == (1 if stages is ONE else 3)


@pytest.mark.parametrize("name", full_matrix(INSIDE))
def test_keeping_every_visual_token_gives_bit_identical_logits(name):
    model, inputs = build(name)
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, "fastv", keep_ratio=1.0) as pruned:
        result = model.generate(**inputs, **GENERATION)
    assert torch.equal(result.sequences, plain.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(plain.logits))
    assert pruned.stats().cache_ratio == 1


@pytest.mark.parametrize("method", [name for name, method in layer_methods().items() if not method.merges])
def test_every_method_that_drops_matches_the_oracle(method):
    model, inputs = build("llava")
    stages = {"layers": (1, 3), "keep_ratios": (0.6, 0.2)}
    assert_matches_mask_oracle(model, inputs, method, **stages, suppress_tokens=SPECIAL)


@pytest.mark.parametrize("options", [ONE, THREE], ids=["one_stage", "three_stages"])
def test_a_window_shorter_than_the_prompt_is_measured_in_the_conversation_not_in_what_is_left(options):
    model, inputs = build("gemma3", sliding_window=16)
    assert_matches_mask_oracle(model, inputs, **options, second_turn=SECOND_TURN, suppress_tokens=SPECIAL)


def test_eager_attention_gives_the_same_logits_as_sdpa():
    results = []
    for attention in ("sdpa", "eager"):
        model, inputs = build("qwen2_5_vl", attention=attention)
        with vistok.prune(model, **THREE):
            results.append(torch.stack(model.generate(**inputs, **GENERATION).logits))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [ONE, THREE, {"method": "divprune", "keep_ratio": 0.5}], ids=["one_stage", "three_stages", "before"])
def test_capped_logits_and_alternating_windows_match_the_oracle(options):
    model, inputs = build("paligemma", attention="eager", is_second=True)
    assert_matches_mask_oracle(model, inputs, **options, second_turn=SECOND_TURN, suppress_tokens=SPECIAL)


def flash_on_a_cpu(module, query, key, value, attention_mask, scaling=None, position_ids=None, **options):
    """FlashAttention's contract: masks of padding only, causal from the bottom right, gaps in the positions begin a new sequence."""
    assert attention_mask is None or attention_mask.ndim == 2
    if position_ids is not None and query.shape[0] == 1 and query.shape[2] > 1:
        assert bool((position_ids.diff() == 1).all())
    Q, K = query.shape[2], key.shape[2]
    allowed = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, -K:].bool() | torch.eye(Q, dtype=torch.bool)[None, None].new_zeros(Q, K)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = (query @ key.transpose(-2, -1) * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.fixture
def flash():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register("flash_on_a_cpu", flash_on_a_cpu)
    AttentionMaskInterface.register("flash_on_a_cpu", flash_attention_mask)
    yield "flash_on_a_cpu"
    AttentionInterface._global_mapping.pop("flash_on_a_cpu")
    AttentionMaskInterface._global_mapping.pop("flash_on_a_cpu")


@pytest.mark.parametrize("options", [ONE, THREE, {"method": "divprune", "keep_ratio": 0.5}], ids=["one_stage", "three_stages", "before"])
def test_flash_attention_gets_masks_it_understands_and_no_gaps(flash, options):
    for rows in (1, 2):
        results = []
        for attention in ("sdpa", flash):
            model, inputs = build("llava")
            model.model.language_model.config._attn_implementation_internal = attention  # the setter asks the hub for a kernel
            if rows == 1:
                inputs = {name: value[:1] for name, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:2]}
            with vistok.prune(model, **options):
                results.append(torch.stack(model.generate(**inputs, **GENERATION).logits))
        torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_beams_lose_the_same_tokens_and_find_the_same_text_when_none_is_lost(name):
    model, inputs = build(name)
    beams = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "suppress_tokens": SPECIAL}
    plain = model.generate(**inputs, **beams)
    with vistok.prune(model, "fastv", keep_ratio=1.0):
        assert torch.equal(model.generate(**inputs, **beams), plain)
    for method in ("fastv", "random"):
        with vistok.prune(model, method, layer=2, keep_ratio=0.5) as pruned:
            model.generate(**inputs, **beams)
            gone = pruned.drops()[0][1].unflatten(0, (2, 3))
        assert bool((gone == gone[:, :1]).all()) and bool(gone.any())


def test_a_row_of_a_batch_is_what_it_is_alone():
    model, inputs = build("llava")
    alone = {name: inputs[name][1:, 20:] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][2:]}
    assert alone["attention_mask"].all()
    with vistok.prune(model, **THREE):
        both, one = (torch.stack(model.generate(**x, **GENERATION).logits) for x in (inputs, alone))
    torch.testing.assert_close(both[:, 1:], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_steps_on_the_short_caches_equal_runs_without_a_cache(positions):
    model, inputs = build("llava")
    with vistok.prune(model, "uniform", layers=(1, 3), keep_ratios=(0.5, 0.25), positions=positions):
        cached, uncached = (torch.stack(model.generate(**inputs, **GENERATION, use_cache=use).logits) for use in (True, False))
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)


def test_a_cache_that_the_model_makes_in_a_plain_forward_is_known_too():
    model, inputs = build("llava")
    token = torch.tensor([[40], [41]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    position = inputs["attention_mask"].sum(dim=1, keepdim=True)
    places = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with vistok.prune(model, **THREE) as pruned, torch.no_grad():
        cache = model(**inputs, position_ids=places, use_cache=True).past_key_values
        step = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        drops = pruned.drops()
    torch.testing.assert_close(step[:, 0], mask_oracle_logits(model, inputs, drops, token)[:, 1], atol=2e-4, rtol=2e-4)


def test_compact_positions_change_nothing_when_all_is_kept_and_something_when_not():
    model, inputs = build("llava")
    runs = []
    for positions in ("keep", "compact"):
        with vistok.prune(model, "uniform", layer=1, keep_ratio=0.5, positions=positions):
            runs.append(torch.stack(model.generate(**inputs, **GENERATION).logits))
    assert (runs[0] - runs[1]).abs().max() > 1e-2
    with vistok.prune(model, "uniform", layer=1, keep_ratio=1.0, positions="compact"):
        result = model.generate(**inputs, **GENERATION)
    assert torch.equal(torch.stack(result.logits), torch.stack(model.generate(**inputs, **GENERATION).logits))
    model, _ = build("qwen2_vl")
    with pytest.raises(ValueError, match="in a line"):
        vistok.prune(model, "fastv", keep_ratio=0.5, positions="compact")


def test_a_later_turn_may_bring_new_images():
    model, inputs = build("llava")
    first = {name: inputs[name][1:, 20:] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][2:]}
    question = torch.tensor([[7, 148, *[IMAGE] * 16, 149, 9]])
    with vistok.prune(model, **ONE) as pruned:
        result = model.generate(**first, **GENERATION)
        (layer, gone), answer = pruned.drops()[0], result.sequences
        ids = torch.cat([answer, question], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][:1]}
        result = model.generate(**turn, past_key_values=result.past_key_values, **GENERATION)
        later = pruned.drops()[0][1]
    gone = torch.cat([gone, gone.new_zeros(1, ids.shape[1] - gone.shape[1])], dim=1)
    gone[:, -later.shape[1] :] |= later
    assert int(gone.sum()) == 16
    whole = {**turn, "pixel_values": inputs["pixel_values"][[2, 0]]}
    expected = mask_oracle_logits(model, whole, [(layer, gone)], result.sequences[:, ids.shape[1] : -1])
    torch.testing.assert_close(torch.stack(result.logits, dim=1), expected, atol=2e-4, rtol=2e-4)


def test_speculative_steps_that_take_tokens_back_give_the_same_text():
    model, inputs = build("llava")
    single = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")} | {"pixel_values": inputs["pixel_values"][:2]}
    greedy = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": SPECIAL}
    with vistok.prune(model, **ONE):
        plain = model.generate(**single, **greedy)
        assert torch.equal(model.generate(**single, **greedy, prompt_lookup_num_tokens=3), plain)


def test_a_training_forward_keeps_the_length_of_its_labels_and_has_gradients():
    model, inputs = build("llava")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with vistok.prune(model, **THREE):
        output = model(**inputs, labels=labels)
        output.loss.backward()
    assert output.logits.shape[1] == labels.shape[1] and torch.isfinite(output.loss)
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)


def test_before_and_inside_may_be_active_together():
    model, inputs = build("llava")
    with vistok.prune(model, "vscan", keep_ratio=0.5) as before, vistok.prune(model, "vscan_llm", keep_ratio=0.5) as inside:
        result = model.generate(**inputs, **GENERATION)
    assert before.stats().num_kept == (8, 8, 8)
    assert inside.stats().num_visual == (16, 8) and inside.stats().num_kept == ((8, 4),)
    lengths = [layer.keys.shape[-2] for layer in result.past_key_values.layers]
    assert lengths == [n + 3 for n in inside.stats().tokens_per_layer] and lengths[2] == lengths[0] - 8


def test_the_score_is_the_last_row_of_the_eager_attention():
    scores = []
    model, inputs = build("qwen2_vl", attention="eager")

    def look(view: StageView, counts: list[int]) -> StageChoice:
        scores.append(view.score_of_last())
        return StageChoice(view.is_visual)

    method = vistok.pruning.LayerMethod(look, reads="before")
    seen = {}
    with torch.no_grad():
        hook = attention_of(text_model(model).layers[1]).register_forward_hook(lambda module, args, output: seen.update(weights=output[1]))
        model(**inputs)
        hook.remove()
        handle = vistok.pruning.prune_layers(model, method, layer=2, keep_ratio=0.5)
        with handle, pytest.raises(RuntimeError, match="asked for"):
            model(**inputs)
    torch.testing.assert_close(scores[0], seen["weights"][:, :, -1].mean(dim=1), atol=1e-5, rtol=1e-5)


def test_the_reader_of_the_next_layer_sees_what_that_layer_would_do():
    model, inputs = build("llava", attention="eager")
    seen = {}
    with torch.no_grad():
        hook = attention_of(text_model(model).layers[2]).register_forward_hook(lambda module, args, output: seen.update(weights=output[1]))
        model(**inputs)
        hook.remove()
    score = seen["weights"][:, :, -1].mean(dim=1)
    is_visual = inputs["input_ids"] == IMAGE
    with vistok.prune(model, "pyramiddrop", layers=(2,), keep_ratios=(0.25,)) as pruned, torch.no_grad():
        model(**inputs)
    gone = pruned.drops()[0][1]
    for row in range(2):
        kept = is_visual[row] & ~gone[row]
        assert score[row, kept].min() > score[row, gone[row]].max()


def test_sparsevlm_recycles_dropped_tokens_into_means_at_their_centres():
    torch.manual_seed(0)
    hidden = torch.randn(1, 46, 8)
    is_visual = torch.zeros(1, 46, dtype=torch.bool)
    is_visual[:, 2:42] = True
    call = AttentionCall(None, torch.randn(1, 2, 46, 4), torch.randn(1, 2, 46, 4), torch.randn(1, 2, 46, 4), None, 0.5, {})
    view = StageView(2, hidden, is_visual, ~is_visual, hidden, None, call)
    choice = layer_methods()["sparsevlm"].choose(view, [10])
    assert int((choice.stays & is_visual).sum()) == 10
    changed = (choice.hidden != hidden).any(dim=-1)
    assert int(changed.sum()) == 2 and bool((choice.stays | ~changed).all())  # 10 of 30 dropped tokens in 2 clusters
    model, inputs = build("llava")
    with vistok.prune(model, "sparsevlm", layers=(1, 2), keep_ratios=(0.5, 0.25)) as pruned:
        model.generate(**inputs, **GENERATION)
        assert pruned.stats().num_kept == ((16, 8), (8, 4))
        with pytest.raises(ValueError, match="merges"):
            pruned.drops()


def test_stages_default_to_the_papers_scaled_to_the_depth():
    assert create_stages("fastv", 32, keep_ratio=0.5).at == (2,)
    assert create_stages("pyramiddrop", 32).at == (8, 16, 24)
    assert [create_stages("pyramiddrop", 32).count(stage, 577) for stage in range(3)] == [288, 144, 72]
    assert create_stages("sparsevlm", 32).at == (3, 7, 16)
    assert [create_stages("sparsevlm", 24).count(stage, 576) for stage in range(3)] == [300, 200, 110]
    assert create_stages("sparsevlm", 24).at == (2, 5, 12)
    assert create_stages("vscan_llm", 28, keep=30).at == (14,)
    with pytest.raises(ValueError, match="needs layer"):
        create_stages("random", 32, keep_ratio=0.5)
    with pytest.raises(ValueError, match="do not fit"):
        create_stages("sparsevlm", 3)
    with pytest.raises(ValueError, match="must rise"):
        Stages(layers=(3, 2), keep_ratios=(0.5, 0.2))
    with pytest.raises(ValueError, match="give layer"):
        Stages(keep_ratio=0.5)


def test_the_model_is_as_it_was_after_an_exception():
    model, inputs = build("qwen3_vl")
    with pytest.raises(KeyError), vistok.prune(model, **THREE):
        model.generate(**inputs, **GENERATION)
        raise KeyError
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "_vistok_tap" not in module.__dict__ and "_deepstack_process" not in module.__dict__
    vistok.prune(model, **ONE).remove()


def test_what_cannot_be_exact_is_refused_with_the_reason():
    for name, reason in (("qwen3_5", "linear-attention"), ("lfm2_vl", "convolution")):
        model, _ = build(name)
        with pytest.raises(ValueError, match=reason):
            vistok.prune(model, "fastv", keep_ratio=0.5)
    model, _ = build("gemma4", num_kv_shared_layers=2)
    with pytest.raises(ValueError, match="keys of early ones"):
        vistok.prune(model, "fastv", keep_ratio=0.5)
    model, inputs = build("llava")
    with pytest.raises(ValueError, match="before layer 0 is before"):
        vistok.prune(model, "fastv", layer=0, keep_ratio=0.5)
    with vistok.prune(model, **ONE):
        with pytest.raises(ValueError, match="already pruned"):
            vistok.prune(model, **ONE)
        with pytest.raises(ValueError, match="static cache"):
            model.generate(**inputs, **GENERATION, cache_implementation="static")
        with pytest.raises(ValueError, match="prefill_chunk_size=8"):
            model.generate(**inputs, **GENERATION, prefill_chunk_size=8)
        in_picture = int((inputs["input_ids"][0] == IMAGE).nonzero()[0, 0]) + 1
        with pytest.raises(ValueError, match="ends inside a picture"):
            model(**{name: inputs[name][:1, :in_picture] for name in ("input_ids", "attention_mask")})
    plain = model.generate(**inputs, **GENERATION)
    with vistok.prune(model, **ONE), pytest.raises(ValueError, match="not made by the pruned"):
        model.generate(input_ids=plain.sequences, past_key_values=plain.past_key_values, **GENERATION)
    with vistok.prune(model, **ONE):
        cache = model.generate(**inputs, **GENERATION).past_key_values
    with vistok.prune(model, **THREE), pytest.raises(ValueError, match="made with stages before"):
        model.generate(input_ids=plain.sequences, past_key_values=cache, **GENERATION)
    with vistok.prune(model, **ONE):
        cache.crop(-20)
        with pytest.raises(ValueError, match="cannot be undone"):
            model.generate(input_ids=plain.sequences, past_key_values=cache, **GENERATION)


def test_a_conversation_may_begin_without_images():
    model, inputs = build("llava")
    first = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    question = torch.tensor([[148, *[IMAGE] * 16, 149, 9]])
    with vistok.prune(model, **ONE) as pruned:
        result = model.generate(**first, **GENERATION)
        ids = torch.cat([result.sequences, question], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][:1]}
        result = model.generate(**turn, past_key_values=result.past_key_values, **GENERATION)
        layer, later = pruned.drops()[0]
    gone = torch.cat([later.new_zeros(1, ids.shape[1] - later.shape[1]), later], dim=1)
    expected = mask_oracle_logits(model, turn, [(layer, gone)], result.sequences[:, ids.shape[1] : -1])
    torch.testing.assert_close(torch.stack(result.logits, dim=1), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*(name for name in selectors() if name != "evs"), *INSIDE_ONLY])
def test_every_method_runs_in_bfloat16(method):
    model, inputs = build("llava")
    model = model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    options = {"keep_ratios": (0.5, 0.25, 0.2)} if method in ("pyramiddrop", "sparsevlm", "sparsevlm+") else {"keep_ratio": 0.5}
    options |= {"layers": (1, 2, 3)} if "keep_ratios" in options else {}
    with vistok.prune(model, method, **options):
        result = model.generate(**inputs, **GENERATION)
    assert result.logits[0].isfinite().all()
