"""How much of an image's meaning its features hold: a linear probe, nearest neighbours, and retrieval between images and captions.

    linear     W = argmin |Y - X W|^2 + a |W|^2           X: features, centred and scaled on the training set; Y: one-hot classes, or
                                                          caption vectors; the closed form, so there is nothing left to converge
    strength   a = the one of a grid with the least leave-one-out error on the training set, in closed form too:
               (y_i - f(x_i)) / (1 - h_ii)                h: diagonal of the hat matrix X (X^T X + a)^-1 X^T + 1/n (Allen 1974, PRESS)
    neighbours the class most votes name among the k nearest training images by cosine
    retrieval  share of images among whose k captions nearest to f(x) is a right one, and the same from captions to images

The test set chooses nothing: neither strength nor scaling. n training images, m test images, D width, C classes, E width of a caption.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-12, 13))  # in units of the mean eigenvalue of X^T X
DEAD = 1e-6  # a feature whose deviation is below this share of the largest one is left out
BOOTSTRAPS = 1000
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class LinearMap:
    """y = (x - mean) / scale W + offset.

    weight: [D, C] float64; a dead feature has rows of 0. strength: the regularisation chosen, in units of the mean eigenvalue.
    error: its leave-one-out error as a share of the variance of y, 1 for a map that knows nothing.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    offset: Tensor
    strength: float
    error: float

    def __call__(self, features: Tensor) -> Tensor:
        """[m, D] -> [m, C] float64."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.offset


@dataclass(frozen=True)
class Spectrum:
    """What all ridge regressions on the same training features share, its decomposition above all, which is most of their time.

    X: [n, D] float64, features centred and scaled, dead ones 0; X = U diag(sqrt s) V^T with U [n, r] and s [r], those of rank only.
    """

    mean: Tensor
    scale: Tensor
    X: Tensor
    U: Tensor
    s: Tensor


def decompose(features: Tensor) -> Spectrum:
    """The spectrum of training features [n, D], by one eigendecomposition of the smaller of X^T X and X X^T; float64.

    Raises ValueError: not two axes, fewer than 2 rows, or a number that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features [n, D] of n >= 2 rows are needed, got {list(features.shape)}")
    X = features.double()
    if not bool(X.isfinite().all()):
        raise ValueError("features of a probe must be finite")
    mean, scale = X.mean(0), X.std(0, unbiased=False)
    alive = scale > DEAD * scale.max()
    scale = torch.where(alive, scale, torch.ones_like(scale))
    X = (X - mean) / scale * alive
    return Spectrum(mean, scale, X, *_left_vectors(X))


def fit_ridge(features: Tensor | Spectrum, targets: Tensor, *, strengths: tuple[float, ...] = STRENGTHS) -> LinearMap:
    """The ridge regression of targets [n, C] on features [n, D] or their spectrum, its strength chosen by leave-one-out error; float64.

    Raises ValueError: shapes do not fit, fewer than 2 rows, or a number that is not finite.
    """
    spectrum = features if isinstance(features, Spectrum) else decompose(features)
    X, U, s, n = spectrum.X, spectrum.U, spectrum.s, len(spectrum.X)
    if targets.ndim != 2 or len(targets) != n:
        raise ValueError(f"targets [n, C] of the {n} rows of the features are needed, got {list(targets.shape)}")
    Y = targets.double()
    if not bool(Y.isfinite().all()):
        raise ValueError("targets of a probe must be finite")
    offset = Y.mean(0)
    Y = Y - offset
    inside = U.T @ Y
    total, mean_eigenvalue = Y.square().sum(), s.mean() if len(s) else torch.ones(())
    best = (float("inf"), 0.0)
    for strength in strengths:
        shrink = s / (s + strength * mean_eigenvalue)
        leverage = U.square() @ shrink + 1 / n
        residual = (Y - U @ (shrink[:, None] * inside)) / (1 - leverage).clamp(min=1e-9)[:, None]
        error = float(residual.square().sum() / total.clamp(min=1e-30))
        best = min(best, (error, strength))
    a = best[1] * mean_eigenvalue
    weight = X.T @ (U @ (inside / (s + a)[:, None]))  # (X^T X + a)^-1 X^T Y = X^T (X X^T + a)^-1 Y
    return LinearMap(spectrum.mean, spectrum.scale, weight, offset, best[1], best[0])


