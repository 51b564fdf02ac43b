"""Train a KL-VAE: reconstruction, KL, and on request LPIPS and a PatchGAN.

    loss = |x' - x| + |x' - x|^2 + kl_weight KL(posterior | N(0, 1)) [+ lpips_weight LPIPS] [+ gan_weight GAN from step gan_start]

At the end the scaling factor is set so that latents have unit standard deviation over the data.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vistok.image import from_uint8, make_strip
from vistok.rng import randn
from vistok.tokenizers.vae import KLVAE
from vistok.training.task import TrainingTask
from vistok.training.tasks.image_losses import ImageLossConfig, ImageLosses
from vistok.training.tasks.previews import preview_images

SCALING_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class VAETaskConfig(ImageLossConfig):
    """Weights of the losses."""

    kl_weight: float = 1e-6
    """Of the KL divergence, summed over a latent grid and averaged over images and pixels."""


class VAETask(TrainingTask):
    """model: the VAE. config: weights of its losses."""

    def __init__(self, model: KLVAE, config: VAETaskConfig = VAETaskConfig()):
        super().__init__()
        self.model, self.config = model, config
        self.image_losses = ImageLosses(config)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; the posterior is sampled from the generators."""
        config, images = self.config, batch.images
        mean, logvar = self.model.posterior(images)
        latents = mean + torch.exp(0.5 * logvar) * randn(mean.shape[1:], generators, device=mean.device)
        decoded = self.model.decode_latents(latents * self.model.settings.scaling_factor)
        difference = decoded.float() - images
        terms = {"l1": difference.abs().mean(), "mse": difference.square().mean()}
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float()
        terms["kl"] = divergence.sum() / images[:, 0].numel()
        loss, logs = self.image_losses(terms, images=images, decoded=decoded.float(), step=step, weights={"kl": config.kl_weight})
        return loss, {**logs, "latent_std": mean.detach().float().std()}

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions."""
        images = preview_images(self.dataset, self.model.device)
        return {"reconstruction": make_strip([images, self.model.decode(self.model.encode(images))], row_titles=["original", "decoded"])}

    @torch.no_grad()
    def save_pretrained(self, folder: Path) -> None:
        """Save the VAE with the scaling factor that gives its latents unit standard deviation over (some of) the data."""
        rows = range(0, len(self.dataset), max(1, len(self.dataset) // SCALING_IMAGES))
        images = from_uint8(torch.stack([self.dataset.read(row) for row in rows])).to(self.model.device)
        std = torch.cat([self.model.posterior(part)[0] for part in images.split(32)]).float().std()
        scaled = KLVAE(replace(self.model.settings, scaling_factor=round(1.0 / float(std), 6)))
        scaled.load_state_dict(self.model.state_dict())
        scaled.save_pretrained(folder)
