"""LPIPS, GAN and caption features that tokenizer tasks share, and codebooks that fit the data."""

import json
from dataclasses import replace

import pytest
import torch

import vistok
from vistok.commands.train import codebook_report
from vistok.convert import llamagen, titok, var
from vistok.convert.pickles import read_state
from vistok.quantizers import VQ, VQConfig
from vistok.quantizers.multiscale import MultiScaleResidual
from vistok.training.recipes import Sources, get_recipe
from vistok.training.tasks.caption_features import CaptionFeatures
from vistok.training.tasks.image_losses import ImageLossConfig, ImageLosses


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_sum_weighs_named_terms_and_logs_them_unweighted():
    losses = ImageLosses(ImageLossConfig())
    terms = {"mse": torch.tensor(2.0), "kl": torch.tensor(3.0)}
    loss, logs = losses(terms, images=noise(1, 3, 8, 8), decoded=noise(1, 3, 8, 8), step=0, weights={"kl": 0.5})
    assert float(loss) == 3.5 and logs == terms and not list(losses.parameters())


def test_the_gan_counts_from_its_start_and_trains_both_sides_apart():
    losses = ImageLosses(ImageLossConfig(gan_weight=0.5, gan_start=3))
    images, decoded = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1).requires_grad_()
    early, logs = losses({}, images=images, decoded=decoded, step=2)
    torch.testing.assert_close(early, logs["judge"])
    late, logs = losses({}, images=images, decoded=decoded, step=3)
    torch.testing.assert_close(late, logs["judge"] + 0.5 * logs["gan"])
    (gradient,) = torch.autograd.grad(late, decoded, retain_graph=True)
    assert gradient.abs().sum() > 0
    late.backward()
    judged = [p.grad.clone() for p in losses.parameters()]
    losses.zero_grad()
    losses({}, images=images, decoded=decoded.detach(), step=2)[0].backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(judged, losses.parameters()))  # the generator's term never reaches the judge


def test_words_have_the_same_features_wherever_they_stand():
    read = CaptionFeatures("hash", num_tokens=3, width=8)
    first, second = read(["red apple", "green big apple pie"])
    assert first.shape == (3, 8) and torch.equal(first[1], second[2]) and not torch.equal(first[0], second[0])
    assert (first[2] == 0).all() and torch.equal(read(["Red"])[0, 0], first[0])


@pytest.mark.parametrize("name", ["tokenflow-emoji", "seed-emoji", "lavit-emoji", "titok-emoji", "vqgan-emoji", "var-vqvae-emoji"])
def test_a_small_folder_gets_a_small_codebook(name):
    built = {count: get_recipe(name, "tokenizer").build(Sources(num_images=count)).model for count in (None, 2968, 150)}
    sizes = {count: model.codebook_size for count, model in built.items()}
    assert sizes[None] == sizes[2968] >= 1024 and 64 <= sizes[150] <= 512


def test_codes_for_every_vector_give_the_unquantized_sum():
    vq = VQ(VQConfig(codebook_size=64, code_dim=4, metric="cosine"))
    scales = MultiScaleResidual(vq, [(1, 1), (2, 2), (4, 4)])
    h = noise(1, 4, 4, 4)
    inputs = scales.encode(h).inputs  # only the first scale's is the same in both sums, so place the codes scale by scale
    for _ in range(3):
        vectors = torch.cat([part.flatten(2).mT for part in inputs], dim=1)[0]
        vq.set_codebook(torch.cat([vq.place(vectors), vq.codebook[len(vectors) :]]))
        inputs = scales.encode(h).inputs
    torch.testing.assert_close(scales.encode(h).total, scales.unquantized(h))


EMA = dict(codebook_update="ema", kmeans_iterations=2, revive_after=3)


@pytest.mark.parametrize("name, convert", [("vqgan-tiny", llamagen), ("var-vqvae-tiny", var), ("titok-tiny", titok)])
def test_a_codebook_trained_by_averages_goes_to_the_official_format_like_any_other(name, convert, tmp_path):
    changes = {"quantizer": "vq"} if name.startswith("titok") else {}
    averaged, plain = vistok.create(name, **EMA, **changes), vistok.create(name, **changes)
    for folder, model in (("a", averaged), ("b", plain)):
        convert.to_official(model, tmp_path / folder)
    names = [
        {
            key: value.shape
            for key, value in read_state(next(path for path in (tmp_path / folder).iterdir() if path.suffix != ".json")).items()
        }
        for folder in "ab"
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name, convert", [("vqgan-64", llamagen), ("var-vqvae-64", var)])
def test_folded_pixels_have_no_official_form(name, convert, tmp_path):
    with pytest.raises(ValueError, match="pixel_patch=4"):
        convert.to_official(vistok.create(name), tmp_path)


@pytest.mark.parametrize("name", ["vqgan-tiny", "var-vqvae-tiny"])
def test_folding_pixels_keeps_the_size_of_images(name):
    model = vistok.create(name)
    folded = type(model)(replace(model.settings, pixel_patch=2, multipliers=model.settings.multipliers[1:])).eval()
    assert folded.settings.reduction == model.settings.reduction
    images = noise(1, 3, *folded.settings.image_size).clamp(-1, 1)
    assert folded.decode(folded.encode(images)).shape == images.shape
    with pytest.raises(ValueError, match="pixel_patch=0"):
        replace(model.settings, pixel_patch=0)


def test_the_end_of_a_run_says_how_much_of_the_codebook_was_used(tmp_path):
    lines = [{"step": 10, "usage": 0.2, "perplexity": 3.0}, {"step": 20, "usage": 0.875, "perplexity": 55.4}, {"step": 20, "held_out": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert codebook_report(tmp_path) == ["codebook up to step 20: 88% of the codes used, perplexity 55"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert codebook_report(tmp_path) == []
