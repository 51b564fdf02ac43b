"""Fewer tokens in vision models: plans, methods as pure functions, and adapters for models of other libraries."""

from torch import nn

from vistok.pruning.blocks import is_vision_tower
from vistok.pruning.language import prune_vision_language
from vistok.pruning.layers import LayerReport, PrunedLayers, prune_layers
from vistok.pruning.plan import ReductionPlan
from vistok.pruning.selectors import ImageViews, Selection, Selector
from vistok.pruning.stages import LayerMethod, StageChoice, StageView
from vistok.pruning.strategies import STRATEGIES, Strategy, create_strategy
from vistok.pruning.vit import PrunedViT, ViTReport, prune_vit
from vistok.pruning.vlm import PrunedVLM, VLMReport, prune_vlm

__all__ = [
    "STRATEGIES", "ImageViews", "LayerMethod", "LayerReport", "PrunedLayers", "PrunedVLM", "PrunedViT", "ReductionPlan", "Selection",
    "Selector", "StageChoice", "StageView", "Strategy", "VLMReport", "ViTReport",
    "create_strategy", "prune", "prune_layers", "prune_vit", "prune_vlm",
]  # fmt: skip


def prune(model: nn.Module, method, **options) -> PrunedViT | PrunedVLM | PrunedLayers:
    """Reduce the tokens of a stock model until the returned handle is removed; use it as a context manager.

        with vistok.prune(model, "tome", r=13) as pruned:
            logits = model(images)
            print(pruned.stats())

    model: a vision transformer of timm or transformers (methods and options: `vistok.pruning.vit.prune_vit`) or a transformers
    vision-language model, which then gets fewer visual tokens (`vistok.pruning.language.prune_vision_language`); unchanged otherwise.
    Raises ValueError with the reason for a model whose tokens cannot be reduced.
    """
    is_from_transformers = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    if is_from_transformers and not is_vision_tower(model):
        return prune_vision_language(model, method, **options)
    return prune_vit(model, method, **options)
