"""Which visual tokens reach the language model: every method that acts before it, by name.

A selector gets the views of images of one size and says which tokens stay, and, if it merges, what they become. The methods themselves are
the pure functions in `vistok.pruning.methods`; here they meet the views. A merged token takes the place, so the position, of the token it
grew from; PruMerge's extra token, the sum of everything dropped, that of the dropped token with the largest weight.

I images, n visual tokens of an image, K kept, D width of the language model (or of the vision tower, see `ImageViews.features`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.pruning.methods import topk, vision_attention
from vistok.pruning.methods.diversity import cdpruner, dart, divprune, text_relevance
from vistok.pruning.methods.topk import mask_of
from vistok.pruning.methods.video import evs
from vistok.pruning.plan import gather_rows
from vistok.pruning.towers import TowerViews
from vistok.rng import image_generators


@dataclass(frozen=True)
class ImageViews:
    """What a selector may look at: images (or videos) of one size."""

    features: Tensor
    """[I, n, D]: what the language model would see; with `is_pointwise` families and a merging method, what its projector would."""
    images: Sequence[int]
    """Their numbers in the batch."""
    num_frames: int = 1
    """Frames of each; n = num_frames * cells of a frame."""
    grid: tuple[int, int] | None = None
    """Rows and columns of a frame in raster order, None where the tokens lie otherwise (tiles, query tokens)."""
    words: Sequence[Tensor] = ()
    """[T, D] for each image: the embeddings of the text of its prompt, where the selector `reads_text`."""
    tower: TowerViews | None = None
    """The vision tower, where the selector reads `layers` of it."""


@dataclass(frozen=True)
class Selection:
    """What stays of each image."""

    indices: Tensor
    """[I, K] int64, in any order, no index twice."""
    features: Tensor | None = None
    """[I, K, D]: what the kept tokens become, None: they stay as they are."""


@dataclass(frozen=True)
class Selector:
    """A method before the language model."""

    select: Callable[[ImageViews, int], Selection | Tensor]
    """(views, K) -> Selection, or just the indices."""
    layers: Callable[[int], tuple[int, ...]] | None = None
    """Layers of the vision tower to read, from their number; None: none."""
    reads_text: bool = False
    merges: bool = False
    is_per_image: bool = False
    """Called with one image at a time: what it does depends on how sure that image's attention is."""
    is_adaptive: bool = False
    """Chooses its own number of tokens when no budget is given (K is then 0), and may miss a given one by a few."""
    for_video: bool = False
    """For videos only."""


def _second_last(depth: int) -> int:
    return max(depth - 2, 0)


def _class_token(views: ImageViews, keep: int) -> Tensor:
    return topk.top_indices(views.tower.attention(views.tower.layers[-1], views.images), keep)


