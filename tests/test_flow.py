import math

import pytest
import torch

from vistok.flow import SOLVERS, AdaptiveProjectedGuidance, classifier_free, interpolate, sample_times, time_grid, velocity_target


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_path_runs_from_image_to_noise_at_constant_velocity():
    clean, noise = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert torch.equal(interpolate(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(interpolate(clean, noise, torch.ones(2)), noise)
    step = interpolate(clean, noise, torch.full((2,), 0.75)) - interpolate(clean, noise, torch.full((2,), 0.25))
    torch.testing.assert_close(step * 2, velocity_target(clean, noise))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_path_is_integrated_exactly_in_any_number_of_steps(solver):
    clean, noise = draw(2, 5), draw(2, 5, seed=1)
    for steps in (1, 3, 20):
        out = SOLVERS[solver](lambda x, step: velocity_target(clean, noise), noise, time_grid(steps))
        torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)


def test_heun_is_closer_than_euler_on_a_curved_path():
    times = time_grid(10)

    def velocity(x, step):
        return x * times[step]  # dx/dt = t x, so x(0) = x(1) exp(-1/2)

    exact = math.exp(-0.5)
    error = {name: abs(SOLVERS[name](velocity, torch.ones(1), times).item() - exact) for name in SOLVERS}
    assert error["heun"] < error["euler"] / 5


def test_solvers_show_what_enters_each_step_and_need_one():
    seen = []
    SOLVERS["euler"](lambda x, step: x, torch.ones(1), time_grid(4), lambda step, x: seen.append((step, x.item())))
    assert [step for step, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(0)


def test_guidance_of_scale_one_changes_nothing():
    cond, uncond = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(classifier_free(cond, uncond, 1.0), cond)
    torch.testing.assert_close(AdaptiveProjectedGuidance()(cond, uncond, 1.0), cond)


def test_projected_guidance_adds_nothing_along_the_conditional_prediction():
    cond, uncond = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    added = (AdaptiveProjectedGuidance()(cond, uncond, 4.0) - cond).flatten(1)
    assert (added * cond.flatten(1)).sum(1).abs().max() < 1e-4
    assert added.norm(dim=1).max() <= 3 * 2.5 + 1e-4


def test_projected_guidance_without_its_three_changes_is_classifier_free_guidance():
    cond, uncond = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    plain = AdaptiveProjectedGuidance(momentum=0.0, norm_threshold=1e9, eta=1.0)
    torch.testing.assert_close(plain(cond, uncond, 3.0), classifier_free(cond, uncond, 3.0), atol=1e-5, rtol=1e-5)


def test_projected_guidance_treats_every_image_alone_and_survives_equal_predictions():
    cond, uncond = draw(3, 8), draw(3, 8, seed=1)
    together, alone = AdaptiveProjectedGuidance(), AdaptiveProjectedGuidance()
    for _ in range(3):
        torch.testing.assert_close(together(cond, uncond, 5.0)[1:2], alone(cond[1:2], uncond[1:2], 5.0))
    assert AdaptiveProjectedGuidance()(torch.zeros(1, 4), torch.zeros(1, 4), 5.0).isfinite().all()


@pytest.mark.parametrize("sampling", ["uniform", "mode", "logit_normal"])
def test_sampled_times_are_in_the_unit_interval(sampling):
    t = sample_times(torch.linspace(0, 1, 1001), sampling=sampling)
    assert t.min() >= 0 and t.max() <= 1 and t.isfinite().all()


def test_mode_sampling_of_strength_zero_is_uniform_and_unknown_names_are_refused():
    u = torch.linspace(0, 1, 11)
    torch.testing.assert_close(sample_times(u, mode_scale=0.0), 1 - u)
    with pytest.raises(ValueError, match="logit_normal"):
        sample_times(u, sampling="cosine")
