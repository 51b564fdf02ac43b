"""Is a reconstruction still recognisable as its own original?

Each reconstruction looks for the nearest of all originals in a fixed feature space; the share that finds its own is the score.
Chance is 1 / N. Unlike PSNR it does not reward blur: a grey mean image finds nobody.

N images, D width of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.metrics.features import FeatureNet, features_of

DISTANCES = ("cosine", "l2")


def nearest_is_right(
    reconstructions: Tensor, originals: Tensor, features: FeatureNet, *, distance: str = "cosine", batch_size: int = 64
) -> float:
    """Share of reconstructions whose nearest original, among all originals, is their own.

    reconstructions, originals: [N, 3, H, W] in [-1, 1]; row i of one belongs to row i of the other.
    distance: "cosine" of features centred on the mean of the originals, or "l2".
    """
    queries = torch.cat([features_of(features, part) for part in reconstructions.split(batch_size)])
    keys = torch.cat([features_of(features, part) for part in originals.split(batch_size)])
    return nearest_feature_is_right(queries, keys, distance=distance)


def nearest_feature_is_right(queries: Tensor, keys: Tensor, *, distance: str = "cosine", chunk_size: int = 1024) -> float:
    """The same for features [N, D] computed before. Memory is chunk_size x N.

    A tie between the own original and its exact duplicate counts as right; a query that is no direction at all (the mean of the
    originals under "cosine") or not finite counts as wrong.
    """
    if queries.shape != keys.shape or keys.ndim != 2:
        raise ValueError(f"both sides must be [N, D] of one shape, got {tuple(queries.shape)} and {tuple(keys.shape)}")
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r} is not known; allowed: {', '.join(DISTANCES)}")
    queries, keys = queries.to("cpu", torch.float64), keys.to("cpu", torch.float64)
    if distance == "cosine":
        centre = keys.mean(dim=0)
        queries, keys = F.normalize(queries - centre, dim=1), F.normalize(keys - centre, dim=1)
    right = 0
    for start in range(0, len(keys), chunk_size):
        part = queries[start : start + chunk_size]
        closeness = part @ keys.T if distance == "cosine" else -torch.cdist(part, keys)
        rows = torch.arange(len(part))
        own = closeness[rows, start + rows]
        found = own >= closeness.amax(dim=1) - 1e-12  # duplicates may differ in the last bit
        if distance == "cosine":
            found &= part.norm(dim=1) > 0.5
        right += int(found.sum())
    return right / len(keys)
