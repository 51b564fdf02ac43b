import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

import vistok
from vistok.pruning import STRATEGIES, ReductionPlan
from vistok.pruning.methods.diversity import cdpruner, dart, divprune, text_relevance
from vistok.pruning.methods.pitome import pitome
from vistok.pruning.methods.tome import even_schedule, tome
from vistok.pruning.methods.topk import count_to_keep, fastv_score, pyramiddrop_counts, query_attention, top_tokens, uniform_score
from vistok.pruning.methods.vision_attention import flowcut_count, flowcut_score, prumerge, vscan_mask, vscan_merge
from vistok.pruning.methods.zero_tprune import head_mean, page_rank, zero_tprune

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
FAMILIES = {
    "plain": lambda: VisionTransformer(**SMALL),
    "layer scale": lambda: VisionTransformer(**SMALL, init_values=0.3),
    "qk norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=4),
    "mean pooling": lambda: VisionTransformer(**SMALL, global_pool="avg", class_token=False),
    "attention pooling": lambda: VisionTransformer(**SMALL, global_pool="map", class_token=False),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "rotary": lambda: Eva(**SMALL, use_rot_pos_emb=True, init_values=0.5),
    "mixed rotary": lambda: Eva(**SMALL, use_rot_pos_emb=True, rope_type="mixed"),
    "DINOv3": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, num_reg_tokens=4, use_abs_pos_emb=False, rope_type="dinov3", rope_rotate_half=True
    ),
}


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():  # away from the initial values, where branches do nothing and norms are the identity
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 300), st.integers(1, 300))
def test_an_even_schedule_ends_at_the_number_asked_for_or_says_it_cannot(layers, patches, keep):
    if keep > patches or math.ceil(patches / 2**layers) > keep:
        with pytest.raises(ValueError, match="keep="):
            even_schedule(layers, patches, keep)
    else:
        schedule = even_schedule(layers, patches, keep)
        assert patches - sum(schedule) == keep and min(schedule) >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_vit_is_reduced_and_left_as_it_was(family):
    model, x = build(family), images()
    expected = model(x)
    methods = [name for name in STRATEGIES if name != "cls" or model.num_prefix_tokens]
    for method in methods:
        options = {"num_similar": 2} if method == "zero_tprune" else {"keep": 7}
        with vistok.prune(model, method, **options) as pruned:
            reduced = model(x)
        counts = pruned.stats().num_tokens
        assert counts[0] == 16 + model.num_prefix_tokens and counts[-1] < counts[0] and pruned.stats().macs_ratio < 1
        assert reduced.shape == expected.shape and not torch.equal(reduced, expected)
        assert torch.equal(pruned.plan.keep[:, : model.num_prefix_tokens], torch.arange(model.num_prefix_tokens).expand(2, -1))
        assert (pruned.size[:, : model.num_prefix_tokens] == 1).all()
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_token_changes_no_bit(family):
    model, x = build(family), images()
    expected = model(x)
    for method, options in (
        ("tome", {"r": 0}),
        ("tome", {"keep_ratio": 1.0}),
        ("pitome", {"layer_keep_ratio": 1.0}),
        ("random", {"keep": 16}),
    ):
        with vistok.prune(model, method, **options):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["plain", "layer scale", "qk norm", "mean pooling", "attention pooling"])
def test_merging_copies_of_a_patch_loses_nothing_with_proportional_attention(family):
    model = build(family)
    torch.nn.init.zeros_(model.pos_embed)
    x = torch.randn(1, 3, 4, 1).repeat_interleave(4, 2).expand(-1, -1, -1, 16)  # 4 rows of 4 equal patches
    expected = model(x)
    with vistok.prune(model, "tome", r=[8, 4]):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    if model.num_prefix_tokens:  # without one, all sizes are equal and the bias cancels
        with vistok.prune(model, "tome", r=[8, 4], is_proportional=False):
            assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["plain", "rotary", "mixed rotary", "DINOv3"])
def test_dropping_patches_is_running_the_blocks_on_the_rest_with_their_own_positions(family):
    model, x = build(family), images()
    with vistok.prune(model, "uniform", r=[6, 0, 0]) as pruned:
        reduced = model.forward_features(x)
    keep = pruned.plan.keep
    P = model.num_prefix_tokens
    tokens = model.patch_embed(x)
    rope = None
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(tokens)
    else:
        tokens = model._pos_embed(tokens)
    hidden = model.norm_pre(tokens)
    for layer, block in enumerate(model.blocks):
        table = rope[layer] if getattr(model, "rope_mixed", False) else rope
        options = {} if rope is None else {"rope": table if layer == 0 else table[..., keep[0, P:] - P, :]}
        if layer == 0:  # attention sees everything, the feed-forward only what is left
            scale = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
            branch = block.attn(block.norm1(hidden), **options)
            hidden = (hidden + (branch if scale[0] is None else scale[0] * branch))[:, keep[0]]
            branch = block.mlp(block.norm2(hidden))
            hidden = hidden + (branch if scale[1] is None else scale[1] * branch)
        else:
            hidden = block(hidden, **options)
    torch.testing.assert_close(reduced, model.norm(hidden), atol=1e-5, rtol=1e-4)


