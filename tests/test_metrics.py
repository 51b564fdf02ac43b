"""The metrics against analytic values, against skimage, and against their own slow paths."""

import json
import logging

import numpy as np
import pytest
import torch

from vistok.metrics import (
    CodebookUsage,
    EvaluationProtocol,
    FeatureNet,
    FeatureStatistics,
    ImagesInMemory,
    as_saved,
    default_token_counts,
    feature_net,
    frechet_between,
    frechet_distance,
    kid,
    nearest_feature_is_right,
    nearest_images,
    nearest_is_right,
    precision_recall,
    psnr,
    ssim,
)
from vistok.metrics.protocol import Evaluation
from vistok.metrics.sources import batches, choose


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(n=6, size=32, seed=0):
    """Smooth random images in [-1, 1], so that neighbouring pixels agree as in photographs."""
    small = random(n, 3, 4, 4, seed=seed)
    return torch.nn.functional.interpolate(small, size=size, mode="bilinear").clamp(-1, 1)


def test_psnr_and_ssim_equal_those_of_skimage():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    originals = pictures()
    noisy = (originals + 0.2 * random(*originals.shape, seed=1)).clamp(-1, 1)
    for mine, theirs in (
        (psnr, lambda a, b: peak_signal_noise_ratio(a, b, data_range=2)),
        (
            ssim,
            lambda a, b: structural_similarity(
                a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2, channel_axis=0
            ),
        ),
    ):
        expected = torch.tensor([theirs(a.double().numpy(), b.double().numpy()) for a, b in zip(originals, noisy)])
        assert torch.allclose(mine(noisy, originals).double(), expected, atol=1e-4)


def test_an_exact_copy_has_the_highest_psnr_and_an_ssim_of_one():
    images = pictures(2)
    assert psnr(images, images).tolist() == pytest.approx([100, 100], abs=1e-3)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])


def test_metrics_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        psnr(pictures(2), pictures(3))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(pictures(1, size=8), pictures(1, size=8))


def test_as_saved_gives_the_values_of_an_eight_bit_file():
    saved = as_saved(2 * random(2, 3, 8, 8))
    levels = (saved + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4) and saved.abs().max() == 1


def gaussian_set(mean, root, n=4000, seed=0):
    """Features whose sample mean and covariance are exactly `mean` and root @ root.T."""
    z = random(n, len(mean), seed=seed).double()
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (n - 1))).T
    return z @ root.T + mean


def test_frechet_distance_of_two_gaussians_is_the_analytic_value():
    a = gaussian_set(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))
    b = gaussian_set(torch.tensor([1.0, 0.0, 2.0]).double(), torch.diag(torch.tensor([2.0, 2.0, 1.0]).double()), seed=1)
    # commuting covariances: |m|^2 + sum (s_a - s_b)^2 = 5 + 1 + 0 + 4
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(10, abs=1e-6)


def test_frechet_distance_of_rotated_gaussians_equals_the_matrix_square_root_of_scipy():
    from scipy.linalg import sqrtm

    a, b = (
        FeatureStatistics.of(random(200, 6) @ random(6, 6, seed=2)),
        FeatureStatistics.of(random(150, 6, seed=1) @ random(6, 6, seed=3) + 1),
    )
    root = np.real(sqrtm((a.covariance @ b.covariance).numpy())).trace()
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_with_fewer_images_than_dimensions():
    few = FeatureStatistics.of(random(5, 16))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


def test_the_cheap_way_for_few_images_gives_the_same_frechet_distance():
    a, b = random(20, 64), random(30, 64, seed=1) * 1.5 + 0.1
    assert frechet_between(a, b) == pytest.approx(frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)), rel=1e-5)
    assert frechet_between(a, a) == pytest.approx(0, abs=1e-9)


def test_statistics_of_a_stream_equal_those_of_the_whole():
    features = random(101, 5) + 1000
    streamed, first, second = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    for part in features.split(7):
        streamed.update(part)
    first.update(features[:30])
    second.update(features[30:])
    first.merge(second)
    for statistics in (streamed, first):
        assert statistics.count == 101
        assert torch.allclose(statistics.mean, features.double().mean(dim=0))
        assert torch.allclose(statistics.covariance, features.double().T.cov(), rtol=1e-9)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="image 1 .* not finite"):
        FeatureStatistics.of(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))


def test_kernel_distance_is_near_zero_for_one_distribution_and_large_for_two():
    same = kid(random(600, 8), random(600, 8, seed=1), num_subsets=20, subset_size=200)
    assert abs(same.mean) < 3 * same.std / 20**0.5 + 0.02
    assert kid(random(600, 8), random(600, 8, seed=1) + 1, num_subsets=5, subset_size=200).mean > 1


