"""Methods that drop visual tokens between the layers of the language model: FastV, PyramidDrop, SparseVLM(+), VScan's second stage, DART.

A stage sits before one decoder layer. It sees a `StageView` of the prompt's tokens as they are there and answers with the tokens that stay.
What it needs of attention is a few query rows of the layer before (or of the layer to come), computed from the queries and keys of that
layer beside the kernel that ran: O(rows * tokens), never a map.

    FastV        mean_h A^{k-1}[last, j]                                   Chen et al. 2024, arXiv 2403.06764
    PyramidDrop  mean_h A^k[last, j], of the layer to come                 Xing et al. 2024, arXiv 2410.17247
    SparseVLM    mean over raters and heads of the logits of layer k-1     Zhang et al. 2024, arXiv 2410.04417; the dropped are recycled
    VScan        PyramidDrop's score, once, in the middle                  Zhang et al. 2025, arXiv 2505.22654
    DART         least like the pivots                                     Wen et al. 2025, arXiv 2502.11494

B prompts, Q tokens of a row, H heads, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.pruning.methods import topk
from vistok.pruning.methods.diversity import dart
from vistok.pruning.methods.sparsevlm import sparsevlm_recycle_plan, text_raters
from vistok.pruning.tap import AttentionCall, attention_of_rows, logits_of
from vistok.rng import image_generators

_TEXT_PIVOTS = 4
_NUM_HEADS = 14
SPARSEVLM_KEEPS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Of 576 tokens, what the three stages of SparseVLM 1.5 keep for a mean of so many over the layers."""
SPARSEVLM_PLUS_KEEPS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


@dataclass
class StageView:
    """The tokens of a prompt before one layer."""

    layer: int
    hidden: Tensor
    """[B, Q, D]."""
    is_visual: Tensor
    """[B, Q] bool: tokens that may leave."""
    is_text: Tensor
    """[B, Q] bool: the others, padding left out."""
    embeddings: Tensor
    """[B, Q, D]: what the same tokens were before the first layer."""
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin of each token's position, [B, Q, d], None for models without rotary positions."""
    call: AttentionCall | None = None
    """The attention call that was read: its last Q keys are these tokens'."""
    ordinal: Tensor | None = None
    """[B, Q] int64: which of the prompt's own visual tokens each one is, -1 for text."""

    @property
    def last(self) -> Tensor:
        """[B] int64: the last token of each prompt."""
        place = torch.arange(self.is_text.shape[1], device=self.is_text.device)
        return torch.where(self.is_text | self.is_visual, place, -1).amax(dim=1)

    def logits(self, rows: Tensor) -> Tensor:
        """rows: [B, R] int64. Returns [B, H, R, Q] float32: scaled logits of these tokens to each token, not masked."""
        return logits_of(self.call, rows)[..., -self.hidden.shape[1] :]

    def attention(self, rows: Tensor) -> Tensor:
        """rows: [B, R] int64. Returns [B, H, R, Q] float32: what these tokens attend to, as the kernel masked it."""
        return attention_of_rows(self.call, rows)[..., -self.hidden.shape[1] :]

    def score_of_last(self) -> Tensor:
        """[B, Q]: how much the last token attends to each token, mean over heads."""
        return self.attention(self.last[:, None]).mean(dim=(1, 2))


@dataclass(frozen=True)
class StageChoice:
    """What stays of the visual tokens."""

    stays: Tensor
    """[B, Q] bool; the other visual tokens leave. Whether text is set does not matter."""
    hidden: Tensor | None = None
    """[B, Q, D]: new states for tokens that took others in, None: states stay."""


