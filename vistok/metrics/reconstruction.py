"""PSNR and SSIM of each reconstruction, on images as they would be saved.

    PSNR = 10 log10(R^2 / MSE)                                          R = 2, the range of images in [-1, 1]
    SSIM = (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))    C1 = (0.01 R)^2, C2 = (0.03 R)^2

with means m, variances s^2 and covariance s_xy under an 11 x 11 Gaussian window of sigma 1.5 (Wang et al. 2004, "Image quality assessment:
from error visibility to structural similarity", section III).

B images, C channels, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DATA_RANGE = 2.0
MAX_PSNR = 100.0
WINDOW, SIGMA = 11, 1.5


def as_saved(images: Tensor) -> Tensor:
    """Clamp to [-1, 1] and round to the 256 levels of an 8-bit file: what a person would look at and measure.

    images: [B, C, H, W]. Returns float32 of the same shape.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    reconstructions, originals: [B, C, H, W] in [-1, 1]; nothing is clamped or rounded here.
    Returns [B] float32, decibels, at most 100 so that a mean over exact copies stays finite.
    """
    _check_pair(reconstructions, originals)
    mse = (reconstructions.float() - originals.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(DATA_RANGE**2 / mse.clamp(min=DATA_RANGE**2 / 10 ** (MAX_PSNR / 10)))


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image: mean over channels and over the positions where the whole window fits.

    reconstructions, originals: [B, C, H, W] in [-1, 1], H and W at least 11.
    Returns [B] float32 in [-1, 1]. Equal to skimage's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=2)`.
    """
    _check_pair(reconstructions, originals)
    B, C, H, W = originals.shape
    if min(H, W) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {H} x {W}")
    x, y = (images.float().reshape(B * C, 1, H, W) for images in (reconstructions, originals))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.reshape(B, -1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian window as two 1D convolutions, without padding. x: [B, 1, H, W]."""
    offset = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SIGMA**2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def _check_pair(reconstructions: Tensor, originals: Tensor) -> None:
    if reconstructions.shape != originals.shape or originals.ndim != 4:
        got = f"{tuple(reconstructions.shape)} and {tuple(originals.shape)}"
        raise ValueError(f"reconstructions and originals must be [B, C, H, W] of one shape, got {got}")
