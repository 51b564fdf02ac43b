"""Near copies: the nearest training image of each sample, by PSNR, mirrored or not.

A generator trained for long on a small set repeats it; a share of near copies beside the samples says so plainly. Pixels at equal
position are compared, so a shifted copy escapes; flat images (a disc on white) are near one another without any copying, which is why
the share for held-out real images is the figure to compare with.

N samples, M training images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.metrics.reconstruction import psnr

NEAR_COPY_PSNR = 25.0


@dataclass(frozen=True)
class NearestImages:
    """For each of N samples: the nearest training image.

    psnr: [N] float32, decibels.  index: [N] int64, its place in the training set.  mirrored: [N] bool, it is the left-right mirror image.
    """

    psnr: Tensor
    index: Tensor
    mirrored: Tensor

    def share_above(self, threshold: float = NEAR_COPY_PSNR) -> float:
        """Share of the samples whose nearest training image is above `threshold` decibels: the near copies."""
        return float((self.psnr > threshold).float().mean())


def nearest_images(samples: Tensor, training: Iterable[Tensor], *, with_mirrored: bool = True) -> NearestImages:
    """Find the nearest training image of each sample.

    samples: [N, 3, H, W] in [-1, 1].
    training: batches [m, 3, H, W] in [-1, 1], in the order of the set; one batch at a time is in memory.
    with_mirrored: also compare with the left-right mirror image of every training image.
    """
    N = len(samples)
    samples = samples.float()
    flat = samples.flatten(1)
    energy = flat.square().sum(dim=1)
    best = torch.full((N,), torch.inf, device=flat.device)
    index = torch.zeros(N, dtype=torch.int64, device=flat.device)
    mirrored = torch.zeros(N, dtype=torch.bool, device=flat.device)
    nearest = torch.zeros_like(samples)
    start = 0
    for batch in training:
        if batch.shape[1:] != samples.shape[1:]:
            raise ValueError(f"samples are {tuple(samples.shape[1:])} but training images are {tuple(batch.shape[1:])}: resize one of them")
        batch = batch.to(flat.device, torch.float32)
        for is_mirrored in (False, True) if with_mirrored else (False,):
            others = batch.flip(3) if is_mirrored else batch
            rows = others.flatten(1)
            distance = energy[:, None] + rows.square().sum(dim=1) - 2 * flat @ rows.T  # [N, m]
            value, place = distance.min(dim=1)
            closer = value < best
            best = torch.where(closer, value, best)
            index[closer], mirrored[closer] = start + place[closer], is_mirrored
            nearest[closer] = others[place[closer]]
        start += len(batch)
    if start == 0:
        raise ValueError("there are no training images to compare with")
    # the expanded square loses digits where images are close, exactly where they matter: measure the winners directly
    return NearestImages(psnr(samples, nearest).cpu(), index.cpu(), mirrored.cpu())
