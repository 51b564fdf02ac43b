"""The two evaluations on tiny untrained models: what they measure, record and refuse, and that the scripts run."""

import json
import sys

import pytest
import torch

import vistok
from eval import generation, reconstruction
from vistok.metrics import ImagesInMemory, evaluate_generation, evaluate_reconstruction
from vistok.metrics.evaluate import as_saved, find_near_copies, psnr


@pytest.fixture(scope="module")
def flextok():
    torch.manual_seed(0)
    return vistok.create("flextok-tiny").eval()


@pytest.fixture(scope="module")
def fsq2d():
    torch.manual_seed(0)
    return vistok.create("fsq2d-tiny").eval()


def emoji(size, *, split="test"):
    return vistok.open_dataset("emoji", image_size=size, split=split)


def size_of(tokenizer):
    return tuple(tokenizer.config.get("image_size", (32, 32)))


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_nested_tokenizer_is_measured_at_every_asked_count_with_its_protocol(flextok):
    result = evaluate_reconstruction(
        flextok, emoji(size_of(flextok)), num_tokens=[4, 1], num_images=6, features="pixels:8", decode_options={"num_steps": 2}
    )
    assert [row["num_tokens"] for row in result.rows] == [1, 4]
    assert all(set(row) >= {"psnr", "ssim", "frechet", "kid", "nearest_is_right", "usage", "perplexity"} for row in result.rows)
    protocol = result.protocol
    assert (protocol.num_images, protocol.num_available, protocol.features) == (6, len(emoji(64)), "pixels:8")
    assert protocol.options["num_steps"] == 2 and protocol.options["guidance_scale"] == flextok.settings.decode_guidance_scale
    assert protocol.model_config["num_registers"] == flextok.max_tokens
    assert "Frechet(pixels:8)" in result.report() and "FID" not in result.report()


def test_an_evaluation_does_not_depend_on_its_batches(flextok):
    size = size_of(flextok)
    one, other = (
        evaluate_reconstruction(
            flextok, emoji(size), num_tokens=[2], num_images=5, batch_size=n, features="pixels:8", decode_options={"num_steps": 2}
        ).rows[0]
        for n in (5, 2)
    )
    for key in ("psnr", "ssim", "frechet", "perplexity", "nearest_is_right"):
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3)


def test_a_tokenizer_is_measured_at_other_sizes_than_its_own(flextok):
    options = {"num_steps": 1}
    result = evaluate_reconstruction(flextok, emoji((32, 48)), num_tokens=[2], num_images=3, features="pixels:8", decode_options=options)
    assert result.protocol.image_size == result.protocol.options["image_size"] == (32, 48)
    assert options == {"num_steps": 1}


def test_a_fixed_length_tokenizer_is_measured_at_its_only_count(fsq2d):
    dataset = emoji(size_of(fsq2d))
    result = evaluate_reconstruction(fsq2d, dataset, num_images=4, features="pixels:8")
    assert [row["num_tokens"] for row in result.rows] == [fsq2d.max_tokens]
    again = evaluate_reconstruction(fsq2d, dataset, num_images=4, features="pixels:8", num_tokens=[fsq2d.max_tokens])
    assert without_time(again.rows) == without_time(result.rows)
    with pytest.raises(ValueError, match="always makes"):
        evaluate_reconstruction(fsq2d, dataset, num_images=4, features="pixels:8", num_tokens=[1, 2])


def test_a_tokenizer_that_chooses_how_many_tokens_is_measured_at_those_it_chose():
    torch.manual_seed(0)
    model, images = vistok.create("lavit-tiny").eval(), as_saved(torch.rand(6, 3, 32, 32) * 2 - 1)
    torch.nn.init.normal_(model.selector.head[0].weight, std=1.0)
    torch.nn.init.normal_(model.selector.head[2].weight, std=1.0)
    model.calibrate(images, 0.5)
    tokens = model.encode(images)
    (row,) = evaluate_reconstruction(model, ImagesInMemory(images), features="pixels:8").rows
    assert tokens.counts.min() < tokens.counts.max() and row["num_tokens"] == float(tokens.counts.double().mean())
    assert row["psnr"] == pytest.approx(float(psnr(as_saved(model.decode(tokens)), images).mean()), abs=1e-4)


def test_wrong_counts_options_and_sets_are_refused(flextok):
    dataset = emoji(size_of(flextok))
    with pytest.raises(ValueError, match=f"num_tokens=100000 but this tokenizer makes 1 to {flextok.max_tokens}"):
        evaluate_reconstruction(flextok, dataset, num_tokens=[1, 100000], num_images=2, features="pixels:8")
    with pytest.raises(ValueError, match="no option 'steps'"):
        evaluate_reconstruction(flextok, dataset, num_images=2, features="pixels:8", decode_options={"steps": 2})
    with pytest.raises(ValueError, match="at least 2 readable images"):
        evaluate_reconstruction(flextok, dataset, num_images=1, features="pixels:8")