def test_restored_tokens_repeat_what_each_patch_was_merged_into():
    model, x = build("plain"), images()
    with vistok.prune(model, "tome", keep_ratio=0.5) as pruned:
        tokens = model.forward_features(x)
        full = pruned.restore(tokens)
    assert tokens.shape[1] == 9 and full.shape[1] == 17
    assert torch.equal(full, tokens.gather(1, pruned.plan.owner[..., None].expand(-1, -1, 32)))
    assert torch.equal(pruned.size[..., 0].sum(dim=1), torch.full((2,), 17.0))


def test_an_image_does_not_depend_on_its_batch():
    model, x = build("plain"), images(3)
    for method in ("tome", "pitome", "zero_tprune", "cls"):
        with vistok.prune(model, method, **({"num_similar": 2} if method == "zero_tprune" else {"keep": 6})):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-4, rtol=1e-4)


def test_an_exception_inside_takes_the_hooks_off():
    model, x = build("mean pooling"), images()
    expected = model(x)
    with pytest.raises(KeyError), vistok.prune(model, "tome", r=2):
        raise KeyError
    assert torch.equal(model(x), expected) and "pool" not in model.__dict__
    with pytest.raises(ValueError, match="metric="), vistok.prune(model, "tome", r=2, metric="values"):
        model(x)
    assert torch.equal(model(x), expected)


def test_a_second_pruning_of_one_model_is_refused_until_the_first_is_removed():
    model = build("plain")
    first = vistok.prune(model, "tome", r=2)
    with pytest.raises(ValueError, match="already pruned"):
        vistok.prune(model, "pitome", keep=7)
    first.remove()
    first.remove()
    vistok.prune(model, "pitome", keep=7).remove()


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
def test_blocks_that_cannot_be_reduced_are_named(block):
    with pytest.raises(ValueError, match=block.__name__):
        vistok.prune(VisionTransformer(**SMALL, block_fn=block), "tome", r=2)


def test_models_that_are_no_plain_vit_are_refused():
    for model in (timm.create_model("resnet18"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="not supported"):
            vistok.prune(model, "tome", r=2)


def test_wrong_options_say_what_is_allowed():
    model = build("mean pooling")
    with pytest.raises(ValueError, match="there are tome"):
        vistok.prune(model, "merge", r=2)
    with pytest.raises(ValueError, match="exactly one"):
        vistok.prune(model, "tome", r=2, keep=3)
    with pytest.raises(ValueError, match="at most half"):
        vistok.prune(model, "pitome", layer_keep_ratio=0.3)
    with pytest.raises(ValueError, match="class token"), vistok.prune(model, "cls", r=2):
        model(images())
    with pytest.raises(RuntimeError, match="no forward"):
        vistok.prune(build("plain"), "tome", r=2).stats()


def test_masks_are_refused_rather_than_applied_to_merged_tokens():
    model = build("plain")
    with vistok.prune(model, "tome", r=2), pytest.raises(ValueError, match="attn_mask"):
        model(images(), attn_mask=torch.zeros(17, 17))


def test_training_through_a_reduced_model_gives_the_same_gradients_with_checkpointing():
    model, x = build("plain"), images()
    gradients = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)
        model.zero_grad()
        with vistok.prune(model, "tome", r=3):
            model(x).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_a_reduced_model_compiles_to_one_graph():
    torch.compiler.reset()
    model, x = build("plain"), images()
    with torch.no_grad(), vistok.prune(model, "tome", keep_ratio=0.5):
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_selections_ignore_the_order_of_the_tokens():
    torch.manual_seed(0)
    features, relevance, shuffle = torch.randn(2, 20, 8), torch.rand(2, 20), torch.randperm(20)
    for select in (lambda x, r: divprune(x, 6), lambda x, r: cdpruner(x, r, 6), lambda x, r: dart(x, r, 6)):
        chosen = select(features, relevance)
        again = shuffle[select(features[:, shuffle], relevance[:, shuffle])]
        assert torch.equal(chosen.sort(dim=1).values, again.sort(dim=1).values)
        assert all(len(set(row.tolist())) == 6 for row in chosen)


def test_cdpruner_maximises_the_determinant_greedily():
    torch.manual_seed(0)
    features, relevance = torch.nn.functional.normalize(torch.randn(1, 10, 6), dim=-1), torch.rand(1, 10)
    kernel = (relevance[:, :, None] * (features @ features.transpose(1, 2)) * relevance[:, None])[0].double()
    chosen = []
    for _ in range(4):
        gains = {j: torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]) for j in range(10) if j not in chosen}
        chosen.append(max(gains, key=gains.get))
    assert cdpruner(features, relevance, 4)[0].tolist() == chosen


def test_relevance_is_scaled_in_each_image_on_its_own():
    torch.manual_seed(0)
    image, text = torch.randn(2, 9, 4), torch.randn(3, 4)
    both = text_relevance(image, text)
    assert torch.equal(both[:1], text_relevance(image[:1], text)) and both.max() <= 1.0001 and both.min() > 0


