import pytest
import torch

import vistok
from vistok.decoding import generate
from vistok.rng import image_generators


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("rar-tiny", num_classes=3, classes=("a", "b", "c"), codebook_size=20).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))


def test_the_cache_gives_the_same_logits(model, ids):
    condition = model.make_condition(2, labels=[0, 2])
    with torch.no_grad():
        whole = model(ids, condition)
        cache = model.new_cache(2)
        parts = [model(ids[:, :5], condition, cache=cache), model(ids[:, 5:6], cache=cache), model(ids[:, 6:], cache=cache)]
    assert whole.shape == (2, 17, 20)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_a_prefix_gives_the_first_logits_of_the_whole(model, ids):
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :5], atol=1e-5, rtol=1e-5)


def test_a_logit_sees_no_later_token_and_knows_where_it_is_asked(model, ids):
    changed = ids.clone()
    changed[:, 7:] = 0
    swapped = torch.arange(16).expand(2, -1).clone()
    swapped[:, [4, 9]] = swapped[:, [9, 4]]
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(model(changed)[:, :8], whole[:, :8], atol=1e-5, rtol=1e-5)
        moved = model(ids, orders=swapped)
    torch.testing.assert_close(moved[:, :4], whole[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moved[:, 4], whole[:, 4], atol=1e-4)


def test_samples_do_not_depend_on_the_batch_and_follow_the_class(model):
    labels = [0, 1, 2]
    made = generate(model, model.make_condition(3, labels=labels), generators=image_generators(0, 3), guidance_scale=4.0)[0].ids
    alone = generate(model, model.make_condition(1, labels=[1]), generators=image_generators(0, [1]), guidance_scale=4.0)[0].ids
    assert made.shape == (3, 16) and torch.equal(made[1:2], alone)


def test_guidance_rises_from_one_by_a_powered_cosine(model):
    schedule = model.guidance_schedule(5.0)
    scales = [schedule(step) for step in range(16)]
    assert scales[0] == 1 and scales == sorted(scales) and scales[-1] < 5 and schedule(16) == pytest.approx(5)


def test_saving_and_loading_changes_no_bit(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(vistok.load(tmp_path)(ids), model(ids))


def test_wrong_input_is_refused_with_a_reason(model, ids):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        model.make_condition(1, labels=[3])
    with pytest.raises(ValueError, match="raster order"):
        model(ids, cache=model.new_cache(2), orders=torch.arange(16).expand(2, -1))
    with pytest.raises(ValueError, match="knows 16 tokens"):
        model(torch.zeros(1, 17, dtype=torch.int64))
