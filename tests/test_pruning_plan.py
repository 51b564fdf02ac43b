import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.pruning import ReductionPlan
from vistok.pruning.methods.pitome import pitome
from vistok.pruning.methods.tome import tome
from vistok.pruning.methods.topk import top_tokens


@st.composite
def plans(draw, num_tokens=None):
    """A plan with the method's own shapes, from random metrics."""
    N = draw(st.integers(4, 20)) if num_tokens is None else num_tokens
    metric = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    kind = draw(st.sampled_from(["tome", "protect", "order", "top"]))
    r, num_prefix = draw(st.integers(0, N)), draw(st.integers(0, 2))
    if kind == "tome":
        return tome(metric, r, num_prefix=num_prefix)
    if kind == "top":
        return top_tokens(metric[:, num_prefix:, 0], max(1, N - num_prefix - r), num_prefix=num_prefix)
    return pitome(metric, r, margin=0.4, num_prefix=num_prefix, rule=kind)


@st.composite
def two_plans(draw):
    first = draw(plans())
    return first, draw(plans(num_tokens=first.num_kept)) if first.num_kept >= 4 else ReductionPlan.identity(2, first.num_kept)


@settings(max_examples=25, deadline=None)
@given(plans())
def test_sizes_sum_to_the_tokens_that_are_left_in(plan):
    _, size = plan.merge(torch.randn(2, plan.num_tokens, 3))
    size = torch.ones(2, plan.num_kept, 1) if size is None else size
    assert torch.equal(size.sum(dim=(1, 2)), (plan.owner >= 0).sum(dim=1).float())
    assert plan.is_dropping == bool((plan.owner < 0).any())


@settings(max_examples=25, deadline=None)
@given(plans())
def test_rows_that_take_in_nothing_come_back_bit_for_bit(plan):
    x = torch.randn(2, plan.num_tokens, 3)
    merged, size = plan.merge(x)
    alone = torch.ones(2, plan.num_kept, dtype=torch.bool) if size is None else size[..., 0] == 1
    assert torch.equal(merged[alone], plan.gather(x)[alone])
    restored = plan.restore(merged)
    kept_alone = alone.gather(1, plan.owner.clamp(min=0)) & (plan.owner >= 0)
    assert torch.equal(restored[kept_alone], x[kept_alone])


@settings(max_examples=25, deadline=None)
@given(two_plans())
def test_folding_with_the_composed_plan_is_folding_twice(pair):
    first, second = pair
    x = torch.randn(2, first.num_tokens, 3)
    once, size_once = first.merge(x)
    twice, size_twice = second.merge(once, size_once)
    composed = first.compose(second)
    together, size = composed.merge(x)
    torch.testing.assert_close(together, twice)
    if size is not None:
        torch.testing.assert_close(size, torch.ones_like(size) if size_twice is None else size_twice)
    step = torch.where(first.owner >= 0, second.owner.gather(1, first.owner.clamp(min=0)), -1)
    assert torch.equal(composed.owner, step)
    for mode in ("sum", "amax"):
        torch.testing.assert_close(composed.reduce(x, mode), second.reduce(first.reduce(x, mode), mode))


def test_folding_is_differentiable_and_matches_a_written_out_mean():
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    plan = ReductionPlan(6, torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    size = torch.tensor([1.0, 2, 3, 4, 5, 6])[None, :, None]
    merged, total = plan.merge(x, size)
    torch.testing.assert_close(merged[0, 1], (2 * x[0, 1] + 3 * x[0, 2] + 4 * x[0, 3]) / 9)
    assert total.flatten().tolist() == [1, 9, 6] and plan.owner.tolist() == [[0, 1, 1, 1, -1, 2]]
    assert torch.autograd.gradcheck(lambda x: plan.merge(x, size)[0], x, atol=1e-4)  # the weights are float32


def test_a_plan_refuses_tokens_it_was_not_made_for():
    plan = ReductionPlan.identity(2, 5)
    with pytest.raises(ValueError, match=r"\[2, 5"):
        plan.merge(torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match="made 5 tokens"):
        plan.restore(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="starts from 4"):
        plan.compose(ReductionPlan.identity(2, 4))
