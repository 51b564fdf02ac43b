"""The claims of the tokenizers: sizes, verdicts, likelihoods; and the script from end to end, and again without training."""

import itertools
import json
import math

import pytest
import torch

import vistok
from eval.claims import tokenizers
from eval.claims import tokenizers_report as report
from eval.claims.likelihood import measure_likelihood
from eval.claims.tokenizers_models import MODELS, vae_task
from eval.claims.verdicts import FAILS, HOLDS, UNDECIDED, all_of, judge
from vistok.image import to_pil


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    vae = vae_task().model
    return {name: entry.build(10, vae if entry.needs_vae else None).model.eval() for name, entry in MODELS.items()}


def test_the_models_have_one_size_one_codebook_and_the_tokens_they_say(models):
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    assert max(sizes.values()) <= tokenizers.TOLERANCE * min(sizes.values()), sizes
    assert {model.codebook_size for model in models.values()} == {1024, 1000}
    assert {name: model.max_tokens for name, model in models.items()} == {
        "vq": 64, "titok": 32, "flextok": 32, "seed": 32, "lavit": 64, "lavit-fixed": 64, "tokenflow": 85, "tokenflow-single": 85,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vq", "tokenflow-single"])
def test_the_models_of_the_comparison_save_and_load(models, name, tmp_path):
    model, images = models[name], torch.rand(2, 3, 64, 64) * 2 - 1
    model.save_pretrained(tmp_path)
    again, tokens = vistok.load(tmp_path), model.encode(images)
    assert type(again) is type(model) and torch.equal(again.encode(images).ids, tokens.ids)
    assert torch.equal(again.decode(tokens), model.decode(tokens)) and model.decode(tokens).shape == images.shape


def test_a_single_codebook_has_one_unit_code_and_a_pair_has_two(models):
    ids = torch.arange(6)
    single, pair = models["tokenflow-single"].embed(ids), models["tokenflow"].embed(ids)
    torch.testing.assert_close(single.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(pair[:, :16].norm(dim=1), torch.ones(6))
    torch.testing.assert_close(pair[:, 16:].norm(dim=1), torch.ones(6))


def test_a_verdict_needs_twice_the_spread():
    assert judge("x", [3.0, 3.2, 2.8], [1.0, 1.0, 1.0]).verdict == HOLDS
    assert judge("x", [3.0, 1.0, 0.5], [1.0, 1.0, 1.0]).verdict == UNDECIDED
    assert judge("x", [1.0, 1.1], [3.0, 3.1]).verdict == FAILS
    assert judge("x", [2.0], [1.0], test_stds=(0.4, 0.4)).verdict == UNDECIDED
    near = judge("x", [1.0, 1.01], [1.2, 1.21], bar=-0.5)
    assert near.verdict == HOLDS and near.spread == pytest.approx(0, abs=1e-9)
    assert "1 seed" in judge("x", [2.0], [1.0]).line()
    with pytest.raises(ValueError, match="same seeds"):
        judge("x", [1.0], [])


def test_a_claim_of_parts_fails_with_one_and_holds_with_all():
    holds, fails, open_ = judge("x", [1.0], [0.0]), judge("x", [0.0], [1.0]), judge("x", [0.0], [0.0], test_stds=(1.0, 0.0))
    assert all_of([holds, holds]) == HOLDS and all_of([holds, open_]) == UNDECIDED and all_of([holds, open_, fails]) == FAILS


def result(*, linear=0.5, psnr=20.0, tokens=64.0, told=0.1):
    row = {"linear": linear, "linear_std": 0.001, "knn": 0.5, "r5_std": 0.001}
    row |= {f"{way}_r{k}": linear / 2 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    return {
        "parameters": 10**6, "seconds": 60.0, "steps": 5, "tokens": tokens, "bits_per_image": 640.0, "psnr": psnr,
        "psnr_of_images": [psnr - 1, psnr + 1],
        "frechet": 1.0, "usage": 0.5, "perplexity": 9.0, "order": "x", "understanding": row, "fixed": {"8": {"psnr": 1.0}},
        "likelihood": {"bits_per_token": 8.0, "bits_per_image": 512.0, "told": told, "told_std": 0.001, "unigram_bits": 9.0, "steps": 3},
    }  # fmt: skip


def test_the_verdicts_follow_from_the_numbers():
    results = {
        "tokenflow": {"0": result(linear=0.7)},
        "tokenflow-single": {"0": result(linear=0.5)},
        "vq": {"0": result()},
        "seed": {"0": result(told=0.3, linear=0.7)},
        "flextok": {"0": result(told=0.05, linear=0.7)},
        "lavit": {"0": result(tokens=20.0, psnr=19.9)},
        "lavit-fixed": {"0": result(psnr=20.0)},
    }
    claims = report.verdicts(results)
    assert {key: claim["verdict"] for key, claim in claims.items()} == {"a": HOLDS, "b": FAILS, "c": HOLDS}
    results["lavit"]["0"]["tokens"] = 40.0
    results["tokenflow"]["0"] = result(linear=0.7, psnr=18.0)
    worse = report.verdicts(results)
    assert worse["c"]["verdict"] == FAILS and worse["a"]["verdict"] == FAILS
    assert set(report.verdicts({"vq": results["vq"]})) == set()


def ticks():
    """A clock that moves on by one a call, so that tests take as many steps on any machine."""
    return itertools.count().__next__


def test_a_pattern_is_told_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(16, (200, 1), generator=generator)
    pattern = (first + torch.arange(12)) % 16
    noise = torch.randint(16, (200, 12), generator=generator)
    told = [measure_likelihood(ids[:150], ids[150:], codebook_size=16, seconds=40, seed=0, clock=ticks()) for ids in (pattern, noise)]
    assert told[0].told > 0.5 > 0.1 > told[1].told and told[1].bits_per_token == pytest.approx(4, abs=0.6)
    assert told[0].unigram == pytest.approx(4, abs=0.1) and told[0].steps == 39


def test_padding_costs_no_bits():
    ids = torch.randint(8, (60, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = -1
    told = measure_likelihood(ids[:40], ids[40:], codebook_size=8, seconds=5, seed=0, clock=ticks())
    assert told.counts.tolist() == [6.0] * 20 and told.bits_per_image == pytest.approx(6 * told.bits_per_token)
    assert math.isfinite(told.told_std())


def photos(folder):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 12)):
        for i in range(count):
            home = folder / split / ("dark", "light")[i % 2]
            home.mkdir(parents=True, exist_ok=True)
            image = 0.4 * (torch.rand(1, 3, 64, 64, generator=generator) - 0.5) + (i % 2) - 0.5
            to_pil(image.clamp(-1, 1))[0].save(home / f"{i}.png")
            (home / f"{i}.txt").write_text(f"number {i % 7}, {('dark', 'light')[i % 2]}")
    return folder


@pytest.mark.slow
def test_the_script_trains_measures_judges_and_goes_on_where_it_was(tmp_path):
    options = dict(data=str(photos(tmp_path / "photos")), minutes=0.001, gpt_seconds=0.2, device="cpu")
    tokenizers.main(tokenizers.Config(out=tmp_path / "out", models=("lavit", "lavit-fixed", "seed"), **options))
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(first["results"]) == {"lavit", "lavit-fixed", "seed"} and set(first["claims"]) == {"c"}
    assert first["results"]["lavit-fixed"]["0"]["tokens"] == 64 and "text_space" in first["results"]["seed"]["0"]
    tokenizers.main(tokenizers.Config(out=tmp_path / "out", models=("lavit", "lavit-fixed", "seed"), **options))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == first["results"]
    with pytest.raises(SystemExit, match="use another --out"):
        tokenizers.main(tokenizers.Config(out=tmp_path / "out", models=("seed",), **{**options, "minutes": 0.002}))


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no model 'vqgan'"):
        tokenizers.main(tokenizers.Config(out=tmp_path, models=("vqgan",)))
