import math

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers import VQ, QuantizerOutput, VQConfig, nearest_codes
from vistok.quantizers.entropy import assignment_entropies

KINDS = [
    {},
    {"metric": "cosine"},
    {"update": "ema", "kmeans_iterations": 3, "revive_after": 2},
    {"update": "ema", "metric": "cosine"},
    {"update": "linear", "gradient": "rotation"},
    {"metric": "cosine", "unit_codes": False},
    {"gradient": "rotation", "entropy_weight": 0.1, "orthogonal_weight": 0.1, "revive_after": 1},
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(codebook_size=32, code_dim=6, **options) -> VQ:
    vq = VQ(VQConfig(codebook_size=codebook_size, code_dim=code_dim, **options))
    vq.set_codebook(noise(codebook_size, code_dim, seed=7))
    return vq


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_ids_decode_to_the_codes_and_codes_quantize_to_their_ids(options):
    vq = build(**options).eval()
    out = vq(noise(2, 5, 6))
    assert isinstance(out, QuantizerOutput) and out.ids.shape == (2, 5) and out.ids.dtype == torch.int64 and out.loss.shape == ()
    torch.testing.assert_close(vq.decode(out.ids), out.codes, rtol=0, atol=1e-6)
    assert torch.equal(vq.nearest(vq.decode(torch.arange(32))), torch.arange(32))
    torch.testing.assert_close(sum(out.terms.values()), out.loss)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("block_entries", [1, 100, 1 << 22])
def test_neighbours_are_those_of_the_full_distance_matrix(metric, block_entries):
    vectors, codes = noise(3, 17, 5), noise(40, 5, seed=1)
    unit = (lambda x: F.normalize(x, dim=-1)) if metric == "cosine" else (lambda x: x)
    order = torch.cdist(unit(vectors).view(-1, 5), unit(codes)).argsort(1).view(3, 17, 40)
    assert torch.equal(nearest_codes(vectors, codes, metric=metric, block_entries=block_entries), order[..., 0])
    assert torch.equal(nearest_codes(vectors, codes, metric=metric, k=7, block_entries=block_entries), order[..., :7])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_of_equal_codes_the_lowest_wins_in_long_codebooks_too(metric):
    codes = noise(3, 4).repeat(100, 1)
    assert nearest_codes(codes[:3], codes, metric=metric).tolist() == [0, 1, 2]


def test_bad_lookups_are_refused():
    with pytest.raises(ValueError, match="width 3"):
        nearest_codes(noise(2, 3), noise(5, 4))
    for k in (0, 6):
        with pytest.raises(ValueError, match=r"\[1, 5\]"):
            nearest_codes(noise(2, 4), noise(5, 4), k=k)
    with pytest.raises(ValueError, match="hamming"):
        nearest_codes(noise(2, 4), noise(5, 4), metric="hamming")
    assert nearest_codes(noise(0, 4), noise(5, 4)).shape == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_size": 0},
        {"metric": "dot"},
        {"update": "sgd"},
        {"gradient": "none"},
        {"update": "frozen", "revive_after": 3},
        {"ema_decay": 1.0},
    ],
)
def test_a_config_that_means_nothing_is_refused(options):
    with pytest.raises(ValueError):
        VQConfig(**options)


def test_ids_outside_the_codebook_and_foreign_codebooks_are_refused():
    for bad in (-1, 32):
        with pytest.raises(ValueError, match=r"\[0, 32\)"):
            build().decode(torch.tensor([bad]))
    with pytest.raises(ValueError, match=r"\(32, 6\)"):
        build().set_codebook(noise(31, 6))


