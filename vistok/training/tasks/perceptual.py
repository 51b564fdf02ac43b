"""Train a tokenizer that decodes pixels: its own losses, and on request LPIPS and a PatchGAN. VQGAN's and LlamaGen's training.

loss = sum of the tokenizer's losses [+ lpips_weight LPIPS] [+ gan_weight GAN from step gan_start]; see image_losses.py
"""

from torch import Tensor

from vistok.modeling import VisualModel
from vistok.training.tasks.image_losses import ImageLossConfig, ImageLosses
from vistok.training.tasks.previews import histogram
from vistok.training.tasks.tokenizer import TokenizerTask

PIXELS_ALONE = ImageLossConfig()


class PerceptualTask(TokenizerTask):
    """model: a tokenizer whose forward(images) gives a reconstruction and named losses. config: weights of the other losses."""

    def __init__(self, model: VisualModel, config: ImageLossConfig = PIXELS_ALONE):
        super().__init__(model)
        self.config = config
        self.image_losses = ImageLosses(config)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; logs each term unweighted and the ids' histogram. No random draws."""
        output = self.model(batch.images)
        loss, logs = self.image_losses(output.losses, images=batch.images, decoded=output.reconstruction.float(), step=step)
        return loss, {**logs, "codes": histogram(output.tokens.ids, self.codebook_size)}