@dataclass(frozen=True)
class LayerMethod:
    """A method inside the language model."""

    choose: Callable[[StageView, list[int]], StageChoice]
    """(view, number of visual tokens to keep of each prompt) -> choice."""
    reads: str = ""
    """Whose attention `view.call` is: "before" (the layer before the stage), "next" (the layer to come) or "" (none)."""
    merges: bool = False
    is_adaptive: bool = False
    """Decides itself how many stay."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where tokens leave, and how many of the prompt's own visual tokens are left then.

    Either layer with keep or keep_ratio (one stage), or layers with keep_ratios; a layer is the first that runs without the tokens.
    """

    layer: int | None = None
    keep: int | None = None
    keep_ratio: float | None = None
    layers: Sequence[int] = ()
    keep_ratios: Sequence[float] = ()
    floors: bool = False
    """Count int(N * ratio), as PyramidDrop does, rather than FastV's N - round(N (1 - ratio))."""

    def __post_init__(self):
        if (self.layer is None) == (not self.layers) or (self.layer is None and (self.keep, self.keep_ratio) != (None, None)):
            raise ValueError("give layer with keep or keep_ratio (one stage), or layers with keep_ratios (several)")
        if self.layer is not None:
            topk.count_to_keep(1, None if self.keep is None else 1, self.keep_ratio)
            return
        if len(self.layers) != len(self.keep_ratios) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={tuple(self.layers)} must rise, with as many keep_ratios, got {tuple(self.keep_ratios)}")
        topk.pyramiddrop_counts(1, self.keep_ratios)

    @property
    def at(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(self.layers) if self.layer is None else (self.layer,)

    def count(self, stage: int, num_visual: int) -> int:
        """Visual tokens that are left after the stage of a prompt that began with num_visual."""
        if num_visual == 0:
            return 0
        if self.layer is not None and self.keep is not None:
            return min(self.keep, num_visual)
        ratio = self.keep_ratio if self.layer is not None else self.keep_ratios[stage]
        return max(1, int(num_visual * ratio)) if self.floors else topk.count_to_keep(num_visual, keep_ratio=ratio)


def _best(view: StageView, counts: list[int], score: Tensor) -> StageChoice:
    """Keep the counts[b] visual tokens with the largest scores [B, Q] in each row."""
    rank = topk.ranked(score.masked_fill(~view.is_visual, -torch.inf)).argsort(dim=-1)
    return StageChoice(rank < torch.tensor(counts, device=score.device)[:, None])


def _by_last_token(view: StageView, counts: list[int]) -> StageChoice:
    return _best(view, counts, view.score_of_last())


def _dart(view: StageView, counts: list[int]) -> StageChoice:
    B, Q, _ = view.hidden.shape
    norm = view.call.key[:, :, -Q:].float().abs().sum(dim=(1, 3))  # [B, Q]
    stays = torch.zeros(B, Q, dtype=torch.bool, device=norm.device)
    for row, count in enumerate(counts):  # prompts have different numbers of tokens, and this runs once a prompt
        visual, text = view.is_visual[row].nonzero()[:, 0], view.is_text[row].nonzero()[:, 0]
        if not count < len(visual):
            stays[row, visual] = True
            continue
        pivots = text[topk.ranked(norm[row, text][None])[0, :_TEXT_PIVOTS]]
        chosen = dart(view.hidden[row, visual][None], norm[row, visual][None], count, text=view.hidden[row, pivots][None])
        stays[row, visual[chosen[0]]] = True
    return StageChoice(stays)


def _sparsevlm(view: StageView, counts: list[int], *, is_plus: bool) -> StageChoice:
    stays, hidden = torch.zeros_like(view.is_visual), view.hidden
    for row, count in enumerate(counts):  # raters, so query rows, differ in number; this runs once a prompt
        visual = view.is_visual[row].nonzero()[:, 0]
        if not count < len(visual):
            stays[row, visual] = True
            continue
        raters = _raters(view, row, visual)
        alone = _view_of(view, row)
        logits = alone.logits(raters[None])[0][..., visual]  # [H, R, n]
        if is_plus:
            mass = alone.attention(raters[None])[0, :, :, visual].sum(dim=2).mean(dim=1)  # [H]
            logits = logits[topk.ranked(mass[None])[0, :_NUM_HEADS]] / _gravity(alone, raters, visual)
        score = logits.mean(dim=(0, 1))
        if not is_plus:
            count, hidden = _recycle(view, row, visual, score, count, hidden, stays)
        stays[row, visual[topk.top_indices(score[None], count)[0]]] = True
    return StageChoice(stays, hidden)


def _raters(view: StageView, row: int, visual: Tensor) -> Tensor:
    """The words after the picture that look at it more than the average word does, in the embeddings."""
    text = view.is_text[row].nonzero()[:, 0]
    text = text[text > visual[-1]]
    if not len(text):
        return view.last[row : row + 1]
    raters = text[text_raters(view.embeddings[row, visual], view.embeddings[row, text])]
    return raters if len(raters) else text  # words that all look alike


def _view_of(view: StageView, row: int) -> StageView:
    call, one = view.call, slice(row, row + 1)
    mask = call.mask[one] if isinstance(call.mask, Tensor) and len(call.mask) > 1 else call.mask
    call = AttentionCall(call.module, call.query[one], call.key[one], call.value[one], mask, call.scale, call.options)
    rotary = None if view.rotary is None else tuple(x[one] for x in view.rotary)
    return StageView(view.layer, view.hidden[one], view.is_visual[one], view.is_text[one], view.embeddings[one], rotary, call)


def _gravity(view: StageView, raters: Tensor, visual: Tensor) -> Tensor | float:
    """SparseVLM+: the logits of a query and a key of ones, [R, n], relative to no distance. Words look near tokens up for this alone.

    Rotary positions make them the sum of cos((t - j) theta) over the frequencies, in any layout of the tables.
    """
    if view.rotary is None:
        return 1.0
    cos, sin = (x[0].float() for x in view.rotary)
    gravity = (cos[raters] @ cos[visual].T + sin[raters] @ sin[visual].T) / cos.shape[-1]
    return gravity.clamp(min=0.1)  # far away the sum passes through 0


def _recycle(view: StageView, row: int, visual: Tensor, score: Tensor, count: int, hidden: Tensor, stays: Tensor) -> tuple[int, Tensor]:
    """Of the dropped tokens the best 30 % (and one) are clustered; each cluster's mean takes its centre's place.

    The clusters are part of the budget. Returns the number of tokens kept as they are, and the states.
    """
    surplus = len(visual) - count
    num_recycled = min(int(surplus * 0.3) + 1, surplus)
    num_clusters = min(int(num_recycled / 10) + 1, num_recycled, count - 1)
    if num_clusters < 1:
        return count, hidden
    count -= num_clusters
    recycled = visual[topk.ranked(score[None])[0, count : count + num_recycled].sort().values]
    centres, means = sparsevlm_recycle_plan(hidden[row, recycled][None], num_clusters)
    hidden = hidden.clone()
    hidden[row, recycled[centres[0]]] = means[0]
    stays[row, recycled[centres[0]]] = True
    return count, hidden


def _random(seed: int) -> Callable[[StageView, list[int]], StageChoice]:
    def choose(view: StageView, counts: list[int]) -> StageChoice:
        B, Q = view.is_visual.shape
        # one draw for all rows: beams of one prompt must lose the same tokens
        draw = topk.random_score(Q, generators=image_generators(seed, [view.layer], view.hidden.device), device=view.hidden.device)
        order = (view.is_visual.cumsum(dim=1) - 1).clamp(min=0)  # the j-th visual token of a row, whatever is in front of it
        return _best(view, counts, draw.expand(B, Q).gather(1, order))

    return choose


def _uniform(view: StageView, counts: list[int]) -> StageChoice:
    number = view.is_visual.cumsum(dim=1) - 1
    total = view.is_visual.sum(dim=1, keepdim=True)
    keep = torch.tensor(counts, device=number.device)[:, None]
    # token j is kept if a new multiple of total / keep begins at it
    return StageChoice(((number + 1) * keep // total.clamp(min=1) > number * keep // total.clamp(min=1)) | (keep >= total))


def layer_methods(seed: int = 0) -> dict[str, LayerMethod]:
    """Every method inside the language model, by name. seed: of "random"."""
    return {
        "fastv": LayerMethod(_by_last_token, reads="before"),
        "pyramiddrop": LayerMethod(_by_last_token, reads="next"),
        "sparsevlm": LayerMethod(lambda view, counts: _sparsevlm(view, counts, is_plus=False), reads="before", merges=True),
        "sparsevlm+": LayerMethod(lambda view, counts: _sparsevlm(view, counts, is_plus=True), reads="before"),
        "vscan_llm": LayerMethod(_by_last_token, reads="next"),
        "dart": LayerMethod(_dart, reads="before"),
        "random": LayerMethod(_random(seed)),
        "uniform": LayerMethod(_uniform),
    }


INSIDE_ONLY = ("fastv", "pyramiddrop", "sparsevlm", "sparsevlm+", "vscan_llm")


def create_stages(method: str, num_layers: int, **options) -> Stages:
    """The stages that `options` (fields of `Stages`) name, or the paper's for a model of that depth, scaled from its 32 layers."""
    floors = method == "pyramiddrop"
    if "layer" in options or "layers" in options:
        return Stages(**options, floors=floors)
    if method in ("fastv", "vscan_llm"):
        return Stages(layer=2 if method == "fastv" else num_layers // 2, **options)
    if method == "pyramiddrop":
        return Stages(**{"keep_ratios": (0.5, 0.25, 0.125), **options}, layers=_scaled((8, 16, 24), num_layers), floors=True)
    if method in ("sparsevlm", "sparsevlm+"):
        keeps = (SPARSEVLM_KEEPS if method == "sparsevlm" else SPARSEVLM_PLUS_KEEPS)[192]
        return Stages(**{"keep_ratios": tuple(keep / 576 for keep in keeps), **options}, layers=_scaled((3, 7, 16), num_layers))
    raise ValueError(f"method {method!r} inside the language model needs layer, or layers: which layer runs first without the tokens")


def _scaled(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers of a 32-layer model in one of another depth, rising and at least 1 apart."""
    scaled: list[int] = []
    for layer in layers:
        scaled.append(max(round(layer * num_layers / 32), scaled[-1] + 1 if scaled else 1))
    if scaled[-1] >= num_layers:
        raise ValueError(f"{len(layers)} stages do not fit into {num_layers} layers: give layers and keep_ratios")
    return tuple(scaled)
