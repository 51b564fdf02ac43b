import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate, guidance_until
from vistok.generators import GPT
from vistok.generators.condition import fnv1a, hash_captions, split_words
from vistok.layers.rope import rope_table, rotate

KINDS = {
    "grid": dict(layout_shape=(4, 4)),
    "sequence": dict(layout_kind="sequence", layout_shape=(12,)),
    "llamagen": dict(layout_shape=(4, 4), condition_attention="uniform"),
}
CAPTIONS = ["noto: red apple", "", "twemoji: grinning cat"]


def make(kind="grid", **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("gpt-tiny", **{**KINDS[kind], "num_classes": 3, "text": "hash", **overrides}).eval()


def three(model):
    return model.make_condition(3, labels=[0, 1, 2], captions=CAPTIONS)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cache_gives_the_same_logits(kind):
    model = make(kind)
    ids = torch.randint(200, (3, model.max_tokens - 1), generator=torch.Generator().manual_seed(0))
    expected = model(ids, three(model))
    cache = model.new_cache(3)
    parts = [model(ids[:, :2], three(model), cache=cache), model(ids[:, 2:7], cache=cache)]
    parts += [model(ids[:, n : n + 1], cache=cache) for n in range(7, ids.shape[1])]
    assert expected.shape == (3, model.max_tokens, 200)
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_rolled_back_tokens_leave_no_trace():
    model = make()
    ids = torch.arange(12).view(1, 12)
    condition = three(model)[:1]
    cache = model.new_cache(1)
    model(ids[:, :4], condition, cache=cache)
    length = cache.length
    model(ids[:, 7:10], cache=cache)
    cache.rollback(length)
    assert torch.allclose(model(ids[:, 4:5], cache=cache)[:, 0], model(ids[:, :5], condition)[:, -1], atol=1e-5)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.rollback(cache.length + 1)


def test_a_full_cache_says_so():
    model = make()
    cache = model.new_cache(1, 2)
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(1, 3, dtype=torch.int64), three(model)[:1], cache=cache)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    model = make()
    ids = torch.randint(200, (3, 15), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 9:] = 0
    difference = (model(ids, three(model)) - model(changed, three(model))).abs().amax((0, 2))
    assert difference[:10].max() == 0
    assert difference[10:].min() > 0


def test_rotary_products_depend_on_distance_only_and_zero_rows_score_zero():
    cells = torch.tensor([[0, 0], [1, 2], [3, 1], [4, 3], [7, 4]])
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    table = rope_table(cells, 16)
    turned_q, turned_k = rotate(q.expand(1, 1, 5, 16), table)[0, 0], rotate(k.expand(1, 1, 5, 16), table)[0, 0]
    scores = turned_q @ turned_k.T
    assert torch.allclose(scores[0, 1], scores[2, 3], atol=1e-5)  # both one row and two columns apart
    assert rotate(q, torch.zeros(1, 8, 2)).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    model = make(kind)
    sampling = SamplingConfig(top_k=50, temperature=0.9)
    tokens, stats = generate(model, three(model), generators=rng.image_generators(5, 3), sampling=sampling, guidance_scale=2.0)
    assert stats.target_passes == model.max_tokens and stats.num_tokens == 3 * model.max_tokens
    for i in range(3):
        alone, _ = generate(model, three(model)[i : i + 1], generators=rng.image_generators(5, [i]), sampling=sampling, guidance_scale=2.0)
        assert torch.equal(alone.ids[0], tokens.ids[i])


def test_fewer_tokens_are_a_prefix_of_more():
    model = make("sequence")
    more, _ = generate(model, three(model), generators=rng.image_generators(0, 3))
    fewer, _ = generate(model, three(model), generators=rng.image_generators(0, 3), num_tokens=5)
    assert torch.equal(fewer.ids, more.truncate(5).ids)
    with pytest.raises(ValueError, match="1 to 12 tokens"):
        generate(model, three(model), generators=rng.image_generators(0, 3), num_tokens=13)


