import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from vistok.pruning.blocks import parts_of
from vistok.pruning.cost import ViTCost
from vistok.pruning.methods.diffrate import PRESETS, diffrate, diffrate_counts
from vistok.pruning.methods.diversity import cdpruner, dart, divprune, text_relevance
from vistok.pruning.methods.pitome import energy
from vistok.pruning.methods.tome import even_schedule
from vistok.pruning.methods.topk import count_to_keep, fastv_score, pyramiddrop_counts, query_attention, uniform_score
from vistok.pruning.methods.vision_attention import flowcut_count, flowcut_score, prumerge, vscan_mask, vscan_merge
from vistok.pruning.methods.zero_tprune import head_mean, page_rank, zero_tprune
from vistok.pruning.strategies import ZeroTPrune, create_strategy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 300), st.integers(1, 300))
def test_an_even_schedule_ends_at_the_number_asked_for_or_says_it_cannot(layers, patches, keep):
    if keep > patches or math.ceil(patches / 2**layers) > keep:
        with pytest.raises(ValueError, match="keep="):
            even_schedule(layers, patches, keep)
    else:
        schedule = even_schedule(layers, patches, keep)
        assert patches - sum(schedule) == keep and min(schedule) >= 0


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


def test_diffrate_drops_what_the_class_token_ignores_and_folds_the_next():
    torch.manual_seed(0)
    score, metric = torch.rand(2, 10), torch.randn(2, 11, 4)
    plan = diffrate(score, metric, 7, 4)
    order = score.argsort(dim=1, descending=True)
    for row in range(2):
        assert set((plan.keep[row, 1:] - 1).tolist()) == set(order[row, :4].tolist()) and plan.keep[row, 0] == 0
        assert set((plan.source[row] - 1).tolist()) == set(order[row, 4:7].tolist())
        assert set((plan.owner[row] < 0).nonzero()[:, 0].tolist()) == {number + 1 for number in order[row, 7:].tolist()}
        kept = torch.nn.functional.normalize(metric[row, plan.keep[row, 1:]], dim=-1)
        nearest = (torch.nn.functional.normalize(metric[row, plan.source[row]], dim=-1) @ kept.T).argmax(dim=1) + 1
        assert torch.equal(plan.slot[row], nearest)
    assert diffrate(score, metric, 4, 4).source is None
    with pytest.raises(ValueError, match="merged=5"):
        diffrate(score, metric, 4, 5)


def test_a_diffrate_preset_has_its_published_cost_and_shrinks_to_other_models():
    model = timm.create_model("deit_small_patch16_224")
    strategy = create_strategy("diffrate")
    counts = [197]
    for removed in strategy.counts(12, 196):
        counts.append(counts[-1] - removed)
    assert counts[1:] == list(PRESETS["deit-small-2.9g"][1])
    assert ViTCost.of(parts_of(model)).macs(counts, at_block_end=False) / 1e9 == pytest.approx(2.9, abs=0.05)
    small = diffrate_counts("deit-small-2.9g", 3, 16)
    assert small[0] == (16, 16) and all(1 <= merged <= pruned for pruned, merged in small)
    with pytest.raises(ValueError, match="preset="):
        diffrate_counts("deit-small-1g", 12, 196)


def test_zero_tprune_reads_the_map_that_the_block_makes_itself():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2).eval()
    x, seen = torch.randn(1, 3, 32, 32), []

    class Spy(ZeroTPrune):
        def plan(self, view, count):
            seen.append((view.attention(), view.query, view.key))
            return super().plan(view, count)

    with vistok.prune(model, Spy(rates={1: 0.5}, num_similar=0)):
        assert not model.blocks[1].attn.fused_attn and model.blocks[0].attn.fused_attn
        model(x)
    assert model.blocks[1].attn.fused_attn
    attention, query, key = seen[0]
    torch.testing.assert_close(attention, (query @ key.transpose(2, 3) * 16**-0.5).softmax(dim=-1))


def test_energy_of_half_the_pairs_is_energy_of_all():
    torch.manual_seed(0)
    metric = torch.nn.functional.normalize(torch.randn(2, 9, 5), dim=-1)
    for margin, alpha in ((0.4, 1.0), (0.9, 0.5)):
        whole = torch.nn.functional.elu(metric @ metric.transpose(1, 2) - margin, alpha=alpha).mean(dim=-1)
        torch.testing.assert_close(energy(metric, margin, alpha), whole)
