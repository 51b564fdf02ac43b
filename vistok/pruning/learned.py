"""Pruning that is learned: ATP-LLaVA's thresholds and MrT5's delete gate, between the layers of a frozen language model.

ATP-LLaVA (Ye et al. 2024, arXiv 2412.00447), before layer l, for a visual token j:

    S_self_j  = mean over heads and visual tokens i of the logit i -> j;   S_cross_j = mean over heads and words t of A_tj
    S_red     = (minmax S_self + minmax S_cross) / 2                            both on one scale, for each prompt
    S_spa_j   = max(0, 1 - 3 R) for the coarsest uniform grid of rate R that j lies on, else 0
    theta_r, theta_s = sigmoid(w . statistics of S_self and S_cross)            for each prompt and layer
    M         = max(sigmoid((S_red - theta_r) T), sigmoid((S_spa - theta_s) T))

Delete gate (MrT5, Kallini et al. 2024, arXiv 2410.20771):   G_j = k sigmoid(z_j), z_j = w . LN(h_j) + b, k = -30;   stays if G_j > k / 2
    in training with the noise that MrT5 has as an option, z_j -> 2 (z_j + logistic noise): a token is there or gone, seldom in between

In training all tokens stay and log M (or G) is added to the logits that others have for j; masks of earlier stages multiply. In use a token
with M <= 1/2 leaves, and with masks of 0 and 1 both are the same. The thresholds read detached scores: only they learn. ATP's own training
also tunes the language model, which is frozen here; its thresholds see statistics that do not depend on the number of tokens.

B prompts, Q tokens, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.modeling import VisualModel
from vistok.pruning.families import attention_of, family_of, kind_of, text_model, visual_mask
from vistok.pruning.hooks import Hooked
from vistok.pruning.masks import pack_left, validity
from vistok.pruning.stages import LayerMethod, StageChoice, Stages, StageView
from vistok.pruning.tap import AttentionCall, Tap, attention_of_rows
from vistok.registry import register
from vistok.rng import rand

_NUM_STATISTICS = 12


@dataclass(frozen=True)
class SoftChoice:
    """What a learned stage thinks of each token."""

    bias: Tensor
    """[B, Q] at most 0: added to the logits that other tokens have for this one."""
    kept: Tensor
    """[B, Q] in [0, 1]: its share in the count of tokens that stay; it leaves at 1/2 or less."""


class LearnedPruner(VisualModel):
    """Base: stages before some decoder layers, each a module (view, candidates) -> SoftChoice."""

    stages: nn.ModuleList
    draws_noise: ClassVar[bool] = False
    """Whether its stages take uniform numbers [B, Q] as a third argument, with which they are drawn in training."""

    def as_method(self) -> tuple[LayerMethod, Stages]:
        """What `vistok.pruning.layers.PrunedLayers` takes: tokens leave for good, as many as the model thinks right."""
        layers = self.settings.layers

        def choose(view: StageView, counts: list[int]) -> StageChoice:
            return StageChoice(stays_of(self.stages[layers.index(view.layer)](view, view.is_visual), view.is_visual))

        return LayerMethod(choose, reads="before", is_adaptive=True), Stages(layers=layers, keep_ratios=(1.0,) * len(layers))


def stays_of(choice: SoftChoice, candidates: Tensor) -> Tensor:
    """[B, Q] bool: the candidates that stay; of each prompt at least the best one."""
    kept = choice.kept.masked_fill(~candidates, -1)
    return candidates & ((kept > 0.5) | (kept == kept.amax(dim=1, keepdim=True)))


@dataclass(frozen=True, kw_only=True)
class ATPConfig:
    """Where ATP prunes and what it sees of the picture's shape."""

    layers: tuple[int, ...] = (4, 14, 24)
    """First layers that run without the tokens of each stage; the paper's, of 32."""
    grid: int = 24
    """Tokens along a side of an image."""
    strides: tuple[int, ...] = (4, 2)
    """Of the uniform grids, coarsest first; a grid of stride s has rate 1 / s^2. The paper's finest rate is 1/4."""
    rate_weight: float = 3.0
    """How fast the spatial score falls with the rate."""
    temperature: float = 10.0

    def __post_init__(self):
        if not self.layers or min(self.layers) < 1 or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={self.layers} must rise and begin at 1 or later")
        if self.grid < 1 or self.temperature <= 0 or any(stride < 1 for stride in self.strides):
            raise ValueError(f"grid={self.grid}, temperature={self.temperature}, strides={self.strides} must be positive")