@pytest.mark.parametrize("guidance", [1.0, 2.0, guidance_until(2.0, 4)])
def test_a_run_goes_on_from_a_saved_prefix_as_if_unbroken(guidance):
    model, steps = make(), []
    options = dict(guidance_scale=guidance, sampling=SamplingConfig(top_k=50))
    whole, _ = generate(model, three(model), generators=rng.image_generators(0, 3), **options)
    for known in (0, 1, 7, 15):
        again, stats = generate(
            model,
            three(model),
            generators=rng.image_generators(0, 3),
            prefix=whole.ids[:, :known],
            on_step=lambda step, ids: steps.append((step, ids.shape[1])),
            **options,
        )
        assert torch.equal(again.ids, whole.ids)
        assert stats.target_passes == 16 - known and stats.num_tokens == 3 * (16 - known) and steps[0] == (known, known + 1)
        steps.clear()
    other, _ = generate(model, three(model), generators=rng.image_generators(0, 3), prefix=(whole.ids[:, :7] + 1) % 200, **options)
    assert torch.equal(other.ids[:, :7], (whole.ids[:, :7] + 1) % 200) and not torch.equal(other.ids[:, 7:], whole.ids[:, 7:])
    for wrong, message in [(whole.ids, "leaves none"), (whole.ids[:2, :3], "must hold ids"), (whole.ids[:, :3] + 200, "allowed: 0 to 199")]:
        with pytest.raises(ValueError, match=message):
            generate(model, three(model), generators=rng.image_generators(0, 3), prefix=wrong)