def test_prumerge_keeps_more_with_the_grid_and_refuses_batches():
    torch.manual_seed(0)
    x, q, k = torch.randn(3, 1, 65, 8).unbind()
    few, many = prumerge(x, q, k, keep_ratio=0.1), prumerge(x, q, k, keep_ratio=0.1, is_plus=True)
    assert few.shape == (1, 7, 8) and many.shape[1] > few.shape[1]
    with pytest.raises(ValueError, match="image by image"):
        prumerge(x.expand(2, -1, -1), q, k)


def test_vscan_keeps_the_same_number_in_every_window_and_averages_the_rest():
    torch.manual_seed(0)
    shallow, deep, features = torch.rand(1, 144), torch.zeros(1, 144), torch.randn(1, 144, 4)
    local = vscan_mask(shallow, deep, 16, window=6)
    assert int(local.sum()) == 16
    windows = local[0].view(2, 6, 2, 6).sum(dim=(1, 3))
    assert windows.min() >= 2
    merged = vscan_merge(features, local)
    assert merged.shape == (1, 16, 4)
    torch.testing.assert_close(vscan_merge(features[:, :, :1].abs() * 0 + 3.0, local), torch.full((1, 16, 1), 3.0))


def test_flowcut_prunes_more_where_the_class_token_has_made_up_its_mind():
    even, sharp = torch.ones(1, 64), torch.eye(64)[:1] + 1e-4
    assert flowcut_count(even, 4, 16) == [0] and flowcut_count(sharp, 4, 16)[0] > 20
    score = flowcut_score(sharp, even, torch.ones(1, 64, 3))
    assert score.argmax() == 0 and torch.equal(flowcut_score(sharp, even, torch.ones(1, 64, 3), score), score)


def test_fastv_reads_one_row_and_keeps_half_to_even():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    whole = (query @ key.transpose(2, 3) / 2).softmax(dim=-1)
    score = fastv_score(query_attention(query[:, :, -1:], key)[:, :, 0], slice(1, 5))
    torch.testing.assert_close(score, whole.mean(dim=1)[:, -1, 1:5])
    assert [count_to_keep(n, keep_ratio=0.5) for n in (3, 5, 576)] == [1, 3, 288] and pyramiddrop_counts(576) == (288, 144, 72)


def test_uniform_scores_mark_as_many_tokens_as_asked():
    for keep in range(1, 18):
        assert uniform_score(1, 17, keep).sum() == keep


def test_page_rank_conserves_votes_and_the_head_filter_falls_back_to_all():
    torch.manual_seed(0)
    attention = torch.randn(2, 3, 9, 9).softmax(dim=-1)
    score = page_rank(attention, num_iterations=7)
    torch.testing.assert_close(score.mean(dim=-1), torch.ones(2, 3))
    stationary = page_rank(attention, num_iterations=200)
    torch.testing.assert_close(torch.einsum("bhj,bhji->bhi", stationary, attention), stationary)
    torch.testing.assert_close(head_mean(score, variance=(5.0, 6.0)), head_mean(score, variance=None))


def test_page_rank_of_survivors_is_page_rank_on_their_own_graph():
    torch.manual_seed(0)
    attention, alive = torch.randn(1, 2, 8, 8).softmax(dim=-1), torch.tensor([[True, True, False, True, False, True, True, True]])
    graph = attention[:, :, alive[0]][..., alive[0]]
    expected = page_rank(graph / graph.sum(dim=-1, keepdim=True), num_iterations=5, is_uniform=True)
    score = page_rank(attention, num_iterations=5, is_uniform=True, alive=alive)
    torch.testing.assert_close(score[..., alive[0]], expected)
    assert (score[..., ~alive[0]] == 0).all()


def test_zero_tprune_keeps_the_prefix_and_the_count():
    torch.manual_seed(0)
    attention, key = torch.randn(2, 3, 18, 18).softmax(dim=-1), torch.randn(2, 3, 18, 4)
    for keep in (16, 9, 1):
        plan = zero_tprune(attention, key, keep, num_similar=4, num_prefix=2)
        assert plan.num_kept == keep + 2 and plan.keep[:, :2].tolist() == [[0, 1], [0, 1]]
        assert (plan.keep.diff(dim=1) > 0).all()


def test_backbones_are_made_by_timm_and_tell_what_they_cannot_do():
    import vistok.pruning.backbones  # noqa: F401

    model = timm.create_model("raftmlp_s", num_classes=3, img_size=64, drop_path_rate=0.0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    strip = timm.create_model("stripmlp_t_light", num_classes=3, img_size=32).eval()
    assert strip(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="32 x 32"):
        strip(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TypeError, match="unknown options"):
        timm.create_model("raftmlp_s", depth=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [("raftmlp_s", 9.87), ("raftmlp_m", 21.41), ("raftmlp_l", 36.18), ("stripmlp_t_light", 18.24), ("stripmlp_b", 57.22)],
)
def test_published_sizes(name, millions):
    import vistok.pruning.backbones  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
