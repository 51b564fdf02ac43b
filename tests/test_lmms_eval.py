import pytest
import torch

from vistok.pruning.lmms_eval import pruned_class
from vistok.training.tasks.vlm import SceneVLMConfig, scene_processor, scene_vlm


class Wrapper:
    """A wrapper as lmms-eval has them: it holds a model and refuses arguments it does not know."""

    def __init__(self, depth=2, **options):
        assert options == {}
        shape = SceneVLMConfig(tower_width=16, tower_depth=1, tower_heads=2, width=32, depth=depth, num_heads=2, num_key_value_heads=1)
        torch.manual_seed(0)
        self._model = scene_vlm(shape, scene_processor(shape)).eval()


def test_a_wrapper_prunes_its_model_and_keeps_its_own_arguments():
    model = pruned_class(Wrapper)(depth=1, vistok_method="uniform", vistok_keep_ratio=0.25)
    ids = torch.tensor([[1, *[model._model.config.image_token_id] * 64, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 64, 64)}
    out = model._model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, : ids.shape[1]], ids) and model.pruned.stats().num_kept == (16,)
    assert len(model._model.model.language_model.layers) == 1


def test_a_wrapper_without_a_method_is_the_wrapper_and_options_alone_are_refused():
    assert not hasattr(pruned_class(Wrapper)(), "pruned")
    with pytest.raises(ValueError, match="vistok_keep_ratio without vistok_method"):
        pruned_class(Wrapper)(vistok_keep_ratio=0.5)