@torch.no_grad()
def test_guided_greedy_tokens_are_those_of_the_formula():
    model = make()
    condition, greedy = three(model), SamplingConfig(temperature=0)
    schedule = lambda n: 3.0 if n < 6 else 1.0  # noqa: E731
    made, _ = generate(model, condition, generators=rng.image_generators(0, 3), sampling=greedy, guidance_scale=schedule)
    ids = torch.empty(3, 0, dtype=torch.int64)
    for n in range(model.max_tokens):
        c, u = model(ids, condition)[:, -1], model(ids, condition.null())[:, -1]
        ids = torch.cat([ids, (u + schedule(n) * (c - u)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(made.ids, ids)


def test_guidance_of_one_is_plain_sampling_without_a_second_half():
    model = make()
    rows = []
    hook = model.embedding.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    plain, _ = generate(model, three(model), generators=rng.image_generators(0, 3))
    by_function, _ = generate(model, three(model), generators=rng.image_generators(0, 3), guidance_scale=lambda n: 1.0)
    hook.remove()
    assert set(rows) == {3}
    assert torch.equal(plain.ids, by_function.ids)


def test_captions_become_words_and_trigrams_that_never_change():
    assert fnv1a("foobar") == 0x85944171F73967E8  # from the FNV authors' test suite
    assert split_words("Noto: Red apple, \u2764!") == ["noto:", "red", "apple", "\u2764"]
    words = hash_captions(["red apple", ""], buckets=100, min_words=4)
    assert words.shape == (2, 4, 16)
    assert (words[0, :, 0] >= 0).tolist() == [True, True, False, False] and words[1].max() == -1
    assert words[0, 0].tolist()[:4] == [fnv1a(text) % 100 for text in ("word red", "tri <re", "tri red", "tri ed>")]


@torch.no_grad()
def test_every_part_of_the_condition_reaches_the_tokens():
    model = make()
    start = torch.empty(1, 0, dtype=torch.int64)

    def logits(**condition):
        return model(start, model.make_condition(1, **condition))

    assert not torch.allclose(logits(labels=[0]), logits(labels=[1]))
    assert not torch.allclose(logits(captions=["red apple"]), logits(captions=["green apple"]))
    assert torch.equal(logits(captions=["red apple"], labels=[-1]), logits(captions=["Red Apple"]))
    assert torch.equal(logits(captions=[""]), logits())
    dropped = model.make_condition(1, labels=[0], captions=["red apple"]).null()
    assert torch.equal(model(start, dropped), logits())
    long = " ".join(["word"] * 20)
    assert not torch.equal(logits(captions=[long + " cat"]), logits(captions=[long + " dog"]))  # beyond the slots, through the bag


def test_conditions_the_model_was_not_built_for_are_errors():
    with pytest.raises(ValueError, match="no classes"):
        make(num_classes=0).make_condition(1, labels=[0])
    with pytest.raises(ValueError, match="reads none"):
        make(text="none").make_condition(1, captions=["cat"])
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        make().make_condition(1, labels=[3])


def test_an_unconditional_model_generates_with_guidance():
    model = make(num_classes=0, text="none")
    tokens, _ = generate(model, model.make_condition(2), generators=rng.image_generators(0, 2), guidance_scale=2.0)
    assert tokens.ids.shape == (2, 16)


def test_a_saved_generator_is_the_same_generator(tmp_path):
    model = make(classes=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    assert isinstance(again, GPT) and again.settings == model.settings
    assert torch.equal(again(ids, three(again)), model(ids, three(model)))


def masked(**overrides):
    text = dict(text="some/t5", caption_tokens=6, caption_width=12, caption_padding="hidden", num_classes=0)
    return make("llamagen", **{**text, **overrides})


def caption_features(lengths):
    features = torch.randn(len(lengths), 6, 12, generator=torch.Generator().manual_seed(2))
    return features, torch.arange(6) < torch.tensor(lengths)[:, None]


@torch.no_grad()
def test_hidden_padding_is_seen_by_nothing_on_either_side():
    model, (features, mask) = masked(), caption_features([3, 6, 1])
    ids = torch.randint(200, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids, model.make_condition(3, features=(features, mask)))
    noisy = torch.where(mask[..., None], features, 1e3)
    assert torch.equal(model(ids, model.make_condition(3, features=(noisy, mask))), expected)
    left = (features.flip(1), mask.flip(1))  # the text is reversed, its padding on the left
    assert not torch.allclose(model(ids, model.make_condition(3, features=left))[1], expected[1])
    alone = model(ids[:1], model.make_condition(1, features=(features[:1], mask[:1])))
    assert torch.allclose(alone[0], expected[0], atol=1e-5)


@torch.no_grad()
def test_the_cache_remembers_what_is_hidden():
    model = masked(num_classes=3)
    condition = model.make_condition(3, labels=[0, 1, 2], features=caption_features([2, 6, 4]))
    ids = torch.randint(200, (3, 15), generator=torch.Generator().manual_seed(0))
    expected, cache = model(ids, condition), model.new_cache(3)
    parts = [model(ids[:, :2], condition, cache=cache), model(ids[:, 2:7], cache=cache)]
    cache.keep_rows(2)
    parts = [part[:2] for part in parts] + [model(ids[:2, n : n + 1], cache=cache) for n in range(7, 15)]
    assert (torch.cat(parts, 1) - expected[:2]).abs().max() < 1e-5


@torch.no_grad()
def test_the_null_caption_of_hidden_padding_keeps_the_mask_and_an_empty_caption_is_null():
    model = masked()
    condition = model.make_condition(2, features=caption_features([3, 0]))
    assert condition.absent.tolist() == [False, True] and condition.mask.sum(1).tolist() == [3, 6]
    null = condition.null()
    assert null.absent.all() and torch.equal(null.mask, condition.mask)
    assert condition.and_null().absent.tolist() == [False, True, True, True]
    start = torch.empty(1, 0, dtype=torch.int64)
    assert torch.equal(model(start, condition[1:]), model(start))
    with pytest.raises(ValueError, match="needs a text model"):
        make(caption_padding="hidden")


def test_given_uniforms_draw_what_the_same_generators_would():
    model = make()
    uniforms = rng.rand((16,), rng.image_generators(5, 3), dtype=torch.float64)
    drawn, _ = generate(model, three(model), generators=rng.image_generators(5, 3), guidance_scale=2.0)
    given, _ = generate(model, three(model), uniforms=uniforms, guidance_scale=2.0)
    assert torch.equal(drawn.ids, given.ids)
    for wrong in ({}, {"uniforms": uniforms, "generators": rng.image_generators(5, 3)}):
        with pytest.raises(ValueError, match="one of both"):
            generate(model, three(model), **wrong)
    with pytest.raises(ValueError, match="5 draws"):
        generate(model, three(model), uniforms=uniforms[:, :5])


def test_guidance_until_a_step_is_that_schedule():
    assert [guidance_until(3.0, 2)(n) for n in range(4)] == [3.0, 3.0, 1.0, 1.0]


def test_gpt_b_has_the_size_of_llamagen_b():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in vistok.create("gpt-b").parameters()) / 1e6) == 111


# training
