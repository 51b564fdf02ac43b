import pytest
import timm
import torch


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