class _Thresholds(nn.Module):
    """One stage of ATP."""

    def __init__(self, config: ATPConfig):
        super().__init__()
        self.config = config
        self.head = nn.Linear(_NUM_STATISTICS, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, view: StageView, candidates: Tensor) -> SoftChoice:
        """view.is_visual: the tokens that are (still) there, which scores and statistics are over. candidates: those to mask."""
        own, cross = _received_by_visual(view).detach(), _received_from_text(view).detach()
        own, cross = (_on_unit_scale(score, view.is_visual) for score in (own, cross))
        statistics = torch.cat([_statistics(score, view.is_visual) for score in (own, cross)], dim=-1)
        redundant, spatial = self.head(statistics).sigmoid()[..., None].unbind(1)  # thresholds, [B, 1] each
        T = self.config.temperature
        mask = torch.maximum((((own + cross) / 2 - redundant) * T).sigmoid(), ((self._spatial(view) - spatial) * T).sigmoid())
        return SoftChoice(mask.log().masked_fill(~candidates, 0), mask.masked_fill(~candidates, 0))

    def _spatial(self, view: StageView) -> Tensor:
        """[B, Q]: the score of the coarsest grid that each token lies on."""
        side = self.config.grid
        row, column = view.ordinal.clamp(min=0) % side**2 // side, view.ordinal.clamp(min=0) % side
        score = torch.zeros(view.ordinal.shape, device=view.ordinal.device)
        for stride in self.config.strides:
            on_grid = (row % stride == 0) & (column % stride == 0)
            score = torch.maximum(score, on_grid * max(0.0, 1 - self.config.rate_weight / stride**2))
        return score


@register
class ATP(LearnedPruner):
    """Adaptive token pruning: thresholds for each prompt and stage."""

    Config = ATPConfig

    def __init__(self, config: ATPConfig):
        super().__init__(config)
        self.stages = nn.ModuleList(_Thresholds(config) for _ in config.layers)


@dataclass(frozen=True, kw_only=True)
class DeleteGateConfig:
    """Where gates stand and how wide the states they read are."""

    width: int
    layers: tuple[int, ...] = (4, 14, 24)
    strength: float = 30.0
    """-k: the bias of a token that is gone."""

    def __post_init__(self):
        if self.width < 1 or self.strength <= 0 or not self.layers or min(self.layers) < 1:
            raise ValueError(f"width={self.width}, strength={self.strength}, layers={self.layers} must be positive")


