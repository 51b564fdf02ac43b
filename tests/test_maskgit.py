import pytest
import torch

import vistok
from vistok.decoding import SamplingConfig, generate, generate_parallel
from vistok.decoding.parallel import fill_step
from vistok.generators import MaskGIT
from vistok.rng import image_generators


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("maskgit-tiny", num_classes=3, classes=("a", "b", "c"), codebook_size=20).eval()
        for parameter in model.parameters():
            parameter.data.mul_(5)
    return model


def sample(model, numbers, **options):
    condition = model.make_condition(len(numbers), labels=[n % 3 for n in numbers])
    return generate_parallel(model, condition, generators=image_generators(0, numbers), **options)[0].ids


def test_every_token_is_filled_and_is_a_code(model):
    ids = sample(model, [0, 1])
    assert ids.shape == (2, 16) and 0 <= int(ids.min()) and int(ids.max()) < 20


def test_an_image_does_not_depend_on_its_batch(model):
    together = sample(model, [0, 1, 2], guidance_scale=3.0)
    assert torch.equal(together[1:2], sample(model, [1], guidance_scale=3.0))


def test_each_step_settles_as_many_tokens_as_the_schedule_says_and_changes_none_of_them(model):
    seen = []
    sample(model, [0, 1], num_steps=5, on_step=lambda step, ids: seen.append(ids))
    for step, ids in enumerate(seen):
        assert ((ids == model.mask_id).sum(1) == model.num_masked(step, 5)).all()
        if step:
            known = seen[step - 1] != model.mask_id
            assert torch.equal(ids[known], seen[step - 1][known])
    assert sum(model.step_sizes(16)) == 16 and len(model.step_sizes(16)) == 8


def test_without_noise_one_step_takes_the_most_probable_codes(model):
    condition = model.make_condition(2, labels=[0, 1])
    masked = torch.full((2, 16), model.mask_id)
    with torch.no_grad():
        best = model(masked, condition).argmax(-1)
    assert torch.equal(sample(model, [0, 1], num_steps=1, noise=0.0), best)


def test_guidance_of_one_is_no_guidance_and_zero_is_the_null_class(model):
    numbers = [0, 1]
    null = generate_parallel(model, model.make_condition(2), generators=image_generators(0, numbers))[0].ids
    assert torch.equal(sample(model, numbers, guidance_scale=0.0), null)
    assert not torch.equal(sample(model, numbers), null)


def test_images_with_different_numbers_of_known_tokens_go_on_together_and_keep_them(model):
    prefix = torch.full((3, 16), model.mask_id)
    prefix[0, ::2], prefix[1, 3], prefix[2] = 7, 5, 9
    seen = []
    together = sample(model, [0, 1, 2], prefix=prefix, guidance_scale=2.0, on_step=lambda step, ids: seen.append(ids))
    known = prefix != model.mask_id
    assert torch.equal(together[known], prefix[known]) and int(together.max()) < 20 and not torch.equal(together[1], prefix[1])
    assert all(torch.equal(ids[known], prefix[known]) for ids in seen)
    assert torch.equal(together[:1], sample(model, [0], prefix=prefix[:1], guidance_scale=2.0))
    assert torch.equal(together[1:2], sample(model, [1], prefix=prefix[1:2], guidance_scale=2.0))


def test_first_tokens_alone_are_a_prefix_too_and_save_the_steps_that_would_have_made_them(model):
    first = torch.arange(12).expand(2, -1)
    condition = model.make_condition(2, labels=[0, 1])
    tokens, stats = generate(model, condition, generators=image_generators(0, 2), prefix=first)
    assert torch.equal(tokens.ids[:, :12], first) and stats.num_tokens == 8 and stats.target_passes < 8
    for prefix, message in (
        (first[:1], "must hold ids"),
        (first + 10, "allowed: 0 to 19, and 20 for a masked"),
        (first.float(), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, [0, 1], prefix=prefix)
    with pytest.raises(ValueError, match="none to make"):
        sample(model, [0], prefix=torch.zeros(1, 16, dtype=torch.int64))


def test_guesses_follow_the_law_of_the_logits_at_full_noise():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 1, 3)
    uniforms = torch.rand(20000, 1, 4, generator=torch.Generator().manual_seed(0))
    ids = fill_step(logits, torch.full((20000, 1), 3), uniforms, noise=1.0, num_masked=0, mask_id=3)
    shares = torch.bincount(ids.flatten(), minlength=3) / len(ids)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_the_least_sure_guesses_are_masked_again_and_known_tokens_never():
    logits = torch.zeros(1, 4, 2)
    logits[0, :, 0] = torch.tensor([3.0, 1.0, 2.0, 0.5])
    ids = torch.tensor([[9, 9, 9, 1]])
    out = fill_step(logits, ids, torch.full((1, 4, 3), 0.5), noise=0.0, num_masked=2, mask_id=9)
    assert out.tolist() == [[0, 9, 9, 1]]
    assert fill_step(logits, out, torch.full((1, 4, 3), 0.5), noise=0.0, num_masked=2, mask_id=9).tolist() == [[0, 9, 0, 1]]


def test_generate_and_the_pipeline_run_it_with_their_own_options(model):
    condition = model.make_condition(2, labels=[0, 1])
    tokens, stats = generate(model, condition, generators=image_generators(0, [0, 1]), sampling=SamplingConfig(top_k=3))
    assert tokens.ids.shape == (2, 16) and stats.target_passes == 8
    with pytest.raises(ValueError, match="exactly 16"):
        generate(model, condition, generators=image_generators(0, 2), num_tokens=4)
    small = vistok.create("maskgit-tiny", num_classes=3, classes=("a", "b", "c")).eval()
    pipe = vistok.TokenImagePipeline(small, vistok.create("titok-tiny").eval())
    out = pipe(labels=["b"], num_images=2, seed=0)
    assert len(out.images) == 2 and out.images[0].size == (32, 32)


def test_the_loss_learns_a_constant_image(model):
    learner = MaskGIT(model.settings)
    ids = torch.arange(16).expand(4, -1)
    condition = learner.make_condition(4, labels=[0, 1, 2, -1])
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        loss, plain, accuracy = learner.masked_loss(ids, condition, torch.rand(4, 17, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(plain.item())
    assert losses[-1] < 0.5 * losses[0] and 0 <= float(accuracy) <= 1 + 1e-6


def test_saving_and_loading_changes_no_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(sample(again, [3]), sample(model, [3]))


def test_wrong_input_is_refused_with_a_reason(model):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        model.make_condition(1, labels=[3])
    with pytest.raises(ValueError, match="reads none"):
        model.make_condition(1, captions=["a cat"])
    with pytest.raises(ValueError, match="1 to 16 steps"):
        sample(model, [0], num_steps=17)
    with pytest.raises(ValueError, match="16 tokens"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="eval"):
        sample(MaskGIT(model.settings).train(), [0])
