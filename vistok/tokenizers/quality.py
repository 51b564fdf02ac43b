"""Automatic length: the shortest prefix of an ordered token list that is good enough, per image.

Decodes are the cost, so the length is found by bisection: every image halves its own interval, and one batched decode a round serves all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistok.tokens import VisualTokens

if TYPE_CHECKING:
    from vistok.protocols import ImageTokenizer


def psnr_score(reconstruction: Tensor, images: Tensor) -> Tensor:
    """PSNR in dB, [B], of images in [-1, 1]."""
    error = (reconstruction - images).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-12))


@dataclass(frozen=True)
class Quality:
    """A target for automatic length.

    target: the least acceptable score. score: (reconstruction, images) [B, 3, H, W] each -> [B], higher is better; PSNR in dB by default
    (for a feature distance give its negative). options: for the tokenizer's decode, as num_steps or guidance_scale.
    """

    target: float
    score: Callable[[Tensor, Tensor], Tensor] = psnr_score
    options: dict | None = None


@torch.no_grad()
def shortest_prefix(tokenizer: "ImageTokenizer", images: Tensor, tokens: VisualTokens, quality: Quality | float) -> VisualTokens:
    """Truncate each image's tokens to the shortest prefix that reaches the target.

    images: [B, 3, H, W]; tokens: of the same images, full length. An image that misses the target even at full length keeps all its tokens.
    The search takes ceil(log2 N) + 1 batched decodes and assumes that quality rises with length; where it does not, the prefix found still
    reaches the target, but a shorter one may too. Every decode of an image starts from the same noise.
    """
    if not isinstance(quality, Quality):
        quality = Quality(float(quality))
    options = {"image_size": tuple(images.shape[-2:]), **(quality.options or {})}
    low = torch.full_like(tokens.counts, tokenizer.min_tokens)  # the answer is in [low, high]; high is known to do, or is the whole
    high = tokens.counts.clone()
    while bool((low < high).any()):
        middle = (low + high) // 2
        reaches = quality.score(tokenizer.decode(tokens.truncate(middle), **options), images).to(low.device) >= quality.target
        low, high = torch.where(reaches, low, middle + 1).minimum(high), torch.where(reaches, middle, high)
    return tokens.truncate(high)