def test_kernel_distance_is_unbiased_over_many_small_sets():
    values = torch.tensor([kid(random(10, 4, seed=2 * i), random(10, 4, seed=2 * i + 1)).mean for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20


def test_kernel_distance_depends_on_the_seed_alone_and_small_sets_are_compared_whole():
    a, b = random(50, 4), random(60, 4, seed=1)
    assert kid(a, b, subset_size=20, seed=3) == kid(a, b, subset_size=20, seed=3)
    whole = kid(a, b)
    assert (whole.num_subsets, whole.std) == (1, None)


def test_precision_and_recall_are_one_for_equal_sets_and_zero_for_distant_ones():
    a = random(40, 4)
    assert precision_recall(a, a, chunk_size=7) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)


def test_samples_from_one_of_two_clusters_are_precise_but_miss_half_the_reference():
    reference = torch.cat([random(100, 2), random(100, 2, seed=1) + 50])
    quality = precision_recall(random(100, 2, seed=2), reference)
    assert quality.precision > 0.8 and quality.recall <= 0.5


def test_every_original_finds_itself_and_a_shuffled_set_finds_nobody():
    originals = pictures(9)
    for name in ("pixels", "pixels:4", "conv:32"):
        for distance in ("cosine", "l2"):
            assert nearest_is_right(originals, originals, feature_net(name), distance=distance, batch_size=4) == 1
            assert nearest_is_right(originals.roll(1, dims=0), originals, feature_net(name), distance=distance) == 0


def test_retrieval_counts_duplicates_as_right_and_a_collapse_as_chance():
    keys = random(5, 6)
    keys[1] = keys[0]
    assert nearest_feature_is_right(keys, keys, chunk_size=2) == 1
    assert nearest_feature_is_right(keys.double().mean(dim=0).expand(5, 6), keys) == 0
    assert nearest_feature_is_right(keys[2:3].expand(5, 6), keys) == 1 / 5
    assert nearest_feature_is_right(torch.full_like(keys, float("nan")), keys) == 0


def test_near_copies_are_found_mirrored_or_not():
    training = pictures(12)
    samples = torch.stack([training[7], training[3].flip(2), pictures(1, seed=9)[0]])
    samples[0] = (samples[0] + 0.01 * random(3, 32, 32)).clamp(-1, 1)
    nearest = nearest_images(samples, training.split(5))
    assert nearest.index[:2].tolist() == [7, 3] and nearest.mirrored[:2].tolist() == [False, True]
    assert nearest.psnr[0] == pytest.approx(float(psnr(samples[:1], training[7:8])), abs=1e-4) and nearest.psnr[1] > 99
    assert nearest.share_above(25) == pytest.approx(2 / 3)
    assert nearest_images(samples, training.split(5), with_mirrored=False).share_above(25) == pytest.approx(1 / 3)


def test_the_nearest_image_by_expanded_squares_is_that_of_a_plain_loop():
    samples, training = pictures(5, seed=4), pictures(30, seed=5)
    both = torch.cat([training, training.flip(3)])
    slow = torch.stack([psnr(sample.expand_as(both), both) for sample in samples]).max(dim=1)
    nearest = nearest_images(samples, training.split(7))
    assert torch.equal(nearest.index + 30 * nearest.mirrored, slow.indices)
    assert torch.allclose(nearest.psnr, slow.values, atol=1e-4)


def test_usage_of_a_merged_stream_equals_usage_of_the_whole():
    ids = torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(0))
    whole, left, right = CodebookUsage(64), CodebookUsage(64), CodebookUsage(64)
    whole.update(ids)
    left.update(ids[:10])
    right.update(torch.cat([ids[10:], torch.full((30, 2), -1)], dim=1))
    left.merge(right)
    assert torch.equal(left.counts, whole.counts) and left.num_tokens == ids.numel()
    assert whole.usage == 50 / 64 and 45 < whole.perplexity <= 50


def test_an_even_codebook_has_perplexity_k_and_a_collapsed_one_has_one():
    even, collapsed = CodebookUsage(8), CodebookUsage(8)
    even.update(torch.arange(8))
    collapsed.update(torch.zeros(100, dtype=torch.int64))
    assert even.perplexity == pytest.approx(8) and collapsed.perplexity == pytest.approx(1)
    with pytest.raises(ValueError, match="0 to 7"):
        even.update(torch.tensor([8]))


