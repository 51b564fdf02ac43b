"""Quantizers made of quantizers, the peer's results, and two processes."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from vistok.quantizers import (
    FSQ,
    LFQ,
    VQ,
    CodeGroup,
    FSQConfig,
    LFQConfig,
    MultiScaleResidual,
    PhiConvs,
    ResidualVQ,
    ResidualVQConfig,
    VQConfig,
)
from vistok.quantizers.groups import normalize_groups
from vistok.quantizers.phi import phi_of_scales
from vistok.quantizers.sync import draw_vectors

TOKENFLOW = (CodeGroup(dim=5, metric="cosine"), CodeGroup(dim=3, metric="cosine"))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# groups that share one index


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("metrics", [("cosine", "cosine"), ("cosine", "euclidean"), ("euclidean", "euclidean")])
def test_groups_choose_one_index_by_their_weighted_sum_of_distances(weights, metrics):
    groups = tuple(CodeGroup(dim=d, weight=w, metric=m) for d, w, m in zip((5, 3), weights, metrics))
    vq, z = VQ(VQConfig(codebook_size=40, code_dim=8, groups=groups)), noise(60, 8)
    vq.set_codebook(noise(40, 8, seed=1))
    distance = torch.zeros(60, 40)
    for part, codes, weight, metric in zip(z.split((5, 3), 1), vq.codebook.detach().split((5, 3), 1), weights, metrics):
        part, codes = (F.normalize(x, dim=1) if metric == "cosine" else x for x in (part, codes))
        distance += weight * torch.cdist(part, codes).square()
    out = vq(z)
    assert torch.equal(out.ids, distance.argmin(1))
    for half, metric in zip(out.codes.split((5, 3), 1), metrics):
        if metric == "cosine":
            torch.testing.assert_close(half.norm(dim=1), torch.ones(60))


def test_groups_that_do_not_fill_the_vector_and_impossible_groups_are_refused():
    with pytest.raises(ValueError, match=r"code_dim 9.*\[5, 3\]"):
        VQConfig(code_dim=9, groups=TOKENFLOW)
    for bad in ({"dim": 0}, {"dim": 2, "weight": 0.0}, {"dim": 2, "metric": "dot"}):
        with pytest.raises(ValueError):
            CodeGroup(**bad)


# LFQ and BSQ


@pytest.mark.parametrize("spherical", [False, True])
def test_each_sign_is_a_bit_and_ids_become_codes_and_back(spherical):
    lfq = LFQ(LFQConfig(bits=6, spherical=spherical))
    codes = lfq.decode(torch.arange(64))
    assert torch.equal(lfq.nearest(codes), torch.arange(64)) and codes[1, 0] > 0 and (codes[1, 1:] < 0).all()
    z = noise(50, 6).requires_grad_()
    out = lfq(z)
    torch.testing.assert_close(out.codes, lfq.decode(out.ids))
    assert torch.equal(out.ids, torch.cdist(lfq.place(z), codes).argmin(1))
    if spherical:
        torch.testing.assert_close(out.codes.norm(dim=1), torch.ones(50))
    out.loss.backward()
    assert z.grad.isfinite().all()


def test_joint_bits_below_the_width_bound_the_evenness_from_above_and_keep_the_certainty():
    z = noise(200, 6)
    exact, split = (LFQ(LFQConfig(bits=6, joint_bits=j, entropy_temperature=2.0)) for j in (6, 2))
    certain = [LFQ(LFQConfig(bits=6, joint_bits=j, entropy_temperature=2.0, diversity=0.0))._entropy(z).item() for j in (6, 2)]
    assert certain[0] == pytest.approx(certain[1], rel=1e-4)
    assert split._entropy(z) < exact._entropy(z)


def test_bits_and_ids_outside_the_range_are_refused():
    for bad in ({"bits": 0}, {"bits": 63}, {"joint_bits": 30}):
        with pytest.raises(ValueError):
            LFQConfig(**bad)
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        LFQ(LFQConfig(bits=4)).decode(torch.tensor([16]))


# residual


@pytest.mark.parametrize("shared", [False, True])
def test_every_further_level_brings_the_codes_nearer(shared):
    rvq = ResidualVQ(
        ResidualVQConfig(num_levels=4, vq=VQConfig(codebook_size=64, code_dim=4, update="ema", kmeans_iterations=5), shared=shared)
    )
    z = noise(8, 32, 4)
    for _ in range(3):
        rvq(z)
    out = rvq.eval()(z)
    assert out.ids.shape == (8, 32, 4)
    errors = [F.mse_loss(rvq.decode(out.ids[..., : n + 1]), z).item() for n in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0] if not shared else errors[3] <= errors[0]
    torch.testing.assert_close(rvq.decode(out.ids), out.codes, rtol=0, atol=1e-6)


def test_the_gradient_reaches_the_vectors_once_whatever_the_number_of_levels():
    rvq, z = ResidualVQ(ResidualVQConfig(num_levels=5, vq=VQConfig(codebook_size=16, code_dim=4))), noise(3, 4).requires_grad_()
    rvq(z).codes.sum().backward()
    assert torch.equal(z.grad, torch.ones(3, 4))


@pytest.mark.parametrize("shared", [False, True])
def test_an_image_with_fewer_levels_is_the_full_one_cut_short(shared):
    config = ResidualVQConfig(num_levels=3, vq=VQConfig(codebook_size=16, code_dim=4, update="ema", revive_after=2), shared=shared)
    rvq, z = ResidualVQ(config), noise(4, 5, 4)
    full = rvq.eval()(z)
    cut = rvq(z, depths=torch.tensor([1, 3, 2, 1]))
    for i, depth in enumerate((1, 3, 2, 1)):
        assert torch.equal(cut.ids[i, :, :depth], full.ids[i, :, :depth]) and (cut.ids[i, :, depth:] == -1).all()
    torch.testing.assert_close(rvq.decode(cut.ids), cut.codes, rtol=0, atol=1e-6)
    for depths in ([1, 3, 2, 1], [1, 1, 1, 1]):
        assert rvq.train()(z, depths=torch.tensor(depths)).loss.isfinite()


# several scales


def build_scales(**options) -> MultiScaleResidual:
    vq = VQ(VQConfig(codebook_size=64, code_dim=8, groups=TOKENFLOW, **options))
    return MultiScaleResidual(vq, [(1, 1), (2, 2), (4, 4)])


def test_the_scales_add_up_and_a_prefix_decodes():
    scales, h = build_scales(), noise(2, 8, 4, 4)
    out = scales.eval()(h)
    assert out.ids.shape == (2, 21)
    torch.testing.assert_close(scales.decode(out.ids), out.total, rtol=0, atol=1e-5)
    torch.testing.assert_close(scales.decode(out.ids[:, :5]), scales(h, num_scales=2).total, rtol=0, atol=1e-5)
    torch.testing.assert_close(scales.totals(out.ids)[-1], out.total, rtol=0, atol=1e-5)
    assert torch.equal(scales.encode(h).ids, out.ids)
    with pytest.raises(ValueError, match="1, 5, 21"):
        scales.decode(out.ids[:, :6])


def test_the_direct_and_the_progressive_way_up_are_not_interchangeable():
    scales = build_scales()
    ids = scales.eval()(noise(2, 8, 4, 4)).ids
    first, second = scales.next_scale_inputs(ids)
    maps = scales.maps(ids)
    torch.testing.assert_close(first, F.interpolate(maps[0], size=(2, 2), mode="bicubic"))
    torch.testing.assert_close(second, F.interpolate(first + maps[1], size=(4, 4), mode="bicubic"))
    finer = MultiScaleResidual(scales.quantizer, [(1, 1), (2, 2), (3, 3), (5, 5)])
    ids = finer.eval()(noise(2, 8, 5, 5)).ids
    assert not torch.allclose(finer.next_scale_inputs(ids[:, :14])[-1], finer.decode(ids[:, :14]), atol=1e-3)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_one_training_step_moves_the_codebook_once_by_all_scales(update):
    scales, h = build_scales(update=update, kmeans_iterations=2, revive_after=5), noise(4, 8, 4, 4)
    scales(h, dropped=1)
    assert int(scales.quantizer.steps) == 1 and int(scales.quantizer._hits.sum()) == 4 * (1 + 16)
    out = scales(h.requires_grad_())
    assert int(scales.quantizer.steps) == 2 and int(scales.quantizer._hits.sum()) == 4 * (1 + 16 + 21)
    sum(out.losses.values(), out.total.sum()).backward()
    assert h.grad.isfinite().all()


def test_half_precision_features_get_the_ids_of_float32_on_every_scale():
    scales, h = build_scales().eval(), noise(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = scales(h)
    assert out.total.dtype == torch.bfloat16 and torch.equal(out.ids, scales(h.float()).ids)


def test_what_a_code_leaves_of_the_vector_it_was_placed_on_gets_no_gradient():
    groups = (CodeGroup(dim=4, metric="cosine"), CodeGroup(dim=2, metric="cosine"))
    vectors = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    vectors[0] = 0  # the rest after an exact code
    vectors[1, 4:] *= 1e-9
    vectors.requires_grad_()
    units = normalize_groups(vectors, groups)
    assert torch.equal(units, torch.cat([F.normalize(part, dim=-1) for part in vectors.detach().split([4, 2], -1)], -1))
    (units * torch.arange(6.0)).sum().backward()
    assert not vectors.grad[0].any() and not vectors.grad[1, 4:].any()
    assert vectors.grad[1, :4].all() and vectors.grad[2].all() and vectors.grad.abs().max() < 100


def test_phis_are_shared_partly_shared_or_one_a_scale():
    assert phi_of_scales(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scales(5, 3) == (0, 0, 1, 2, 2) and phi_of_scales(5, 1) == (0,) * 5
    assert [len(PhiConvs(4, 6, count=n).convs) for n in (1, 4, 0)] == [1, 4, 6]
    with pytest.raises(ValueError, match="table"):
        PhiConvs(4, 3, count=2, table=(0, 1, 2))
    phi, x = PhiConvs(4, 3, count=0, ratio=0.5), noise(1, 4, 5, 5)
    torch.testing.assert_close(phi(x, 2), 0.5 * x + 0.5 * phi.convs[2](x))


# the peer


@pytest.fixture
def peer():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_an_ema_step_equals_the_peers(peer, metric):
    theirs = peer.VectorQuantize(
        dim=6, codebook_size=32, decay=0.9, commitment_weight=0.25, use_cosine_sim=metric == "cosine", rotation_trick=False
    )
    ours = VQ(VQConfig(codebook_size=32, code_dim=6, metric=metric, update="ema", ema_decay=0.9))
    start = noise(32, 6, seed=4)
    start = F.normalize(start, dim=1) if metric == "cosine" else start
    ours.set_codebook(start)
    theirs._codebook.embed.data.copy_(start[None])
    theirs._codebook.embed_avg.data.copy_(start[None])
    for step in range(3):
        z = noise(4, 25, 6, seed=step)
        z = F.normalize(z, dim=-1) if metric == "cosine" else z
        quantized, ids, loss = theirs(z)
        out = ours(z)
        assert torch.equal(out.ids, ids)
        torch.testing.assert_close(out.codes, quantized, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss, loss.squeeze(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], rtol=1e-4, atol=1e-5)


def test_the_rotation_trick_equals_the_peers(peer):
    theirs = peer.VectorQuantize(dim=6, codebook_size=32, rotation_trick=True, commitment_weight=0.0).train()
    ours = VQ(VQConfig(codebook_size=32, code_dim=6, update="ema", gradient="rotation"))
    ours.set_codebook(theirs._codebook.embed[0])
    z, other, weight = noise(3, 7, 6).requires_grad_(), noise(3, 7, 6).requires_grad_(), noise(3, 7, 6, seed=1)
    (ours(z).codes * weight).sum().backward()
    (theirs(other)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_fsq_codes_equal_the_peers(peer):
    z = noise(2, 30, 3) * 2
    theirs, ours = peer.FSQ(levels=[8, 5, 4]), FSQ(FSQConfig(levels=(8, 5, 4)))
    quantized, ids = theirs(z)
    torch.testing.assert_close(ours(z).codes, quantized, rtol=0, atol=1e-6)
    assert torch.equal(ours(z).ids, ids.long())


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_codes_and_entropy_equal_the_peers(peer, spherical):
    theirs = peer.LFQ(
        dim=6, codebook_size=64, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=1.5, spherical=spherical
    ).train()
    ours = LFQ(LFQConfig(bits=6, spherical=spherical, entropy_weight=0.1, commitment_weight=0.25, diversity=1.5))
    z = noise(2, 40, 6) * 0.1
    quantized, ids, loss = theirs(z)
    out = ours(z)
    torch.testing.assert_close(out.codes, quantized, rtol=0, atol=1e-6)
    reversed_bits = [int(f"{int(i):06b}"[::-1], 2) for i in ids.flatten()]  # the peer's first channel is the highest bit
    assert reversed_bits == out.ids.flatten().tolist()
    assert out.loss.item() == pytest.approx(loss.item(), abs=2e-4)


def test_residual_codes_equal_the_peers(peer):
    theirs = peer.ResidualVQ(dim=6, num_quantizers=3, codebook_size=16).eval()
    ours = ResidualVQ(ResidualVQConfig(num_levels=3, vq=VQConfig(codebook_size=16, code_dim=6))).eval()
    for mine, other in zip(ours.levels, theirs.layers):
        mine.set_codebook(other._codebook.embed[0])
    z = noise(2, 20, 6)
    quantized, ids, _ = theirs(z)
    assert torch.equal(ours(z).ids, ids)
    torch.testing.assert_close(ours(z).codes, quantized, rtol=1e-4, atol=1e-5)


# two processes


def settings() -> list[VQConfig]:
    common = dict(codebook_size=48, code_dim=4, kmeans_iterations=3, revive_after=2)
    return [VQConfig(update="ema", **common), VQConfig(metric="cosine", update="ema", **common), VQConfig(**common)]


def steps(vq: torch.nn.Module, rank: int, world: int) -> None:
    """Five steps; the last global batch is uneven, and one vector is NaN."""
    module = getattr(vq, "module", vq)
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.1) if list(vq.parameters()) else None
    for step in range(5):
        z = noise(7 if step == 4 else 8, 5, 4, seed=step)
        if step == 1:
            z[3, 2, 1] = math.nan
        out = vq(z[rank::world])
        if optimizer is not None and step not in (1, 4):  # the mean over uneven or NaN shares is the trainer's business
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    module.result = (module.state_dict(), module.codebook_usage())


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for number, config in enumerate(settings()):
        torch.manual_seed(0)
        vq = VQ(config)
        steps(torch.nn.parallel.DistributedDataParallel(vq) if list(vq.parameters()) else vq, rank, 2)
        torch.save(vq.result, f"{folder}/{number}-{rank}.pt")
    assert draw_vectors(noise(3 + rank, 4), 100, seed=0).shape == (7, 4)
    assert draw_vectors(noise(2 * rank, 4), 100, seed=0).shape == (2, 4)  # one process has nothing
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_build_the_codebook_that_one_builds(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    for number, config in enumerate(settings()):
        torch.manual_seed(0)
        vq = VQ(config)
        steps(vq, 0, 1)
        (first, usage), (second, other) = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in range(2))
        assert usage == other == vq.result[1] and usage["usage"] > 0
        for name, alone in vq.result[0].items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name].double(), alone.double(), rtol=0, atol=1e-5, msg=f"{config.update} {name}")