def _left_vectors(X: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors U [n, r] and squared singular values s [r] of X [n, D], those of rank only."""
    n, D = X.shape
    s, vectors = torch.linalg.eigh(X.T @ X if D <= n else X @ X.T)
    kept = s > max(n, D) * torch.finfo(s.dtype).eps * s.max().clamp(min=1e-30)
    s, vectors = s[kept], vectors[:, kept]
    return (X @ vectors / s.sqrt() if D <= n else vectors), s


def linear_probe(
    train: Tensor | Spectrum, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, num_classes: int
) -> tuple[Tensor, LinearMap]:
    """Whether each test image is classified right, [m] bool, by the ridge regression of one-hot classes; and the map.

    train [n, D] or its spectrum, test [m, D]; labels int64 in [0, num_classes).
    """
    fitted = fit_ridge(train, F.one_hot(train_labels, num_classes))
    return fitted(test).argmax(1) == test_labels, fitted


def knn_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, num_classes: int, neighbours: int = 5) -> Tensor:
    """Whether each test image is classified right, [m] bool, by votes of its nearest training images, each weighed by its closeness.

    Closeness is the cosine of features centred on the training mean. Memory is 1,024 x n. Raises ValueError: neighbours outside 1 to n.
    """
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"neighbours={neighbours} but there are {len(train)} training images")
    centre = train.double().mean(0)
    keys = F.normalize(train.double() - centre, dim=1)
    right = []
    for part, labels in zip(test.split(1024), test_labels.split(1024)):
        nearest = (F.normalize(part.double() - centre, dim=1) @ keys.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[nearest.indices], 1 + nearest.values)  # 1 + cosine: a vote is never negative
        right.append(votes.argmax(1) == labels)
    return torch.cat(right)


# -- retrieval ----------------------------------------------------------------------------------------------------------------------------


def first_right_rank(queries: Tensor, keys: Tensor, groups: Tensor) -> Tensor:
    """How many wrong keys are at least as near to each query as the best right one: [m] int64, 0 is best.

    queries, keys: [m, E], compared by cosine; groups: [m] int64, key j is right for query i where they are equal. A tie counts against the
    query, so features that say nothing (all alike, all zero) find nothing.
    """
    queries, keys = F.normalize(queries.double(), dim=1), F.normalize(keys.double(), dim=1)
    ranks = []
    for part, own in zip(queries.split(1024), groups.split(1024)):
        closeness = part @ keys.T
        is_right = own[:, None] == groups
        best = closeness.masked_fill(~is_right, -2).amax(1, keepdim=True)
        ranks.append(((closeness >= best - 1e-12) & ~is_right).sum(1))
    return torch.cat(ranks)


def retrieval_ranks(images: Tensor, captions: Tensor, groups: Tensor, *, centres: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """Ranks in both directions, {"i2t": [m], "t2i": [m]} int64, of vectors in one space [m, E]; groups: [m], equal for equal captions.

    centres: what to subtract from images and from captions first, each [E].
    """
    if centres is not None:
        images, captions = images.double() - centres[0], captions.double() - centres[1]
    return {"i2t": first_right_rank(images, captions, groups), "t2i": first_right_rank(captions, images, groups)}


def mapped_retrieval(
    train: Tensor | Spectrum, train_captions: Tensor, test: Tensor, test_captions: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """Ranks of test images' features [m, D] and captions [m, E] through a ridge map fitted on the training set; see retrieval_ranks.

    Both sides are centred on the mean caption of the training set, which every caption shares.
    """
    fitted = fit_ridge(train, train_captions)
    return retrieval_ranks(fitted(test), test_captions, groups, centres=(fitted.offset, fitted.offset))


def recalls(ranks: dict[str, Tensor]) -> dict[str, float]:
    """R@1, R@5 and R@10 of both directions, as {"i2t_r1": ..., "t2i_r10": ...}; ranks: [m] each, see retrieval_ranks."""
    return {f"{name}_r{k}": float((rank < k).double().mean()) for name, rank in ranks.items() for k in RECALL_AT}


def chance_recall(groups: Tensor, k: int) -> float:
    """R@k of a random order: 1 - C(m - g, k) / C(m, k), mean over queries with g right answers among m.

    groups: [m] int64, equal where queries share their right answers.
    """
    m = len(groups)
    sizes = (groups[:, None] == groups).sum(1).double()
    missed = torch.ones(m, dtype=torch.float64)
    for i in range(min(k, m)):
        missed *= ((m - sizes - i) / (m - i)).clamp(min=0)
    return float((1 - missed).mean())


def caption_groups(captions: list[str]) -> Tensor:
    """A number a caption [m] int64, equal where captions are."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions], dtype=torch.int64)


def bootstrap_std(right: Tensor, *, groups: Tensor | None = None, seed: int = 0, num_resamples: int = BOOTSTRAPS) -> float:
    """Standard deviation of the mean of `right` [m] over resampled test images.

    groups: [m] int64; images of one group (the same thing drawn in two styles) are drawn together, since they are no two observations.
    """
    right = right.double()
    groups = torch.arange(len(right)) if groups is None else groups.unique(return_inverse=True)[1]
    num_groups = int(groups.max()) + 1
    sums = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, right)
    sizes = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, torch.ones_like(right))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_groups, (num_resamples, num_groups), generator=generator)
    return float((sums[drawn].sum(1) / sizes[drawn].sum(1)).std())