def test_gradients_pass_straight_through_and_reach_only_the_chosen_codes():
    vq, z = build(), noise(4, 6).requires_grad_()
    weight = noise(4, 6, seed=2)
    out = vq(z)
    (out.codes * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert vq.codebook.grad is None
    vq(z).loss.backward()
    touched = vq.codebook.grad.abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(out.ids.tolist())


def test_the_loss_is_the_two_pulls_with_their_weights():
    vq, z = build(commitment_weight=0.25, codebook_weight=2.0), noise(9, 6)
    out = vq(z)
    error = F.mse_loss(vq.decode(vq.nearest(z)), z)
    assert out.terms["commitment"].item() == pytest.approx(0.25 * error.item()) and out.terms["codebook"].item() == pytest.approx(
        2 * error.item()
    )


def test_the_rotation_trick_gives_the_same_codes_and_turns_the_gradient_with_them():
    z, weight = noise(5, 6).requires_grad_(), noise(5, 6, seed=3)
    out = build(gradient="rotation")(z)
    torch.testing.assert_close(out.codes, build()(z).codes)
    (out.codes * weight).sum().backward()
    for i in range(5):  # the rotation in the plane of z and its code, written out in that plane's own axes
        e, q = F.normalize(z[i].detach(), dim=0), F.normalize(out.codes[i].detach(), dim=0)
        cos, axis = e @ q, F.normalize(q - (e @ q) * e, dim=0)
        sin = axis @ q
        inside = (cos - 1) * (torch.outer(e, e) + torch.outer(axis, axis)) + sin * (torch.outer(axis, e) - torch.outer(e, axis))
        stretch = out.codes[i].detach().norm() / z[i].detach().norm()
        torch.testing.assert_close(z.grad[i], stretch * (torch.eye(6) + inside).t() @ weight[i], rtol=1e-4, atol=1e-5)


def test_the_rotation_trick_survives_a_code_opposite_its_vector_and_a_zero_vector():
    vq = VQ(VQConfig(codebook_size=1, code_dim=3, gradient="rotation"))
    vq.set_codebook(torch.tensor([[1.0, 0, 0]]))
    z = torch.tensor([[-2.0, 0, 0], [0, 0, 0]]).requires_grad_()
    out = vq(z)
    out.codes.sum().backward()
    torch.testing.assert_close(out.codes, torch.tensor([[1.0, 0, 0]] * 2))
    assert z.grad.isfinite().all()


def test_simvq_trains_one_map_for_all_codes_and_leaves_the_drawn_codes():
    vq = VQ(VQConfig(codebook_size=16, code_dim=4, update="linear"))
    before = vq.codebook.clone()
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.5)
    z, moved = noise(64, 4), vq.vectors().clone()
    first = vq(z).terms["codebook"].item()
    for _ in range(20):
        optimizer.zero_grad()
        vq(z).loss.backward()
        optimizer.step()
    assert torch.equal(vq.codebook, before) and [name for name, _ in vq.named_parameters()] == ["projection"]
    assert vq(z).terms["codebook"].item() < first and ((vq.vectors() - moved).abs().sum(1) > 0).all()


