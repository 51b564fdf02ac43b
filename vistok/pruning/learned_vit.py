"""MrT5's delete gate in vision transformers: gates read what a block's attention reads, and patches leave behind that block.

    gone_j = sigmoid(w . LN(x_j) + b)          x: the normalised input of block l - 1 (Kallini et al. 2024, arXiv 2410.20771)
    training   -k gone_j is added to the logits for patch j in block l and all later ones; all patches stay
    in use     the patches with the smallest gone stay, as many as the schedule says, so that all images of a batch have one length

The prefix (class token, registers) always stays. With patches hidden instead of dropped the class token is the same, which `SoftViT` with
is_hard shows. B images, N tokens, P prefix tokens, T patches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vistok.pruning.blocks import BlockParts, check_mask, parts_of
from vistok.pruning.hooks import Hooked
from vistok.pruning.learned import DeleteGate
from vistok.pruning.methods import topk
from vistok.pruning.plan import ReductionPlan
from vistok.pruning.strategies import LayerView


@dataclass(frozen=True, kw_only=True)
class GatedTokens:
    """The strategy of a trained gate: `vistok.prune(vit, GatedTokens(gate=gate, keep_ratio=0.5))`."""

    gate: DeleteGate
    keep_ratio: float
    """Share of the patches that is left behind the last gate; each gate takes the same share of what reaches it."""
    is_proportional: bool = False
    is_merging: ClassVar[bool] = False
    at_block_end: ClassVar[bool] = True

    def __post_init__(self):
        topk.count_to_keep(1, keep_ratio=self.keep_ratio)

    def shares(self) -> tuple[float, ...]:
        """Share of the patches that is left behind each gate."""
        number = len(self.gate.settings.layers)
        return tuple(self.keep_ratio ** ((stage + 1) / number) for stage in range(number))

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        layers = self.gate.settings.layers
        if layers[-1] >= num_layers:
            raise ValueError(f"the gates stand before layers {layers}, the model has {num_layers}")
        counts, left = [0] * num_layers, num_patches
        for layer, share in zip(layers, self.shares()):
            kept = min(left, topk.count_to_keep(num_patches, keep_ratio=share))
            counts[layer - 1], left = left - kept, kept
        return tuple(counts)

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return ()

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        stage = self.gate.stages[self.gate.settings.layers.index(view.layer + 1)]
        stays = -stage.gone(view.metric("input")[:, view.num_prefix :])
        return topk.top_tokens(stays, stays.shape[1] - count, num_prefix=view.num_prefix)


class SoftViT(Hooked):
    """A gate on a timm vision transformer for training: all patches stay, their keys fade.

    After a forward `kept` holds [B, T] for each gate: the product of 1 - gone so far. keep_ratio: hide for good what `GatedTokens` with
    that share would drop (masks of 0 and 1, no gradients).
    """

    def __init__(self, model: nn.Module, gate: DeleteGate, *, keep_ratio: float | None = None):
        parts = parts_of(model)
        check_mask(parts)
        if parts.tower is not None:
            raise ValueError(f"a gate is trained on a vision transformer of timm, not on {type(model).__name__}")
        self.gate, self.num_prefix, self.kept = gate, parts.num_prefix, []
        depth = len(parts.blocks)
        self._strategy = None if keep_ratio is None else GatedTokens(gate=gate, keep_ratio=keep_ratio)
        GatedTokens(gate=gate, keep_ratio=1.0).counts(depth, 1)  # the gates stand within the model
        self._depth = depth
        self._handles = [
            part.attention.register_forward_pre_hook(self._hook(layer, part), with_kwargs=True) for layer, part in enumerate(parts.blocks)
        ]

    def _hook(self, layer: int, part: BlockParts):
        def hook(attention: nn.Module, args: tuple, kwargs: dict):
            if layer == 0:
                self.kept, self._bias = [], None
            bias = self._bias
            if layer + 1 in self.gate.settings.layers:
                self._stage(layer + 1, args[0])
            return None if bias is None else (args, {**kwargs, part.mask: bias[:, None, None, :].to(args[0].dtype)})

        return hook

    def _stage(self, layer: int, x: Tensor) -> None:
        """x: [B, N, D], what the attention of the block before reads. Sets the bias [B, N] of this block and the later ones."""
        number = self.gate.settings.layers.index(layer)
        gone = self.gate.stages[number].gone(x[:, self.num_prefix :])
        before = self.kept[-1] if self.kept else torch.ones_like(gone)
        if self._strategy is None:
            bias, kept = -self.gate.settings.strength * gone, 1 - gone
        else:
            T = gone.shape[1]
            left = T - sum(self._strategy.counts(self._depth, T)[:layer])
            stays = topk.mask_of(topk.top_indices((-gone).masked_fill(before == 0, -torch.inf), left), T)
            bias, kept = torch.zeros_like(gone).masked_fill(~stays, -torch.inf), stays.to(gone)
        bias = torch.cat([bias.new_zeros(len(bias), self.num_prefix), bias], dim=1)
        self._bias = bias if self._bias is None else self._bias + bias
        self.kept.append(before * kept)
