"""Train a tokenizer whose own forward gives named losses (fsq2d): their sum is the loss."""

import torch
from PIL import Image
from torch import Tensor

from vistok.image import make_strip
from vistok.modeling import VisualModel
from vistok.training.task import TrainingTask
from vistok.training.tasks.previews import histogram, preview_images


class TokenizerTask(TrainingTask):
    """model: a tokenizer with forward(images) -> TokenizerOutput."""

    def __init__(self, model: VisualModel):
        super().__init__()
        self.model = model
        self.codebook_size = model.codebook_size

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the tokenizer's losses; logs each of them and the ids' histogram. No random draws."""
        output = self.model(batch.images)
        logs = {name: loss.detach() for name, loss in output.losses.items()}
        return sum(output.losses.values()), {**logs, "codes": histogram(output.tokens.ids, self.codebook_size)}

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions."""
        images = preview_images(self.dataset, self.model.device)
        return {"reconstruction": make_strip([images, self.model.decode(self.model.encode(images))], row_titles=["original", "decoded"])}