def test_entropies_and_their_gradients_are_those_of_the_full_matrix():
    vectors, codes = noise(37, 4).requires_grad_(), noise(20, 4, seed=1).requires_grad_()
    log_p = (-torch.cdist(vectors, codes).square() / 0.5).log_softmax(1)
    mean = log_p.exp().mean(0)
    expected = [-(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()]
    got = assignment_entropies(vectors, codes, temperature=0.5, block_entries=60)
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, expected):
        for mine, other in zip(
            torch.autograd.grad(ours, (vectors, codes), retain_graph=True), torch.autograd.grad(theirs, (vectors, codes), retain_graph=True)
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_orthogonal_term_is_the_mean_square_cosine_of_all_pairs():
    vq = build(orthogonal_weight=1.0)
    cosines = F.normalize(vq.codebook.detach(), dim=1) @ F.normalize(vq.codebook.detach(), dim=1).t()
    assert vq(noise(3, 6)).terms["orthogonal"].item() == pytest.approx(cosines.square().mean().item() - 1 / 32, rel=1e-4)


def test_the_moving_average_is_van_den_oords():
    vq, z = build(update="ema", ema_decay=0.9), noise(200, 6)
    counts, sums, ids = torch.ones(32), vq.codebook.clone(), vq.nearest(z)
    one_hot = F.one_hot(ids, 32).float()
    counts, sums = 0.9 * counts + 0.1 * one_hot.sum(0), 0.9 * sums + 0.1 * one_hot.t() @ z
    assert torch.equal(vq(z).ids, ids)
    smoothed = (counts + 1e-5) / (counts.sum() + 32e-5) * counts.sum()
    torch.testing.assert_close(vq.codebook, sums / smoothed[:, None])


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_evaluation_changes_nothing(options):
    vq = build(**options).eval()
    before = {name: tensor.clone() for name, tensor in vq.state_dict().items()}
    vq(noise(8, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vq.state_dict().items())
    assert vq.codebook_usage() == {"usage": 0.0, "perplexity": 0.0}


def test_a_frozen_codebook_stays_and_only_pulls_the_vectors():
    vq, z = build(update="frozen"), noise(8, 6).requires_grad_()
    before = vq.codebook.clone()
    out = vq(z)
    out.loss.backward()
    assert torch.equal(vq.codebook, before) and not list(vq.parameters()) and set(out.terms) == {"commitment"} and z.grad.abs().sum() > 0


def test_kmeans_finds_the_clusters_of_the_first_batch_and_runs_once():
    centres = torch.tensor([[5.0, 0], [-5, 0], [0, 5], [0, -5]])
    z = (centres.repeat(50, 1) + 0.1 * noise(200, 2)).requires_grad_()
    vq = VQ(VQConfig(codebook_size=16, code_dim=2, kmeans_iterations=10))
    assert vq(z).terms["codebook"].item() < 0.01 and vq.started
    assert torch.cdist(centres, vq.codebook.detach()).min(1).values.max() < 0.2
    placed = vq.codebook.detach().clone()
    vq(z + 1)
    assert torch.equal(vq.codebook, placed)


def test_kmeans_with_fewer_vectors_than_codes_leaves_no_code_at_random():
    vq = VQ(VQConfig(codebook_size=64, code_dim=3, kmeans_iterations=2))
    z = noise(10, 3)
    vq(z)
    assert torch.cdist(vq.codebook.detach(), z).min(1).values.max() < 0.1


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_collapsed_book_is_above_half_use_in_200_steps(update):
    vq = VQ(VQConfig(codebook_size=64, code_dim=4, update=update, revive_after=20))
    vq.set_codebook(torch.ones(64, 4))
    optimizer = torch.optim.Adam(vq.parameters(), lr=1e-3) if update == "gradient" else None
    for step in range(200):
        if step == 150:
            vq.reset_usage()
        loss = vq(noise(16, 4, 4, seed=step)).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert vq.codebook_usage()["usage"] > 0.5 and vq.codebook_usage()["perplexity"] > 32


def test_without_revival_the_collapsed_book_stays_collapsed():
    vq = VQ(VQConfig(codebook_size=64, code_dim=4, update="ema"))
    vq.set_codebook(torch.ones(64, 4))
    for step in range(50):
        vq.reset_usage()
        vq(noise(16, 4, seed=step))
    assert vq.codebook_usage()["usage"] < 0.1


def test_usage_and_perplexity_count_the_training_vectors_since_the_reset():
    vq = build(codebook_size=4, code_dim=2, update="frozen")
    vq.set_codebook(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
    vq(torch.tensor([[2.0, 0], [2, 0], [-2, 0], [-2, 0]]))
    assert vq.codebook_usage() == {"usage": 0.5, "perplexity": pytest.approx(2.0)}
    vq.reset_usage()
    vq(torch.tensor([[0.0, 3]]))
    assert vq.codebook_usage() == {"usage": 0.25, "perplexity": pytest.approx(1.0)}


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_never_enters_the_codebook_and_leaves_its_neighbours_alone(options, bad):
    z = noise(6, 3, 6)
    z[2, 1, 3] = bad
    vq = build(**options)
    clean = vq.nearest(noise(6, 3, 6))
    ids = vq.nearest(z)
    assert torch.equal(ids.flatten()[torch.arange(18) != 7], clean.flatten()[torch.arange(18) != 7]) and 0 <= int(ids[2, 1]) < 32
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.1) if list(vq.parameters()) else None
    for _ in range(4):
        loss = vq(z.clone().requires_grad_()).loss
        assert not loss.isfinite()  # the trainer has to see it
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    assert all(tensor.isfinite().all() for tensor in vq.state_dict().values())


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_half_precision_vectors_get_the_ids_of_float32(options):
    vq, z = build(codebook_size=512, **options).eval(), noise(300, 6).bfloat16()
    expected = vq(z.float()).ids
    before = vq.codebook.clone()
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(z)
        assert torch.equal(out.ids, expected) and torch.equal(vq(z.float()).ids, expected)
    assert out.codes.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    vq.bfloat16()
    assert vq.codebook.dtype == torch.float32 and torch.equal(vq.codebook, before) and torch.equal(vq(z).ids, expected)


def test_a_restored_quantizer_goes_on_as_if_it_had_never_stopped():
    config = VQConfig(codebook_size=32, code_dim=4, update="ema", kmeans_iterations=3, revive_after=3)
    straight, stopped = VQ(config), VQ(config)
    for step in range(8):
        straight(noise(5, 4, 4, seed=step))
        if step == 4:
            stopped.load_state_dict(straight.state_dict())
        elif step > 4:
            stopped(noise(5, 4, 4, seed=step))
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), stopped.state_dict().values()))


def test_the_state_is_the_codebook_alone_unless_training_needs_more():
    assert list(VQ(VQConfig()).state_dict()) == list(VQ(VQConfig(update="frozen")).state_dict()) == ["codebook"]
