"""What a vision transformer is told to do in each layer: a reduction method with its schedule.

A strategy says how many tokens every layer removes (`counts`, from static sizes alone, so that shapes stay static) and makes the layer's
plan from a `LayerView`. The methods themselves are the pure functions in `vistok.pruning.methods`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vistok.pruning.methods import diffrate, topk, zero_tprune
from vistok.pruning.methods import pitome as pitome_method
from vistok.pruning.methods import tome as tome_method
from vistok.pruning.plan import ReductionPlan
from vistok.rng import image_generators


class LayerView(Protocol):
    """What a strategy may look at in one layer; everything is computed when it is asked for."""

    layer: int
    num_prefix: int
    num_layers: int
    num_patches: int
    """Patches that entered the first layer."""

    def metric(self, name: str) -> Tensor:
        """[B, N, d]: "key" (mean over heads), "query" or "input" (the block's normalised input)."""

    def keys(self) -> Tensor:
        """[B, H, N, d] keys before rotary positions."""

    def attention(self, rows: int | None = None) -> Tensor:
        """[B, H, rows or N, N] float32 probabilities of the first rows, recomputed from queries and keys."""


class Strategy(Protocol):
    """A reduction method for vision transformers."""

    is_merging: ClassVar[bool]
    """Folds tokens (so pooling weighs them with their sizes) rather than dropping them."""
    at_block_end: ClassVar[bool]
    """Reduce after the block rather than between attention and feed-forward."""
    is_proportional: bool
    """Add log size to the attention logits of merged tokens."""

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        """Patch tokens each layer removes."""

    def attention_layers(self, num_layers: int) -> Sequence[int]:
        """Layers whose whole attention map the plan reads."""

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        """The plan that removes `count` patch tokens of this layer."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many tokens go where. Exactly one of the three says it."""

    r: tome_method.Schedule | None = None
    """Tokens each layer removes: a number, a list for each layer, or (mean, inflection); at most half of a layer's."""
    keep: int | None = None
    """Patch tokens left after the last layer, removed evenly over the layers."""
    keep_ratio: float | None = None
    """The same as a share of the patch tokens."""

    def __post_init__(self):
        if sum(option is not None for option in (self.r, self.keep, self.keep_ratio)) != 1:
            raise ValueError("give exactly one of r (tokens a layer), keep (tokens left at the end) and keep_ratio (share left at the end)")

    def attention_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        if self.r is None:
            return tome_method.even_schedule(num_layers, num_patches, topk.count_to_keep(num_patches, self.keep, self.keep_ratio))
        counts = []
        for r in tome_method.tome_schedule(num_layers, self.r):
            if r < 0:
                raise ValueError(f"r={self.r} removes {r} tokens in a layer")
            counts.append(min(r, num_patches // 2))
            num_patches -= counts[-1]
        return tuple(counts)


@dataclass(frozen=True, kw_only=True)
class ToMe(Schedule):
    """Bipartite soft matching; see `methods/tome.py`."""

    is_proportional: bool = True
    metric: str = "key"
    sort_unmerged: bool = True
    is_merging: ClassVar[bool] = True
    at_block_end: ClassVar[bool] = False

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        return tome_method.tome(view.metric(self.metric), count, num_prefix=view.num_prefix, sort_unmerged=self.sort_unmerged)


@dataclass(frozen=True, kw_only=True)
class PiToMe(Schedule):
    """Energy-ordered matching; see `methods/pitome.py`."""

    layer_keep_ratio: float | None = None
    """Share of the patches each layer keeps, the paper's way to give the budget (0.9 to 0.975 is usual)."""
    rule: str | Sequence[str] = "protect"
    margin: float | Sequence[float] = 0.9
    """A number falls linearly over the layers; a list names each layer's. The reference uses 0.75 for DeiT and MAE."""
    alpha: float = 1.0
    num_protected_prefix: int | None = None
    """Prefix tokens that are never merged; None: all. The reference protects the class token only."""
    is_proportional: bool = True
    metric: str = "key"
    is_merging: ClassVar[bool] = True
    at_block_end: ClassVar[bool] = False

    def __post_init__(self):
        if self.layer_keep_ratio is None:
            super().__post_init__()
        elif (self.r, self.keep, self.keep_ratio) != (None, None, None):
            raise ValueError("give exactly one of r, keep, keep_ratio and layer_keep_ratio")
        elif not 0.5 <= self.layer_keep_ratio <= 1:
            raise ValueError(f"layer_keep_ratio={self.layer_keep_ratio} but one layer can merge at most half: it is in [0.5, 1]")

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        if self.layer_keep_ratio is None:
            return super().counts(num_layers, num_patches)
        counts = []
        for _ in range(num_layers):
            counts.append(pitome_method.pitome_count(num_patches, self.layer_keep_ratio))
            num_patches -= counts[-1]
        return tuple(counts)

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        rule = pitome_method.pitome_rules(view.num_layers, self.rule)[view.layer]
        margin = pitome_method.pitome_margins(view.num_layers, self.margin)[view.layer]
        num_prefix = view.num_prefix if self.num_protected_prefix is None else min(self.num_protected_prefix, view.num_prefix)
        return pitome_method.pitome(view.metric(self.metric), count, margin=margin, num_prefix=num_prefix, rule=rule, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class ZeroTPrune:
    """Page rank on the attention graph; see `methods/zero_tprune.py`. The defaults are the paper's for DeiT-S (3.09 GMACs)."""

    rates: dict[int, float] | None = None
    """Blocks to prune after, counted from 0, and the share that the importance stage of each keeps; None: the paper's, for any depth."""
    num_similar: int = 10
    """Patches the similarity stage removes in each pruning layer."""
    iterations: int | None = None
    """Votes in each pruning layer; None: 30, 5 or 1 by depth."""
    is_uniform: bool = False
    variance: tuple[float, float] | None = (0.01, 0.7)
    is_proportional: bool = False
    is_merging: ClassVar[bool] = False
    at_block_end: ClassVar[bool] = True

    def rates_for(self, num_layers: int) -> dict[int, float]:
        """`rates`, or the paper's for that depth."""
        return zero_tprune.zero_tprune_rates(num_layers) if self.rates is None else dict(sorted(self.rates.items()))

    def attention_layers(self, num_layers: int) -> Sequence[int]:
        return [layer for layer, rate in self.rates_for(num_layers).items() if rate < 1 or self.num_similar]

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        rates = self.rates_for(num_layers)
        if not set(rates) <= set(range(num_layers)) or not all(0 < rate <= 1 for rate in rates.values()):
            raise ValueError(f"rates={rates} but they are shares in (0, 1] of the layers 0 to {num_layers - 1}")
        counts = [0] * num_layers
        for layer, kept in zip(rates, zero_tprune.zero_tprune_keeps(num_patches, list(rates.values()), self.num_similar)):
            counts[layer], num_patches = num_patches - kept, kept
        return tuple(counts)

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        key = view.keys()
        votes = zero_tprune.zero_tprune_iterations(view.layer, view.num_layers) if self.iterations is None else self.iterations
        return zero_tprune.zero_tprune(
            view.attention(), key, key.shape[2] - view.num_prefix - count,
            num_similar=self.num_similar, num_iterations=votes, num_prefix=view.num_prefix,
            is_uniform=self.is_uniform, variance=self.variance,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiffRate:
    """A learned static schedule of dropping and folding; see `methods/diffrate.py`. Needs a class token."""

    preset: str = "deit-small-2.9g"
    """Name of the schedule; at another number of layers or patches its shares are used."""
    is_proportional: bool = True
    is_merging: ClassVar[bool] = True
    at_block_end: ClassVar[bool] = False

    def attention_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def counts(self, num_layers: int, num_patches: int) -> tuple[int, ...]:
        left = [num_patches, *(merged for _, merged in diffrate.diffrate_counts(self.preset, num_layers, num_patches))]
        return tuple(before - after for before, after in zip(left, left[1:]))

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        if view.num_prefix == 0:
            raise ValueError('method "diffrate" needs a class token and this model has none; take "tome"')
        score = topk.cls_score(view.attention(rows=1)[:, :, 0, view.num_prefix :])
        pruned, merged = diffrate.diffrate_counts(self.preset, view.num_layers, view.num_patches)[view.layer]
        return diffrate.diffrate(score, view.metric("input"), pruned, merged, num_prefix=view.num_prefix)


@dataclass(frozen=True, kw_only=True)
class _TopPatches(Schedule):
    """Base of what drops the patches with the lowest scores."""

    is_proportional: bool = False
    is_merging: ClassVar[bool] = False
    at_block_end: ClassVar[bool] = False

    def plan(self, view: LayerView, count: int) -> ReductionPlan:
        score = self.score(view, count)
        return topk.top_tokens(score, score.shape[1] - count, num_prefix=view.num_prefix)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(_TopPatches):
    """Drop random patches: the baseline. The draw depends on (seed, layer, place in the batch)."""

    seed: int = 0

    def score(self, view: LayerView, count: int) -> Tensor:
        metric = view.metric("key")
        B = metric.shape[0]
        generators = image_generators(self.seed, [view.layer * B + image for image in range(B)], metric.device)
        return topk.random_score(metric.shape[1] - view.num_prefix, generators=generators, device=metric.device)


@dataclass(frozen=True, kw_only=True)
class UniformTokens(_TopPatches):
    """Keep evenly spaced patches."""

    def score(self, view: LayerView, count: int) -> Tensor:
        metric = view.metric("key")
        T = metric.shape[1] - view.num_prefix
        return topk.uniform_score(metric.shape[0], T, T - count, device=metric.device)


@dataclass(frozen=True, kw_only=True)
class ClsTokens(_TopPatches):
    """Keep the patches the class token attends to (EViT without the fused token). Needs a class token."""

    def score(self, view: LayerView, count: int) -> Tensor:
        if view.num_prefix == 0:
            raise ValueError('method "cls" needs a class token and this model has none; take "uniform" or "tome"')
        return topk.cls_score(view.attention(rows=1)[:, :, 0, view.num_prefix :])


STRATEGIES: dict[str, type] = {
    "tome": ToMe,
    "pitome": PiToMe,
    "zero_tprune": ZeroTPrune,
    "diffrate": DiffRate,
    "random": RandomTokens,
    "uniform": UniformTokens,
    "cls": ClsTokens,
}


def create_strategy(method: "str | Strategy", **options) -> Strategy:
    """A strategy from its name and options, or the strategy itself."""
    if not isinstance(method, str):
        if options:
            raise TypeError(f"options {sorted(options)} belong to the strategy object that was given")
        return method
    if method not in STRATEGIES:
        raise ValueError(f"method {method!r} is not known for vision transformers; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[method](**options)


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """size: [B, N, 1]. Returns the key bias of proportional attention, [B, 1, 1, N]: softmax(q k^T + log s)."""
    return size.float().log().to(dtype)[:, None, None, :, 0]
