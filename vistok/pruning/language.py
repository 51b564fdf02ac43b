"""One door to pruning in vision-language models: before the language model, between its layers, or in its cross-attention."""

from torch import nn

from vistok.pruning.layers import PrunedLayers, prune_layers
from vistok.pruning.stages import INSIDE_ONLY, LayerMethod
from vistok.pruning.vlm import PrunedVLM, prune_vlm


def prune_vision_language(model: nn.Module, method, **options) -> PrunedVLM | PrunedLayers:
    """Prune visual tokens of a transformers vision-language model until the returned handle is removed.

    method: a name. "fastv", "pyramiddrop", "sparsevlm", "sparsevlm+" and "vscan_llm" act between the layers of the language model, and so
    do "dart", "random" and "uniform" when options name layer or layers (`vistok.pruning.layers.prune_layers`); every other one acts before
    it (`vistok.pruning.vlm.prune_vlm`). One of each kind may be active on a model at a time.
    """
    is_inside = isinstance(method, LayerMethod) or (isinstance(method, str) and method in INSIDE_ONLY)
    if is_inside or "layer" in options or "layers" in options:
        return prune_layers(model, method, **options)
    return prune_vlm(model, method, **options)