def _visionzip(views: ImageViews, keep: int) -> Selection:
    layer = views.tower.layers[-1]
    attention, key = views.tower.attention(layer, views.images), views.tower.key(layer, views.images)
    num_images, n, _ = views.features.shape
    contextual = min(round(keep * 10 / 64), n - keep)  # of 64 the paper gives 10 to the contextual tokens
    dominant = keep - contextual
    prefix = lambda x: torch.cat([x.new_zeros(num_images, 1, x.shape[2]), x], dim=1)  # noqa: E731  a class token that is dropped again
    indices, tokens = vision_attention.visionzip(
        prefix(views.features), attention[:, None], prefix(key), dominant=dominant, contextual=contextual
    )
    indices = indices[:, 1:] - 1
    if contextual:
        rest = (~mask_of(indices, n)).nonzero()[:, 1].view(num_images, -1)
        indices = torch.cat([indices, rest[:, :: max(1, rest.shape[1] // contextual)][:, :contextual]], dim=1)
    return Selection(indices, tokens[:, 1:])


def _prumerge(views: ImageViews, keep: int, *, is_plus: bool) -> Selection:
    layer = views.tower.layers[-1]
    attention, key = views.tower.joint_attention(layer, views.images)[0], views.tower.joint_key(layer, views.images)[0].float()
    n = attention.shape[0]
    # the extra token is one of `keep`; the grid of "plus" is about three times what attention keeps
    share = vision_attention.outlier_share(attention) if keep == 0 else (keep - 0.5) / n / (4 if is_plus else 1)
    kept = vision_attention.prumerge_kept(attention, min(share, (n - 1) / n), is_plus=is_plus)
    merged = vision_attention.prumerge_merge(views.features[0], key, attention, kept)
    extra = attention.masked_fill(mask_of(kept[None], n)[0], -torch.inf).argmax()
    return Selection(torch.cat([kept, extra[None]])[None], merged[None])


def _hiprune(views: ImageViews, keep: int) -> Tensor:
    middle, deep = (views.tower.received(layer, views.images) for layer in (views.tower.layers[0], views.tower.layers[-1]))
    _, width = _grid_of(views, "HiPrune keeps the neighbours of its anchors")
    return vision_attention.hiprune(middle, deep, keep, grid_width=width).nonzero()[:, 1].view(-1, keep)


def _vscan(views: ImageViews, keep: int) -> Selection:
    shallow, deep = (views.tower.attention(layer, views.images) for layer in (views.tower.layers[0], views.tower.layers[-1]))
    height, width = _grid_of(views, "VScan cuts the image into windows")
    window = max(size for size in range(1, 7) if width % size == height % size == 0)  # 6 in the paper's grid of 24 x 24
    mask = vision_attention.vscan_mask(shallow, deep, keep, window=window, grid_width=width)
    return Selection(mask.nonzero()[:, 1].view(-1, keep), vision_attention.vscan_merge(views.features, mask))


def _grid_of(views: ImageViews, reason: str) -> tuple[int, int]:
    if views.grid is None or views.num_frames > 1:
        raise ValueError(f"{reason}, and the tokens of this input are no grid of rows and columns (tiles, videos); take another method")
    return views.grid


def _flowcut(views: ImageViews, keep: int) -> Tensor:
    """FlowCut on the whole tower's record: tokens leave the ranking layer by layer, the tower itself runs on all of them."""
    tower, score = views.tower, None
    alive = torch.arange(views.features.shape[1], device=views.features.device)[None]
    for step, layer in enumerate(tower.layers):
        cls, semantic = (look(layer, views.images).gather(1, alive) for look in (tower.attention, tower.similarity))
        score = vision_attention.flowcut_score(cls, semantic, gather_rows(tower.value(layer, views.images), alive), score)
        left, surplus = len(tower.layers) - step, alive.shape[1] - keep
        count = surplus if left == 1 else min(vision_attention.flowcut_count(cls, left, keep)[0], surplus)
        stays = topk.top_indices(score, alive.shape[1] - count)
        alive, score = alive.gather(1, stays), score.gather(1, stays)
    return alive


def _cdpruner(views: ImageViews, keep: int) -> Tensor:
    # no tower here has a contrastive text tower beside it: relevance is the cosine to the prompt's words in the language model's own space,
    # where, unlike among CLIP's patches, similar means relevant
    relevance = torch.cat([text_relevance(x[None], words, is_inverted=False) for x, words in zip(views.features, views.words)])
    return cdpruner(views.features, relevance, keep)


def _evs(views: ImageViews, keep: int) -> Tensor:
    return evs(views.features.unflatten(1, (views.num_frames, -1)), keep)


def _random(seed: int) -> Callable[[ImageViews, int], Tensor]:
    def select(views: ImageViews, keep: int) -> Tensor:
        features = views.features
        generators = image_generators(seed, views.images, features.device)
        return topk.top_indices(topk.random_score(features.shape[1], generators=generators, device=features.device), keep)

    return select


def _uniform(views: ImageViews, keep: int) -> Tensor:
    score = topk.uniform_score(*views.features.shape[:2], keep, device=views.features.device)
    return topk.top_indices(score, keep)


def selectors(seed: int = 0) -> dict[str, Selector]:
    """Every method before the language model, by name. seed: of "random"."""
    deep = lambda depth: (_second_last(depth),)  # noqa: E731
    last = lambda depth: (depth - 1,)  # noqa: E731
    return {
        "divprune": Selector(lambda views, keep: divprune(views.features, keep)),
        "cdpruner": Selector(_cdpruner, reads_text=True),
        "dart": Selector(lambda views, keep: dart(views.features, views.features.float().abs().sum(dim=-1), keep)),
        "cls": Selector(_class_token, layers=deep),
        "visionzip": Selector(_visionzip, layers=deep, merges=True),
        "prumerge": Selector(
            lambda views, keep: _prumerge(views, keep, is_plus=False), layers=last, merges=True, is_per_image=True, is_adaptive=True
        ),
        "prumerge+": Selector(
            lambda views, keep: _prumerge(views, keep, is_plus=True), layers=last, merges=True, is_per_image=True, is_adaptive=True
        ),
        "hiprune": Selector(_hiprune, layers=lambda depth: (round(depth * 9 / 24), _second_last(depth))),
        "vscan": Selector(_vscan, layers=lambda depth: (depth * 6 // 24, _second_last(depth)), merges=True),
        "flowcut": Selector(_flowcut, layers=lambda depth: tuple(range(1 - depth % 2, max(depth - 1, 1), 2)) or (0,), is_per_image=True),
        "evs": Selector(_evs, for_video=True),
        "random": Selector(_random(seed)),
        "uniform": Selector(_uniform),
    }


def create_selector(method: "str | Selector | Callable", *, seed: int = 0) -> Selector:
    """A selector by name, a `Selector` itself, or a function (views, K) -> indices or Selection."""
    if isinstance(method, Selector):
        return method
    if callable(method):
        return Selector(method)
    known = selectors(seed)
    if method not in known:
        raise ValueError(f"method {method!r} is not known before a language model; there are {', '.join(known)}, or give a function")
    return known[method]
