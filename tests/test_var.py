"""VAR: the multi-scale tokenizer, the next-scale transformer, and both in the loop and the pipeline."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.convert.var import from_official, official_state, to_official
from vistok.decoding import SamplingConfig, generate
from vistok.pipelines import TokenImagePipeline


def randomised(name, **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create(name, **overrides).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return randomised("var-vqvae-tiny")


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomised("var-tiny").read_codes_of(tokenizer)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(model.vocab_size, (3, model.max_tokens), generator=torch.Generator().manual_seed(2))


def condition(model, labels=(0, 3, -1)):
    return model.make_condition(len(labels), labels=list(labels))


# -- tokenizer --------------------------------------------------------------------------------------------------------------------------


def test_any_prefix_of_scales_decodes_to_a_full_picture_and_encodes_alone(tokenizer, images):
    tokens = tokenizer.encode(images)
    for end in (1, 5, 14, 30):
        part = tokens.truncate(end)
        assert torch.equal(tokenizer.encode(images, num_tokens=end).ids, part.ids)
        assert tokenizer.decode(part).shape == images.shape


def test_images_with_different_numbers_of_scales_decode_together(tokenizer, images):
    tokens = tokenizer.encode(images)
    counts = torch.tensor([5, 30, 1])
    together = tokenizer.decode(tokens.truncate(counts))
    for i, count in enumerate(counts.tolist()):
        torch.testing.assert_close(together[i], tokenizer.decode(tokens[i].truncate(count))[0], atol=1e-5, rtol=0)


def test_tokens_that_end_inside_a_scale_are_refused(tokenizer, images):
    with pytest.raises(ValueError, match="whole scales end at 1, 5, 14, 30"):
        tokenizer.encode(images, num_tokens=6)
    with pytest.raises(ValueError, match="whole scales end at"):
        tokenizer.decode(tokenizer.encode(images).truncate(4))
    with pytest.raises(ValueError, match="made for 32 x 32"):
        tokenizer.encode(torch.zeros(1, 3, 64, 64))


def test_each_scale_takes_the_codes_nearest_to_what_is_left(tokenizer, images):
    ids, ms = tokenizer.encode(images).ids, tokenizer.quantizer
    f = tokenizer.features(images)
    total = torch.zeros_like(f)
    for number, part in enumerate(ids.split(ms.sizes, dim=1)):
        rest = F.interpolate(f - total, size=ms.scales[number], mode="area").flatten(2).transpose(1, 2)
        assert torch.equal(torch.cdist(rest, ms.quantizer.codebook[None].expand(3, -1, -1)).argmin(-1), part)
        total = ms.totals(ids[:, : sum(ms.sizes[: number + 1])])[-1]


def test_cosine_lookup_keeps_the_length_of_the_codes(images):
    tokenizer = randomised("var-vqvae-tiny", metric="cosine", num_phis=1)
    codebook, ids = tokenizer.quantizer.quantizer.codebook, tokenizer.encode(images).ids
    assert torch.equal(tokenizer.embed(ids), codebook[ids])
    rest = tokenizer.features(images).mean((2, 3))
    assert torch.equal((F.normalize(rest, dim=-1) @ F.normalize(codebook, dim=-1).t()).argmax(-1), ids[:, 0])
    assert len(tokenizer.quantizer.refine.convs) == 1


def test_training_the_tokenizer_reaches_every_weight_and_counts_codes(images):
    tokenizer = vistok.create("var-vqvae-tiny").train()
    out = tokenizer(images)
    sum(out.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert tokenizer.usage.sum(1).tolist() == pytest.approx([0.01 * s for s in tokenizer.quantizer.sizes])


# -- generator --------------------------------------------------------------------------------------------------------------------------


def by_scale(model, ids, condition):
    cache, new, rows = model.new_cache(len(ids)), ids[:, :0], []
    for part in ids.split(model.sizes, dim=1):
        rows.append(model(new, condition, cache=cache))
        new, condition = part, None
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("options", [{}, dict(shared_modulation=True), dict(unit_attention=False)], ids=["plain", "shared", "products"])
def test_the_cache_gives_the_same_logits(tokenizer, ids, options):
    model = randomised("var-tiny", **options).read_codes_of(tokenizer)
    with torch.no_grad():
        whole = model(ids, condition(model))
        torch.testing.assert_close(by_scale(model, ids, condition(model)), whole, atol=1e-5, rtol=1e-5)
        cache = model.new_cache(3)
        first = model(ids[:, :5], condition(model), cache=cache)  # two scales known: three are predicted in one pass
        again = model(ids[:, 5:14], cache=cache)
        torch.testing.assert_close(torch.cat([first, again], 1), whole, atol=1e-5, rtol=1e-5)
        cache.rollback(5)
        torch.testing.assert_close(model(ids[:, 1:5], cache=cache), whole[:, 5:14], atol=1e-5, rtol=1e-5)


def test_a_scale_does_not_depend_on_its_own_or_finer_tokens(model, ids):
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % model.vocab_size
    with torch.no_grad():
        a, b = model(ids, condition(model)), model(changed, condition(model))
    torch.testing.assert_close(a[:, :14], b[:, :14])
    assert not torch.allclose(a[:, 14:], b[:, 14:])
    assert torch.equal(model(ids[:, :-1], condition(model)), model(ids, condition(model)))  # the last scale is nobody's input


def test_ids_that_do_not_fit_the_scales_are_refused(model, ids):
    cache = model.new_cache(3)
    model(ids[:, :0], condition(model), cache=cache)
    for wrong in (ids[:, :0], ids[:, :3], torch.cat([ids, ids], 1)):
        with pytest.raises(ValueError, match="scales end at 1, 5, 14, 30"):
            model(wrong, cache=cache)
    with pytest.raises(ValueError, match="scales end at"):
        cache.rollback(3)
    with pytest.raises(ValueError, match="whole scales end at"):
        generate(model, condition(model), generators=vistok.image_generators(0, 3), num_tokens=6)


def test_a_shared_modulation_with_offsets_equals_a_layer_a_block():
    shared = randomised("var-tiny", shared_modulation=True)
    each = randomised("var-tiny")
    state = {k: v for k, v in shared.state_dict().items() if "offsets" not in k and "shared_modulation" not in k}
    for i, block in enumerate(shared.blocks):
        state[f"blocks.{i}.modulation.weight"] = shared.shared_modulation.weight
        state[f"blocks.{i}.modulation.bias"] = shared.shared_modulation.bias + block.offsets.flatten()
    each.load_state_dict(state)
    ids = torch.zeros(3, 30, dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(each(ids, condition(each)), shared(ids, condition(shared)))


def test_attention_without_unit_lengths_scales_by_a_quarter():
    attention = randomised("var-tiny", unit_attention=False).blocks[0].attention
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, v = (part.unflatten(2, (4, 16)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
        q, v = q + attention.q_bias.view(4, 1, 16), v + attention.v_bias.view(4, 1, 16)
        mixed = (q @ k.transpose(2, 3) * 0.25 / 4).softmax(-1) @ v
        torch.testing.assert_close(attention(x, mask=None, cache=None), attention.proj(mixed.transpose(1, 2).flatten(2)))


def test_guidance_rises_from_none_at_the_first_scale_to_what_was_asked(model):
    schedule = model.guidance_schedule(2.5)
    assert [schedule(k) for k in range(4)] == [1.0, 1.5, 2.0, 2.5]


def test_generation_is_the_same_alone_and_in_a_batch_and_a_prefix_is_a_prefix(model):
    options = dict(guidance_scale=2.5, sampling=SamplingConfig(top_k=50, top_p=0.9))
    steps = []
    together, stats = generate(
        model, condition(model), generators=vistok.image_generators(7, 3), on_step=lambda step, ids: steps.append(ids.shape[1]), **options
    )
    assert steps == [1, 5, 14, 30] and stats.target_passes == 4 and stats.num_tokens == 90
    for i in range(3):
        alone, _ = generate(model, condition(model)[i : i + 1], generators=vistok.image_generators(7, [i]), **options)
        assert torch.equal(alone.ids[0], together.ids[i])
    prefix, _ = generate(model, condition(model), generators=vistok.image_generators(7, 3), num_tokens=14, **options)
    assert torch.equal(prefix.ids, together.ids[:, :14])


def test_training_reaches_every_weight_but_the_codes(ids):
    model = vistok.create("var-tiny", shared_modulation=True)
    keep = torch.ones(2, 2, 3, 1, 64)
    logits = model(ids[:, :-1], condition(model), keep=keep)
    torch.testing.assert_close(logits, model(ids, condition(model)))
    F.cross_entropy(logits.transpose(1, 2), ids).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("quantizer."), name


def test_half_precision_generates(tokenizer):
    model = randomised("var-tiny").read_codes_of(tokenizer).to(torch.bfloat16)
    tokens, _ = generate(model, condition(model), generators=vistok.image_generators(0, 3), guidance_scale=2.0)
    assert model.new_cache(1).keys.dtype == torch.bfloat16 and tokens.ids.min() >= 0


def test_a_generator_takes_only_the_codes_it_was_built_for(model):
    with pytest.raises(ValueError, match="was built for"):
        model.read_codes_of(vistok.create("var-vqvae-tiny", codebook_size=64))
    assert not any(parameter.requires_grad for parameter in model.quantizer.parameters())


def test_the_pipeline_serves_it_after_saving_and_loading(model, tokenizer, tmp_path):
    pipe = TokenImagePipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(labels=[0, 3], num_images=2, seed=5, guidance_scale=2.0)
    assert len(made.images) == 4 and made.images[0].size == (32, 32) and made.tokens.layout == tokenizer.layout
    pipe.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(labels=[0, 3], num_images=2, seed=5, guidance_scale=2.0).tokens.ids, made.tokens.ids)
    assert pipe(labels=[0], seed=5, num_tokens=14).tokens.counts.tolist() == [14]


# -- checkpoints ------------------------------------------------------------------------------------------------------------------------

VARIANTS = [
    (dict(num_phis=1), dict(shared_modulation=True)),
    (dict(num_phis=0, metric="cosine"), dict(unit_attention=False)),
    (dict(num_phis=3), dict(shared_modulation=True, unit_attention=False)),
]


@pytest.mark.parametrize("codes, shape", VARIANTS, ids=str)
def test_official_files_are_written_and_read_back(tmp_path, codes, shape):
    tokenizer = randomised("var-vqvae-tiny", **codes)
    model = randomised("var-tiny", codes=tokenizer.settings.codes, **shape).read_codes_of(tokenizer)
    to_official(tokenizer, tmp_path)
    to_official(model, tmp_path)
    again = from_official(tmp_path, metric=tokenizer.settings.codes.metric, norm_groups=8, num_heads=4)
    assert again.settings == model.settings
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_wrong_checkpoint_is_refused_with_every_tensor_at_fault(model, tokenizer, tmp_path):
    from safetensors.torch import save_file

    state = {key: value.clone() for key, value in official_state(model).items()}
    with pytest.raises(ValueError, match="give tokenizer="):
        save_file(state, tmp_path / "var.safetensors")
        from_official(tmp_path / "var.safetensors")
    for change in ({"head.bias": None}, {"odd": torch.zeros(1)}, {"word_embed.bias": torch.zeros(3)}, {"lvl_1L": state["lvl_1L"].flip(1)}):
        wrong = {key: value for key, value in {**state, **change}.items() if value is not None}
        save_file(wrong, tmp_path / "var.safetensors")
        with pytest.raises(ValueError, match=next(iter(change))):
            from_official(tmp_path / "var.safetensors", tokenizer=tokenizer)


def test_scales_go_on_from_a_saved_prefix_as_if_unbroken(model):
    uniforms = torch.rand(3, model.max_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    whole, _ = generate(model, condition(model), uniforms=uniforms, guidance_scale=2.5)
    for known in (1, 14):
        again, _ = generate(model, condition(model), uniforms=uniforms, guidance_scale=2.5, prefix=whole.ids[:, :known])
        assert torch.equal(again.ids, whole.ids)
    with pytest.raises(ValueError, match="ends inside a step"):
        generate(model, condition(model), uniforms=uniforms, prefix=whole.ids[:, :2])
