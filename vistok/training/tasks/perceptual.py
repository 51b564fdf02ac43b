"""Train a tokenizer that decodes pixels: its own losses, and on request LPIPS and a PatchGAN. VQGAN's and LlamaGen's training.

    loss = sum of the tokenizer's losses [+ lpips_weight LPIPS] [+ gan_weight GAN from step gan_start]

Esser et al. 2021 (arXiv 2012.09841), equations 5 and 6, with a fixed weight of the GAN as in LlamaGen (arXiv 2406.06525).
"""

from dataclasses import dataclass

from torch import Tensor

from vistok.modeling import VisualModel
from vistok.training.tasks.adversarial import PatchDiscriminator, adversarial_losses
from vistok.training.tasks.previews import histogram
from vistok.training.tasks.tokenizer import TokenizerTask
from vistok.training.tasks.vae import load_lpips


@dataclass(frozen=True, kw_only=True)
class PerceptualTaskConfig:
    """Weights of the losses that the tokenizer does not compute itself."""

    lpips_weight: float = 0.0
    """Of LPIPS (needs the extra `train` and torchvision's VGG weights)."""
    gan_weight: float = 0.0
    """Of the PatchGAN's generator loss; 0 leaves the discriminator out."""
    gan_start: int = 0
    """Step from which the GAN counts; its discriminator trains from the start."""


class PerceptualTask(TokenizerTask):
    """model: a tokenizer whose forward(images) gives a reconstruction and named losses. config: weights of the other losses."""

    def __init__(self, model: VisualModel, config: PerceptualTaskConfig = PerceptualTaskConfig()):
        super().__init__(model)
        self.config = config
        if config.gan_weight:
            self.discriminator = PatchDiscriminator()
        if config.lpips_weight:
            self.lpips = load_lpips()

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; logs each term unweighted and the ids' histogram. No random draws."""
        config, images = self.config, batch.images
        output = self.model(images)
        decoded = output.reconstruction.float()
        terms, weights = dict(output.losses), {}
        if config.lpips_weight:
            terms["lpips"], weights["lpips"] = self.lpips(decoded, images).mean(), config.lpips_weight
        if config.gan_weight:
            terms["gan"], terms["judge"] = adversarial_losses(self.discriminator, images, decoded)
            weights["gan"] = config.gan_weight * (step >= config.gan_start)
        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        return loss, {**{name: term.detach() for name, term in terms.items()}, "codes": histogram(output.tokens.ids, self.codebook_size)}
