"""Fewer tokens in vision models: plans, methods as pure functions, and adapters for models of other libraries."""

from torch import nn

from vistok.pruning.plan import ReductionPlan
from vistok.pruning.strategies import STRATEGIES, Strategy, create_strategy
from vistok.pruning.vit import PrunedViT, ViTReport, prune_vit
from vistok.pruning.vlm import PrunedVLM, VLMReport, prune_vlm

__all__ = [
    "STRATEGIES", "PrunedVLM", "PrunedViT", "ReductionPlan", "Strategy", "VLMReport", "ViTReport",
    "create_strategy", "prune", "prune_vit", "prune_vlm",
]  # fmt: skip


def prune(model: nn.Module, method, **options) -> PrunedViT | PrunedVLM:
    """Reduce the tokens of a stock model until the returned handle is removed; use it as a context manager.

        with vistok.prune(model, "tome", r=13) as pruned:
            logits = model(images)
            print(pruned.stats())

    model: a timm vision transformer (methods and options: `vistok.pruning.vit.prune_vit`) or a transformers vision-language model, whose
    `generate` then gets fewer visual tokens (`vistok.pruning.vlm.prune_vlm`); unchanged otherwise.
    Raises ValueError with the reason for a model whose tokens cannot be reduced.
    """
    is_from_transformers = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    return prune_vlm(model, method, **options) if is_from_transformers else prune_vit(model, method, **options)