def test_convolution_features_are_the_same_on_every_machine():
    net = feature_net("conv")
    features = net(pictures(2, size=64))
    assert isinstance(net, FeatureNet) and features.shape == (2, 1536)
    assert torch.allclose(net.filters[0].flatten(1) @ net.filters[0].flatten(1).T, torch.eye(16), atol=1e-5)
    state = torch.random.get_rng_state()
    assert torch.equal(feature_net("conv")(pictures(2, size=64)), features)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.filters[:, 0, 0, 0, 0].tolist() == pytest.approx(
        [0.08769984, 0.22679009, -0.08754947], abs=1e-5
    )  # pinned: published numbers rest on them


def test_features_of_an_image_do_not_depend_on_its_batch():
    net, images = feature_net("conv:32"), pictures(4)
    assert torch.allclose(net(images)[2:3], net(images[2:3]), atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["", "resnet18", "pixels:", "pixels:a", "conv:30", "timm:", "inceptionv3", "timm:no_such_net", "torchvision:no_such_net"]
)
def test_an_unknown_feature_net_is_an_error_that_says_so(spec):
    with pytest.raises(ValueError):
        feature_net(spec)


def test_a_weights_file_fits_or_is_refused(tmp_path, caplog):
    import torchvision
    from safetensors.torch import save_file

    network = torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=7)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    net = feature_net(f"torchvision:shufflenet_v2_x0_5@{path}")
    images = pictures(2)
    features = net(images)
    assert features.shape == (2, 1024) and net.name.startswith("torchvision:shufflenet_v2_x0_5@weights.safetensors#")
    torch.save(
        {"state_dict": {f"backbone_{i}": value for i, value in enumerate(network.state_dict().values()) if value.ndim}}, tmp_path / "b.pth"
    )
    with caplog.at_level(logging.INFO, logger="vistok"):
        renamed = feature_net(f"torchvision:shufflenet_v2_x0_5@{tmp_path / 'b.pth'}")
    assert torch.equal(renamed(images), features) and "taken in order" in caplog.text
    with pytest.raises(ValueError, match="does not fit"):
        feature_net(f"torchvision:resnet18@{path}")
    with pytest.raises(OSError, match="no weights file"):
        feature_net(f"timm:resnet18@{tmp_path / 'absent.pth'}")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="not a plain file of tensors"):
        feature_net(f"timm:resnet10t@{tmp_path / 'evil.pth'}")
    assert not (tmp_path / "proof").exists()


def test_timm_features_are_pooled_and_frozen(tmp_path):
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("test_resnet", num_classes=3)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    net = feature_net(f"timm:test_resnet@{tmp_path / 'w.safetensors'}")
    features = net.train()(pictures(2))
    assert features.ndim == 2 and not features.requires_grad and not net.network.training
    assert net.preprocess.startswith("bilinear antialiased resize to 160 x 160")


def test_transformers_features_come_from_a_folder(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    net = feature_net(f"transformers:{tmp_path / 'vit'}")
    assert net(pictures(3)).shape == (3, 16) and net.name == "transformers:vit"


def test_only_the_official_inception_makes_a_fid():
    assert EvaluationProtocol(task="generation", features="inception").frechet_name == "FID"
    assert EvaluationProtocol(task="generation", features="inception@x.pth#123456789abc").frechet_name.startswith("Frechet(")
    assert EvaluationProtocol(task="generation", features="conv:64").frechet_name == "Frechet(conv:64)"


def test_an_evaluation_is_saved_as_strict_json_with_its_protocol(tmp_path):
    protocol = EvaluationProtocol(task="reconstruction", data="emoji", image_size=(64, 64), options={"num_steps": 20})
    result = Evaluation(protocol, [{"num_tokens": 1, "frechet": float("inf"), "kid_std": None, "nearest": [1]}])
    result.save(tmp_path / "deep" / "out.json")
    data = json.loads((tmp_path / "deep" / "out.json").read_text(), parse_constant=pytest.fail)
    assert data["results"][0]["frechet"] is None and data["protocol"]["options"] == {"num_steps": 20}
    assert "torch" in data["protocol"]["versions"] and [p.name for p in (tmp_path / "deep").iterdir()] == ["out.json"]
    assert "options: num_steps=20" in result.report() and "nearest" not in result.table()


def test_images_are_chosen_by_the_seed_and_broken_ones_are_left_out():
    source = ImagesInMemory(pictures(10))
    assert choose(source, None, 0) == list(range(10)) and choose(source, 4, 1) == choose(source, 4, 1) != choose(source, 4, 2)

    class Broken(ImagesInMemory):
        def locate(self, index):
            return (index + 1 if index == 3 else index), self.read(index)

    found = [index for indices, _ in batches(Broken(pictures(10)), range(10), 4) for index in indices]
    assert found == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_default_token_counts_double_and_hold_both_ends():
    assert default_token_counts(1, 48) == [1, 2, 4, 8, 16, 32, 48]
    assert default_token_counts(3, 3) == [3]
