"""Distances between two sets of images, seen through any feature net.

    Frechet:  |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)        Gaussians fitted to the two sets of features
    Kernel:   MMD^2 with k(x, y) = (x.y / D + 1)^3, unbiased, averaged over random subsets
    Precision / recall: share of one set inside the k-nearest-neighbour balls of the other

Heusel et al. 2017, arXiv 1706.08500; Binkowski et al. 2018, arXiv 1801.01401, section 4; Kynkaanniemi et al. 2019, arXiv 1904.06991,
section 2.
"FID" is the Frechet distance on one particular Inception; on other features it is a Frechet distance and its features must be named.

N images, D width of the features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches of any size, in float64 on the CPU (Chan's update: no cancellation)."""

    def __init__(self):
        self.count = 0
        self.mean: Tensor | None = None
        self._scatter: Tensor | None = None
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of one set of features [N, D]."""
        statistics = cls()
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add a batch. features: [B, D] float; an empty batch changes nothing. Raises ValueError where one is not finite."""
        rows = _as_float64(features)
        if rows.shape[0] == 0:
            return
        other = FeatureStatistics()
        other.count, other.mean = rows.shape[0], rows.mean(dim=0)
        centred = rows - other.mean
        other._scatter = centred.T @ centred
        self.merge(other)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add all that another accumulator has seen, for example on another process."""
        if other.count == 0:
            return
        self._root = None
        if self.count == 0:
            self.count, self.mean, self._scatter = other.count, other.mean.clone(), other._scatter.clone()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of width {other.mean.shape[0]} cannot join features of width {self.mean.shape[0]}")
        total = self.count + other.count
        delta = other.mean - self.mean
        self._scatter += other._scatter + torch.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, divided by N - 1. Raises ValueError: fewer than two images were seen."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, {self.count} seen")
        return self._scatter / (self.count - 1)

    def root_covariance(self) -> Tensor:
        """[D, D] float64: the symmetric square root of the covariance, computed once."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return self._root


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians of two sets. Symmetric up to rounding, never negative.

    With fewer images than feature dimensions the covariances are singular and the value grows as N shrinks: compare at equal N only.
    """
    if a.count < 2 or b.count < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images a side, got {a.count} and {b.count}")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the two sets have features of different width: {a.mean.shape[0]} and {b.mean.shape[0]}")
    root = a.root_covariance()
    product = root @ b.covariance @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(float(distance), 0.0)


def frechet_between(a: Tensor, b: Tensor) -> float:
    """The same distance from two sets of features [N, D] and [M, D], whichever way is cheaper.

    Below D images the covariances are singular; then tr (S_a^1/2 S_b S_a^1/2)^1/2 is the sum of the singular values of the [N, M] product
    of the centred features, and no D x D matrix is made.
    """
    if max(len(a), len(b)) >= a.shape[1] or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        return frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    a, b = _as_float64(a), _as_float64(b)
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    a, b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    return max(float(distance), 0.0)


class KernelDistance(NamedTuple):
    """Kernel distance over subsets: mean, standard deviation between subsets (None for one subset), and how many of which size."""

    mean: float
    std: float | None
    num_subsets: int
    subset_size: int


def kid(a: Tensor, b: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    """Kernel distance of two sets of features; unbiased, so it may be slightly negative for equal sets.

    a, b: [N, D] float. Subsets are drawn without replacement from a generator of this seed; when both sets have at most
    `subset_size` images they are compared whole, once.
    """
    a, b = _as_float64(a), _as_float64(b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, got {len(a)} and {len(b)}")
    if max(len(a), len(b)) <= subset_size:
        return KernelDistance(_mmd(a, b), None, 1, min(len(a), len(b)))
    size = min(subset_size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([_mmd(*(x[torch.randperm(len(x), generator=generator)[:size]] for x in (a, b))) for _ in range(num_subsets)])
    return KernelDistance(float(values.mean()), float(values.std()) if num_subsets > 1 else None, num_subsets, size)


def _mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy: the diagonals of the two inner blocks do not count."""
    n, m = len(a), len(b)
    inner_a, inner_b, outer = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    within = (inner_a.sum() - inner_a.trace()) / (n * (n - 1)) + (inner_b.sum() - inner_b.trace()) / (m * (m - 1))
    return float(within - 2 * outer.mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """precision: share of samples that look like the reference; recall: share of the reference that the samples cover."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3, chunk_size: int = 1024) -> PrecisionRecall:
    """Improved precision and recall. samples, reference: features [N, D] float, more than k of each; memory chunk_size x N.

    Each image of a set owns the ball that reaches its k-th nearest neighbour within the set; the set's manifold is the union.
    """
    samples, reference = _as_float64(samples), _as_float64(reference)
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"k={k} nearest neighbours need more than {k} images a side, got {len(samples)} and {len(reference)}")
    return PrecisionRecall(
        precision=_share_inside(samples, reference, _radii(reference, k, chunk_size), chunk_size),
        recall=_share_inside(reference, samples, _radii(samples, k, chunk_size), chunk_size),
    )


def _radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    """[N]: distance from each point to its k-th nearest other point."""
    radii = []
    for start in range(0, len(points), chunk_size):
        distances = torch.cdist(points[start : start + chunk_size], points)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> float:
    inside = sum(int((torch.cdist(part, centres) <= radii).any(dim=1).sum()) for part in points.split(chunk_size))
    return inside / len(points)


def _as_float64(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got shape {tuple(features.shape)}")
    # float64 on the CPU: some accelerators have no float64, and a distance must not depend on the device
    features = features.detach().to("cpu", torch.float64)
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite()).any(dim=1).nonzero()[0, 0])
        raise ValueError(f"the features of image {row} of this batch are not finite: the images or the feature net hold NaN or infinity")
    return features