def test_real_images_beat_noise_and_copies_of_training_images_are_counted():
    reference, training = emoji(32), emoji(32, split="train")
    few = range(0, len(training), len(training) // 12)
    copies = ImagesInMemory(torch.stack([training.read(i) for i in few]).flip(3))
    noise = ImagesInMemory(torch.rand(len(few), 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    known = ImagesInMemory(torch.stack([training.read(i) for i in range(0, len(training), 2)][:40] + [training.read(i) for i in few]))
    rows = [
        evaluate_generation(samples, reference, training=known, num_reference=40, features="conv:32").rows[0] for samples in (copies, noise)
    ]
    assert rows[0]["near_copies"] == 1 and rows[1]["near_copies"] == 0
    assert rows[0]["near_copies_of_reference"] < 0.5
    assert rows[0]["frechet"] < rows[1]["frechet"] and rows[0]["kid"] < rows[1]["kid"]
    assert rows[0]["recall"] > rows[1]["recall"] == 0
    assert [found["training_image"] >= 40 or found["psnr"] > 90 for found in rows[0]["nearest"]] == [True] * len(few)


def test_near_copies_are_numbered_as_in_the_training_set():
    training = emoji(32, split="train")
    found = find_near_copies(
        torch.stack([training.read(i) for i in (5, 77)]) / 127.5 - 1,
        ImagesInMemory(torch.stack([training.read(i) for i in range(80)])),
        batch_size=16,
    )
    assert found.index.tolist() == [5, 77]


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="open both at one size"):
        evaluate_generation(ImagesInMemory(torch.zeros(5, 3, 16, 16)), emoji(32), num_reference=5, features="pixels:8")


def test_the_reconstruction_script_prints_and_stores_numbers_and_protocol(fsq2d, tmp_path, capsys, monkeypatch):
    fsq2d.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m"])
    reconstruction.main(
        reconstruction.Config(
            model=str(tmp_path / "model"), num_images=4, image_size=32, features="pixels:8", device="cpu",
            out=tmp_path / "out.json", strip=tmp_path / "strip.png", strip_images=2,
        )
    )  # fmt: skip
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["protocol"]["command"] == "python -m eval.reconstruction --model m"
    assert (data["protocol"]["data"], data["protocol"]["split"], data["protocol"]["features"]) == ("emoji", "test", "pixels:8")
    assert f"{data['results'][0]['psnr']:.2f}" in capsys.readouterr().out
    assert vistok.open_image(tmp_path / "strip.png").width >= 64


def test_the_generation_script_compares_two_folders(tmp_path, capsys):
    training = emoji(32, split="train")
    for folder, start in (("real", 0), ("samples", 400)):
        for i in range(24):
            path = tmp_path / folder / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            vistok.to_pil(training.read(start + i) / 127.5 - 1)[0].save(path)
    config = generation.Config(
        samples=str(tmp_path / "samples"), data=str(tmp_path / "real"), split="all", train_split="all", image_size=32,
        features="pixels:8", device="cpu", out=tmp_path / "out.json", grid=tmp_path / "grid.png",
    )  # fmt: skip
    generation.main(config)
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["results"][0]["num_samples"] == 24 and data["results"][0]["near_copies_of_reference"] == 1
    assert "precision" in capsys.readouterr().out and (tmp_path / "grid.png").is_file()


def test_the_generation_script_goes_round_classes_prompts_or_captions():
    config = generation.Config(model="m", num_samples=6)
    assert generation.conditions(("a", "b", "c"), config) == ("labels", ["a", "b", "c"] * 2)
    assert generation.conditions(("a", "b"), generation.Config(model="m", num_samples=3, prompts=("x", "y"))) == (
        "prompts",
        ["x", "y", "x"],
    )
    kind, asked = generation.conditions((), config)
    assert kind == "prompts" and asked == emoji(64).captions[:6]
    with pytest.raises(SystemExit, match="either --model or --samples"):
        generation.main(generation.Config())


def test_the_generation_script_draws_from_a_pipeline(fsq2d, tmp_path):
    torch.manual_seed(0)
    gpt = vistok.create("gpt-tiny", codebook_size=fsq2d.codebook_size, num_classes=2, classes=("a", "b"))
    vistok.TokenImagePipeline(gpt.eval(), fsq2d).save_pretrained(tmp_path / "pipe")
    config = generation.Config(
        model=str(tmp_path / "pipe"), num_samples=6, num_reference=8, train_split="", features="pixels:8", device="cpu",
        top_k=5, out=tmp_path / "out.json",
    )  # fmt: skip
    generation.main(config)
    data = json.loads((tmp_path / "out.json").read_text())
    options = data["protocol"]["options"]
    assert data["results"][0]["num_samples"] == 6 and options["top_k"] == 5 and options["conditions"] == "2 different labels in turn"
    assert data["protocol"]["model_config"]["generator"]["codebook_size"] == fsq2d.codebook_size
    assert "near_copies" not in data["results"][0] and options["training_images"] == 0
