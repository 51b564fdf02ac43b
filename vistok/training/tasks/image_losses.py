"""What may judge decoded images beside their distance to the originals: LPIPS, and a PatchGAN from some step on.

    loss = sum_i weight_i term_i [+ lpips_weight LPIPS(x', x)] [+ gan_weight [step >= gan_start] GAN(x') + judge(x, x')]

Esser et al. 2021 (arXiv 2012.09841), equations 5 and 6, with a fixed weight of the GAN as in LlamaGen (arXiv 2406.06525). Every task that
decodes pixels sums its losses here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vistok.training.tasks.adversarial import PatchDiscriminator, adversarial_losses


@dataclass(frozen=True, kw_only=True)
class ImageLossConfig:
    """Weights of LPIPS and the PatchGAN; a task's config that has them builds on this one."""

    lpips_weight: float = 0.0
    """Of LPIPS (needs the extra `train` and torchvision's VGG weights)."""
    gan_weight: float = 0.0
    """Of the PatchGAN's generator loss; 0 leaves the discriminator out."""
    gan_start: int = 0
    """Step from which the GAN counts; its discriminator trains from the start."""


class ImageLosses(nn.Module):
    """The networks that judge: `discriminator`, trained, where there is a GAN; `lpips`, frozen, where it has a weight."""

    def __init__(self, config: ImageLossConfig):
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator() if config.gan_weight else None
        self.lpips = load_lpips() if config.lpips_weight else None

    def forward(
        self,
        terms: Mapping[str, Tensor],
        *,
        images: Tensor,
        decoded: Tensor,
        step: int | Tensor,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of a task's terms and of what judges decoded [B, 3, H, W] against images [B, 3, H, W].

        weights: by name of the term, 1 where it is not named. Returns the loss and every term, unweighted and without gradient.
        """
        terms, weights = dict(terms), dict(weights or {})
        if self.lpips is not None:
            terms["lpips"], weights["lpips"] = self.lpips(decoded, images).mean(), self.config.lpips_weight
        if self.discriminator is not None:
            terms["gan"], terms["judge"] = adversarial_losses(self.discriminator, images, decoded)
            weights["gan"] = self.config.gan_weight * (step >= self.config.gan_start)
        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        return loss, {name: term.detach() for name, term in terms.items()}


def load_lpips() -> nn.Module:
    """The LPIPS network on VGG, frozen. Raises ImportError naming the extra when the package is missing."""
    try:
        import lpips
    except ImportError as error:
        raise ImportError("lpips_weight needs the lpips package: pip install vistok[train]") from error
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
