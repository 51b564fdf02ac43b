import pytest
import torch

import vistok
from vistok.tokenizers import VAEConfig
from vistok.tokenizers.flextok import FlexTokConfig
from vistok.tokenizers.quality import Quality, psnr_score
from vistok.tokens import TokenLayout, VisualTokens

R = 16  # registers of flextok-tiny
SMALL_VAE = VAEConfig(image_size=(32, 32), latent_channels=4, block_channels=(8, 16), layers_per_block=1, norm_groups=4, scaling_factor=0.5)


def build(**overrides):
    """A flextok-tiny whose velocity is not zero: trained ones are not, fresh ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("flextok-tiny", **overrides).eval()
        model.open_gates()
        for linear in (*(block.modulation for block in model.decoder.blocks), model.decoder.head_modulation, model.decoder.head):
            torch.nn.init.normal_(linear.weight, std=0.05)
        torch.nn.init.normal_(model.encoder.head.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def tokens(model, images):
    return model.encode(images)


def generators(numbers):
    return vistok.image_generators(0, numbers)


# -- encoding ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, R])
def test_encoding_k_tokens_gives_the_first_k_of_all(model, images, tokens, k):
    short = model.encode(images, num_tokens=k)
    assert torch.equal(short.ids, tokens.ids[:, :k]) and short.counts.tolist() == [k] * 3
    assert short.layout == TokenLayout("sequence", (R,))


def test_encoding_k_tokens_runs_k_registers(model, images):
    seen = []
    hook = model.encoder.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    model.encode(images, num_tokens=3)
    hook.remove()
    assert seen == [16 + 3]  # 4 x 4 patches


def test_later_tokens_do_not_reach_earlier_ones(model, images):
    """A register sees only earlier ones: changing the last register changes its own id at most."""
    changed = build()
    with torch.no_grad():
        changed.encoder.registers[-1].add_(3.0)
    assert torch.equal(changed.encode(images).ids[:, :-1], model.encode(images).ids[:, :-1])


@pytest.mark.parametrize("num_tokens", [0, -1, R + 1, 2.0, True, "4"])
def test_a_token_count_out_of_range_is_refused_with_the_range(model, images, num_tokens):
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model.encode(images, num_tokens=num_tokens)


def test_images_that_do_not_divide_into_patches_are_refused(model):
    with pytest.raises(ValueError, match="multiple of 8"):
        model.encode(torch.zeros(1, 3, 36, 32))


# -- decoding ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, R + 1, 3))
def test_any_prefix_decodes(model, tokens, k):
    out = model.decode(tokens.truncate(k), num_steps=2)
    assert out.shape == (3, 3, 32, 32) and out.isfinite().all() and out.abs().max() <= 1


def test_what_is_decoded_depends_on_every_kept_token(model, tokens):
    full = model.decode(tokens, num_steps=2)
    ids = tokens.ids.clone()
    ids[:, 5] = (ids[:, 5] + 77) % model.codebook_size
    other = VisualTokens.from_ids(ids, model.layout)
    assert not torch.allclose(model.decode(other, num_steps=2), full, atol=1e-4)
    assert torch.equal(model.decode(other.truncate(5), num_steps=2), model.decode(tokens.truncate(5), num_steps=2))


@pytest.mark.parametrize("counts", [[1, 1, 1], [16, 16, 16], [2, 16, 7], [4, 4, 4]])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_folded_registers_give_the_picture_of_all_registers(model, tokens, counts, scale):
    part = tokens.truncate(torch.tensor(counts))
    fast, slow = (model.decode(part, num_steps=4, guidance_scale=scale, folded=folded) for folded in (True, False))
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_folding_runs_one_register_for_all_that_are_masked(model, tokens):
    seen = []
    hook = model.decoder.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    model.decode(tokens.truncate(3), num_steps=1, guidance_scale=2.0)
    model.decode(tokens.truncate(3), num_steps=1, guidance_scale=2.0, folded=False)
    hook.remove()
    assert seen == [16 + 3 + 1, 16 + 1, 16 + R, 16 + R]


def test_ragged_counts_give_what_each_image_gives_alone(model, tokens):
    ragged = tokens.truncate(torch.tensor([2, 16, 7]))
    together = model.decode(ragged, num_steps=3, guidance_scale=3.0, generators=generators(3))
    for i in range(3):
        alone = model.decode(ragged[i].truncate(int(ragged.counts[i])), num_steps=3, guidance_scale=3.0, generators=generators([i]))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_what_fills_the_padding_does_not_matter(model, tokens):
    counts = torch.tensor([2, 16, 7])
    filled = VisualTokens(tokens.ids, None, counts, tokens.layout)
    assert torch.equal(model.decode(filled, num_steps=2), model.decode(tokens.truncate(counts), num_steps=2))


def test_prefixes_share_their_noise_and_are_what_decoding_each_gives(model, tokens):
    strip = model.decode_prefixes(tokens, [1, 4, 16], num_steps=3, generators=generators(3))
    assert strip.shape == (3, 3, 3, 32, 32)
    for p, k in enumerate([1, 4, 16]):
        alone = model.decode(tokens.truncate(k), num_steps=3, generators=generators(3))
        torch.testing.assert_close(strip[p], alone, atol=1e-5, rtol=0)


def test_decoding_the_same_tokens_twice_gives_the_same_picture_and_other_generators_another(model, tokens):
    assert torch.equal(model.decode(tokens, num_steps=2), model.decode(tokens, num_steps=2))
    one, two = (model.decode(tokens, num_steps=2, generators=vistok.image_generators(seed, 3)) for seed in (1, 2))
    assert not torch.allclose(one, two, atol=1e-3)


def test_guidance_one_runs_no_unconditional_pass(model, tokens):
    calls = []
    hook = model.decoder.register_forward_hook(lambda *_: calls.append(1))
    counted = []
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0, "solver": "heun"}):
        calls.clear()
        model.decode(tokens, num_steps=3, **options)
        counted.append(len(calls))
    hook.remove()
    assert counted == [3, 6, 5]


def test_guidance_by_a_function_of_time_equals_the_constant_it_returns(model, tokens):
    asked = []

    def scale(t):
        asked.append(t)
        return 3.0

    by_function = model.decode(tokens, num_steps=4, guidance_scale=scale, guidance="cfg")
    assert torch.equal(by_function, model.decode(tokens, num_steps=4, guidance_scale=3.0, guidance="cfg"))
    assert asked == [1.0, 0.75, 0.5, 0.25]


def test_heun_and_euler_end_at_the_same_latents_and_heun_sooner(model, tokens):
    options = {"guidance_scale": 1.0, "noise": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    fine = model.decode_to_latents(tokens, num_steps=48, solver="heun", **options)
    euler, heun = (model.decode_to_latents(tokens, num_steps=8, solver=name, **options) for name in ("euler", "heun"))
    assert (heun - fine).square().mean() < (euler - fine).square().mean()
    torch.testing.assert_close(model.decode(tokens, num_steps=1, solver="heun"), model.decode(tokens, num_steps=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (8, 48)])
def test_images_of_other_shapes_encode_and_decode(model, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    tokens = model.encode(images)
    assert tokens.ids.shape == (2, R)
    fast, slow = (model.decode(tokens, image_size=size, num_steps=2, guidance_scale=2.0, folded=folded) for folded in (True, False))
    assert fast.shape == (2, 3, *size)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_an_image_larger_than_the_position_table_needs_interpolation():
    large = torch.zeros(1, 3, 72, 32)
    with pytest.raises(ValueError, match="position_scaling='interpolate'"):
        build().encode(large)
    stretching = build(position_scaling="interpolate")
    assert stretching.decode(stretching.encode(large), image_size=(72, 32), num_steps=1).shape == (1, 3, 72, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "rk4"}, "euler, heun"),
        ({"guidance": "none"}, "apg, cfg"),
        ({"num_steps": 0}, "at least 1"),
        ({"image_size": (30, 32)}, "multiples"),
        ({"image_size": (0, 32)}, "multiples"),
        ({"noise": torch.zeros(2, 3, 32, 32)}, "noise must be"),
        ({"noise": torch.zeros(3, 4, 32, 32)}, "noise must be"),
        ({"generators": vistok.image_generators(0, 2)}, "3 generators"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        model.decode(tokens, **options)


def test_tokens_that_do_not_fit_are_refused(model):
    for ids in (torch.full((1, 4), 200), torch.full((1, 4), -2), torch.zeros(1, R + 1), torch.zeros(0, 4)):
        with pytest.raises(ValueError):
            model.decode(VisualTokens.from_ids(ids, model.layout))
    with pytest.raises(ValueError, match="continuous"):
        model.decode(VisualTokens.from_values(torch.zeros(1, 4, 3), model.layout))


# -- automatic length ----------------------------------------------------------------------------------------------------------------------


def test_the_length_chosen_reaches_its_target_with_few_decodes(model, images, tokens):
    scores = torch.stack([psnr_score(model.decode(tokens.truncate(k), num_steps=2), images) for k in range(1, R + 1)])
    target = float(scores[-1].min())  # every image reaches it with all its tokens
    rounds = []

    def score(reconstruction, originals):
        rounds.append(1)
        return psnr_score(reconstruction, originals)

    chosen = model.encode(images, quality=Quality(target, score, {"num_steps": 2}))
    assert all(scores[int(k) - 1, i] >= target for i, k in enumerate(chosen.counts))
    assert len(rounds) <= 5  # ceil(log2 16) + 1
    assert torch.equal(chosen.ids, tokens.truncate(chosen.counts).ids)


def test_an_easy_target_takes_one_token_and_an_impossible_one_all(model, images):
    options = {"num_steps": 1}
    assert model.encode(images, quality=Quality(-100.0, options=options)).counts.tolist() == [1, 1, 1]
    assert model.encode(images, quality=Quality(100.0, options=options)).counts.tolist() == [R] * 3


def test_the_length_of_an_image_does_not_depend_on_a_score_of_another(model, images):
    def score(reconstruction, originals):
        return torch.tensor([1.0, 0.0, 1.0])

    assert model.encode(images, quality=Quality(0.5, score, {"num_steps": 1})).counts.tolist() == [1, R, 1]
    with pytest.raises(ValueError, match="not both"):
        model.encode(images, quality=20.0, num_tokens=3)


# -- latents, training ---------------------------------------------------------------------------------------------------------------------


def test_a_flextok_on_latents_goes_through_its_frozen_vae(images):
    model = build(vae=SMALL_VAE, patch_size=(2, 2), decode_guidance_scale=2.0)
    assert not any(p.requires_grad for p in model.vae.parameters())
    tokens = model.encode(images)
    sampled = model.encode_latents(images, generators=generators(3))
    assert sampled.shape == (3, 4, 16, 16) and not torch.equal(sampled, model.encode_latents(images))
    fast, slow = (model.decode(tokens.truncate(4), num_steps=2, folded=folded) for folded in (True, False))
    assert fast.shape == (3, 3, 32, 32)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def draws(images):
    generator = torch.Generator().manual_seed(3)
    return {"noise": torch.randn(images.shape, generator=generator), "times": torch.tensor([0.1, 0.5, 0.9])}


def test_a_training_pass_trains_every_parameter(images):
    model = build()
    out, _ = model(images, **draws(images), counts=torch.tensor([1, 7, 12]), num_tokens=12, is_dropped=torch.tensor([False, False, True]))
    out.losses["flow"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [] and out.tokens.counts.tolist() == [1, 7, 12]


def test_a_dropped_image_learns_nothing_from_its_tokens(images):
    model = build()
    out, _ = model(images, **draws(images), counts=torch.full((3,), 8), num_tokens=8, is_dropped=torch.ones(3, dtype=torch.bool))
    out.losses["flow"].backward()
    assert model.decoder.null_token.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.encoder.parameters())


def test_running_the_kept_registers_only_gives_the_loss_of_running_all(model, images):
    counts = torch.tensor([1, 7, 12])
    with torch.no_grad():
        few, all_ = (model(images, **draws(images), counts=counts, num_tokens=k)[0].losses["flow"] for k in (12, R))
    torch.testing.assert_close(few, all_, atol=1e-6, rtol=1e-5)


def test_the_tap_gives_the_patches_of_its_block(model, images):
    _, tapped = model(images, **draws(images), counts=torch.full((3,), 4), num_tokens=4, tap=1)
    assert tapped.shape == (3, 16, 64) and model(images, **draws(images), counts=torch.full((3,), 4), num_tokens=4)[1] is None


def test_a_fresh_model_predicts_no_velocity(images):
    fresh = vistok.create("flextok-tiny")
    out, _ = fresh(images, **draws(images), counts=torch.full((3,), 4), num_tokens=4)
    torch.testing.assert_close(out.losses["flow"], (draws(images)["noise"] - images).square().mean())


def test_shapes_that_cannot_be_built_are_refused():
    for options in ({"encoder_width": 100}, {"decoder_width": 96}, {"num_registers": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FlexTokConfig(**options)
