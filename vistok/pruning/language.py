"""One door to pruning in vision-language models: before the language model, between its layers, in its cross-attention; and its kin."""

from torch import nn

from vistok.pruning.calibration import CALIBRATIONS
from vistok.pruning.cross import PrunedCrossAttention, PrunedQueryFormer, prune_cross
from vistok.pruning.families import CROSS_ATTENTION, QUERY_FORMER, kind_of
from vistok.pruning.layers import PrunedLayers, prune_layers
from vistok.pruning.learned import LearnedPruner
from vistok.pruning.stages import INSIDE_ONLY, LayerMethod
from vistok.pruning.vlm import PrunedVLM, prune_vlm


def prune_vision_language(model: nn.Module, method, **options) -> PrunedVLM | PrunedLayers | PrunedCrossAttention | PrunedQueryFormer:
    """Prune visual tokens of a transformers vision-language model until the returned handle is removed.

    method: a name. "fastv", "pyramiddrop", "sparsevlm", "sparsevlm+" and "vscan_llm" act between the layers of the language model, and so
    do "dart", "random" and "uniform" when options name layer or layers (`vistok.pruning.layers.prune_layers`); every other one acts before
    it (`vistok.pruning.vlm.prune_vlm`). One of each kind may be active on a model at a time. Mllama, BLIP-2 and InstructBLIP have a way of
    their own (`vistok.pruning.cross.prune_cross`). "act", "ima" and "recycled" drop no token (`vistok.pruning.calibration`). A trained
    pruner (`vistok.pruning.learned`) takes the place of a name.
    """
    if isinstance(method, LearnedPruner):
        return PrunedLayers(model, *method.as_method(), **options)
    if isinstance(method, str) and method in CALIBRATIONS:
        return CALIBRATIONS[method](model, **options)
    is_inside = isinstance(method, LayerMethod) or (isinstance(method, str) and method in INSIDE_ONLY)
    is_inside = is_inside or "layer" in options or "layers" in options
    kind = kind_of(model)
    if kind in (*CROSS_ATTENTION, *QUERY_FORMER):
        if is_inside:
            raise ValueError(f"no token can leave between the layers of {kind}: take divprune, dart, random or uniform, without layers")
        return prune_cross(model, method, **options)
    return (prune_layers if is_inside else prune_vlm)(model, method, **options)
