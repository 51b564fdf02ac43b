import pytest
import torch

from vistok.decoding.sampling import SamplingConfig, keep_min_p, keep_top_k, keep_top_p, sample, warp


def law(logits, **options):
    return warp(torch.tensor(logits), SamplingConfig(**options)).softmax(-1)


def log(*probabilities):
    return torch.tensor(probabilities).log()


def test_the_default_is_the_models_own_law():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(warp(logits, SamplingConfig()), logits)


def test_temperature_divides_logits_and_zero_takes_the_first_best():
    assert torch.allclose(law([0.0, 1.0], temperature=0.5), torch.tensor([0.0, 2.0]).softmax(-1))
    assert law([1.0, 3.0, 3.0], temperature=0.0).tolist() == [0.0, 1.0, 0.0]


def test_top_k_keeps_k_ids_and_ties_of_the_last():
    kept = keep_top_k(torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 3.0, 1.0]]), 2).isfinite()
    assert kept.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert torch.equal(keep_top_k(log(0.5, 0.5), 9), log(0.5, 0.5))


def test_top_p_keeps_the_fewest_ids_that_reach_the_mass():
    logits = log(0.1, 0.5, 0.25, 0.15)
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [False, True, False, False]
    assert keep_top_p(logits, 0.51).isfinite().tolist() == [False, True, True, False]
    assert keep_top_p(logits, 0.8).isfinite().tolist() == [False, True, True, True]
    assert keep_top_p(logits, 1e-9).isfinite().sum() == 1
    ties = keep_top_p(log(0.25, 0.25, 0.25, 0.25), 0.5).isfinite()
    assert ties.tolist() == [True, True, False, False]


def test_min_p_keeps_ids_by_their_ratio_to_the_best():
    kept = keep_min_p(log(0.6, 0.3, 0.07, 0.03), 0.1).isfinite()
    assert kept.tolist() == [True, True, True, False]
    assert torch.allclose(law([0.0, 0.0, -9.0], min_p=0.5), torch.tensor([0.5, 0.5, 0.0]))


def test_warpers_see_the_law_their_predecessor_left():
    # top_k leaves .5 and .3, which become .625 and .375; then top_p=.6 leaves the first alone
    assert law(log(0.5, 0.3, 0.2).tolist(), top_k=2, top_p=0.6).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}])
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_samples_follow_the_law_by_chi_square():
    p = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1])
    n = 20000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sample(p.expand(n, 5), u).bincount(minlength=5)
    assert counts[1] == 0
    used = p > 0
    statistic = ((counts - n * p)[used] ** 2 / (n * p)[used]).sum()
    assert statistic < 16.27  # 0.1 % of the chi-square law with 3 degrees of freedom


def test_an_id_of_probability_zero_is_never_drawn_at_the_edges():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0], dtype=torch.float64)
    almost_one = 1 - 2.0**-53
    u = torch.tensor([0.0, 0.7 - 1e-9, 0.7 + 1e-7, almost_one], dtype=torch.float64)
    assert sample(p.expand(4, 5), u).tolist() == [1, 1, 3, 3]
    assert sample(3.7 * p, torch.tensor(almost_one, dtype=torch.float64)).item() == 3


def test_a_row_depends_on_its_own_uniform_only():
    p = torch.rand(6, 50, generator=torch.Generator().manual_seed(1))
    u = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert [sample(p[i], u[i]).item() for i in range(6)] == sample(p, u).tolist()