class _Gate(nn.Module):
    """One stage of the delete gate."""

    def __init__(self, config: DeleteGateConfig):
        super().__init__()
        self.strength = config.strength
        self.norm, self.score = nn.LayerNorm(config.width), nn.Linear(config.width, 1)
        nn.init.constant_(self.score.bias, -3.0)  # at first nearly everything stays

    def gone(self, hidden: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """hidden: [B, Q, D]. uniforms: [B, Q] in [0, 1), to draw it. Returns [B, Q] in (0, 1): how much each token is gone.

        Without the draw, a gate that is a little shut for every token meets a budget and says nothing about which tokens could leave.
        """
        score = self.score(self.norm(hidden.detach().float()))[..., 0]
        return score.sigmoid() if uniforms is None else (2 * (score + uniforms.logit(eps=1e-6))).sigmoid()

    def forward(self, view: StageView, candidates: Tensor, uniforms: Tensor | None = None) -> SoftChoice:
        gone = self.gone(view.hidden, uniforms)
        return SoftChoice((-self.strength * gone).masked_fill(~candidates, 0), (1 - gone).masked_fill(~candidates, 0))


@register
class DeleteGate(LearnedPruner):
    """MrT5's gate: a token is deleted by its own state. In vision transformers: `vistok.pruning.learned_vit`."""

    Config = DeleteGateConfig
    draws_noise = True

    def __init__(self, config: DeleteGateConfig):
        super().__init__(config)
        self.stages = nn.ModuleList(_Gate(config) for _ in config.layers)


class SoftLayers(Hooked):
    """The learned stages on a model for training: all tokens stay, and their masks bias the attention.

    After a forward `kept` holds, for each stage, [B, Q] the product of the masks so far (0 for text), and `num_visual` [B] how many there
    were. is_hard: masks of 0 and 1, no gradients; then the logits are those of `vistok.prune(model, pruner)`. answers: [B, Q] bool, words
    that are not there yet when a prompt is pruned: no score reads them. generators: one a prompt, for a pruner that draws noise.
    """

    def __init__(
        self, model: nn.Module, pruner: LearnedPruner, *,
        is_hard: bool = False, answers: Tensor | None = None, generators: Sequence[torch.Generator] | None = None,
    ):  # fmt: skip
        family, text = family_of(model), text_model(model)
        layers = pruner.settings.layers
        if family.not_inside or text.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"soft masks need attention biases in every layer; {kind_of(model)} as it is set up takes none")
        if layers[-1] >= len(text.layers):
            raise ValueError(f"the pruner has stages before layers {layers}, the model has {len(text.layers)}")
        self.model, self.pruner, self.text, self.is_hard, self.answers = model, pruner, text, is_hard, answers
        self.generators = generators
        self.kept: list[Tensor] = []
        self._calls: dict[int, AttentionCall] = {}
        self._handles: list = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            text.register_forward_pre_hook(self._enter_text, with_kwargs=True),
        ]
        for layer in layers:
            self._handles.append(Tap(attention_of(text.layers[layer - 1]), self._reader(layer)))
        for number in range(layers[0], len(text.layers)):
            hook = self._layer_hook(number)
            self._handles.append(text.layers[number].register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def num_visual(self) -> Tensor:
        """[B] int64: visual tokens of each prompt in the last forward."""
        return self._is_visual.sum(dim=1)

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._is_visual, self._mask = visual_mask(model, ids), kwargs.get("attention_mask")

    def _enter_text(self, text: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("past_key_values") is not None and kwargs["past_key_values"].get_seq_length():
            raise ValueError("soft masks are for training forwards over whole sequences, without a cache")
        B, Q = self._is_visual.shape
        self._is_valid, _ = validity(self._mask, B, Q, self._is_visual.device)
        self.kept, self._bias, self._embeddings = [], None, kwargs["inputs_embeds"]

    def _reader(self, layer: int):
        def read(call: AttentionCall) -> None:
            self._calls[layer] = call

        return read

    def _layer_hook(self, number: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict):
            hidden = args[0] if args else kwargs["hidden_states"]
            if number in self.pruner.settings.layers:
                self._bias = self._stage(number, hidden, kwargs)
            return args, {**kwargs, "attention_mask": self._biased(kwargs.get("attention_mask"), hidden)}

        return hook

    def _stage(self, number: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """[B, Q]: the bias of this stage and the ones before."""
        before = self.kept[-1] if self.kept else self._is_visual.float()
        alive = self._is_visual & (before > 0.5)
        ordinal = torch.where(self._is_visual, self._is_visual.cumsum(dim=1) - 1, -1)
        is_text = self._is_valid & ~self._is_visual
        if self.answers is not None:
            is_text = is_text & ~self.answers
        view = StageView(
            number, hidden, alive, is_text, self._embeddings, kwargs.get("position_embeddings"),
            self._calls.pop(number), ordinal,
        )  # fmt: skip
        draws = ()
        if self.generators is not None:  # one number for each visual token in its order: padding changes none
            draws = (rand(alive.shape[1:], self.generators, device=alive.device).gather(1, ordinal.clamp(min=0)),)
        choice = self.pruner.stages[self.pruner.settings.layers.index(number)](view, self._is_visual, *draws)
        if self.is_hard:
            stays = stays_of(choice, alive)
            gone = torch.full_like(choice.bias, -torch.inf).masked_fill(stays | ~self._is_visual, 0)
            choice = replace(choice, kept=stays.to(choice.kept), bias=gone)
        self.kept.append(before * choice.kept)
        return choice.bias if self._bias is None else self._bias + choice.bias

    def _biased(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """The layer's mask with the bias on every key but a token's own."""
        Q = hidden.shape[1]
        eye = torch.eye(Q, dtype=torch.bool, device=hidden.device)
        bias = self._bias[:, None, None, :].to(hidden.dtype).masked_fill(eye, 0)  # [B, 1, Q, Q]
        if mask is None:
            mask = torch.ones(Q, Q, dtype=torch.bool, device=hidden.device).tril()
        lowest = torch.finfo(hidden.dtype).min
        return bias.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (bias + mask).clamp(min=lowest)


def budget_loss(kept: list[Tensor], num_visual: Tensor, layers: tuple[int, ...], *, target: float, floor: float) -> dict[str, Tensor]:
    """What ATP's loss adds to the answers': a price for late tokens, the distance of the mean count from the target, and a floor.

    kept: [B, Q] of each stage. num_visual: [B]. target, floor: shares of the visual tokens. Without a floor the budget is met by emptying
    the last stages. Returns scalars: `late` = sum_l N_l / N * l, `budget` = |mean_l N_l - target N|, `floor` = sum_l max(0, floor N - N_l).
    """
    N = num_visual.float()
    counts = torch.stack([mask.sum(dim=1) for mask in kept])  # [stages, B]
    depth = torch.tensor(layers, dtype=torch.float32, device=counts.device)[:, None]
    return {
        "late": (counts / N * depth).sum(dim=0).mean(), "budget": (counts.mean(dim=0) - target * N).abs().mean(),
        "floor": F.relu(floor * N - counts).sum(dim=0).mean(),
    }  # fmt: skip


def _received_by_visual(view: StageView) -> Tensor:
    """[B, Q]: mean over heads and visual tokens i of the logit i -> j. The mean of logits is the logit of the mean query: one row."""
    query, key = view.call.query.float(), view.call.key.float()
    weight = view.is_visual.float() / view.is_visual.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.einsum("bhqd,bq->bhd", query, weight).unflatten(1, (key.shape[1], -1)).mean(dim=2)  # [B, groups, d]
    return torch.einsum("bgd,bgkd->bk", mean, key)[:, -view.hidden.shape[1] :] * view.call.scale / key.shape[1]


def _received_from_text(view: StageView) -> Tensor:
    """[B, Q]: mean over heads and words of what the words attend to."""
    rows = pack_left(view.is_text)
    attention = attention_of_rows(view.call, rows.clamp(min=0))[..., -view.hidden.shape[1] :].mean(dim=1)  # [B, R, Q]
    is_word = (rows >= 0)[..., None]
    return attention.masked_fill(~is_word, 0).sum(dim=1) / is_word.sum(dim=1)  # padding, which stands in for a word, sees nothing: nan


def _on_unit_scale(score: Tensor, among: Tensor) -> Tensor:
    """[B, Q]: 0 at the smallest, 1 at the largest of the tokens among which a score counts."""
    low = score.masked_fill(~among, torch.inf).amin(dim=1, keepdim=True)
    high = score.masked_fill(~among, -torch.inf).amax(dim=1, keepdim=True)
    return (score - low) / (high - low).clamp(min=1e-6)


def _statistics(score: Tensor, among: Tensor) -> Tensor:
    """[B, 6]: mean, deviation, maximum and quartiles, whatever the number of tokens."""
    count = among.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (score * among).sum(dim=1, keepdim=True) / count
    deviation = (((score - mean) * among).square().sum(dim=1, keepdim=True) / count).sqrt()
    known = score.masked_fill(~among, torch.nan)
    quartiles = torch.nanquantile(known, torch.tensor([0.25, 0.5, 0.75], device=score.device), dim=1).T
    return torch.cat([mean, deviation, score.masked_fill(~among, 0).amax(dim=1, keepdim=True), quartiles], dim=1).nan_to_num(0)
