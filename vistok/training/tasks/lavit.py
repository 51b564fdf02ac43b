"""Train a LaVIT: what to keep, how to merge the rest, the codebook, the feature decoder and the pixels.

Jin et al. 2024, arXiv 2309.04669, section 3.1; the order of the stages as the authors tell it, their training code was never published.

    loss = feature_weight (1 - cos(decoded features, sg features)) + rate_weight (keep_ratio - mean keep)^2 + the codebook's terms
         + pixel_weight (|x' - x| + |x' - x|^2)

    before quantize_start   the decoder reads unquantized code vectors; the selector learns its rate through Gumbel noise
    at quantize_start       the selector is shifted to keep that rate without noise, as `encode` does; it and the transformer are frozen
    from then on            codes are quantized, starting from k-means over the vectors of many images

The published model learns on the features of a frozen EVA-CLIP. Without such weights the vision transformer learns here too, from the
pixels; the target features are held fixed in the loss, so they cannot collapse onto what is easy to decode.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.image import make_strip
from vistok.tokenizers.lavit import CALIBRATION_BATCH, LaVIT
from vistok.training.task import TrainingTask
from vistok.training.tasks.previews import histogram, preview_images

CALIBRATION_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class LaVITTaskConfig:
    """Weights and stages."""

    keep_ratio: float = 0.4
    """Mean share of the patches to keep; an image may keep more or fewer."""
    rate_weight: float = 2.0
    """Of the squared distance to that share."""
    feature_weight: float = 1.0
    """Of 1 - cosine between the patches' features and the decoded ones."""
    pixel_weight: float = 1.0
    """Of L1 + MSE of the decoded image, where the model has a pixel decoder."""
    temperature: float = 1.0
    """Of the Gumbel softmax."""
    quantize_start: int = 1000
    """Step from which codes are quantized, transformer and selector frozen; 0: from the start, with both as they are."""
    freeze_vision: bool = False
    """Leave the vision transformer as it is (for a converted checkpoint)."""

    def __post_init__(self):
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio={self.keep_ratio} must be above 0 and at most 1")
        if self.temperature <= 0 or self.quantize_start < 0:
            raise ValueError(f"temperature={self.temperature} must be positive and quantize_start={self.quantize_start} not negative")


@torch.no_grad()
def place_codes(model: LaVIT, images: Tensor) -> None:
    """Start the codebook by k-means over the code vectors of images [B, 3, H, W], once in its life and where its config asks for k-means.

    A training batch has fewer vectors than codes: started from one, codes begin as copies of each other, and most stay unused.
    """
    found = []
    for part in images.split(CALIBRATION_BATCH):
        patches = model.patches(part)
        merged, counts = model.merger.kept(patches, model.decide(model.selector(patches)))
        found.append(model.code_vectors(merged)[torch.arange(merged.shape[1], device=merged.device) < counts[:, None]])
    model.quantizer.start(torch.cat(found))


class LaVITTask(TrainingTask):
    """model: a LaVIT. config: weights and stages."""

    find_unused_parameters = True

    def __init__(self, model: LaVIT, config: LaVITTaskConfig = LaVITTaskConfig()):
        super().__init__()
        if model.pixels is None and not config.freeze_vision:
            raise ValueError(
                "without a pixel decoder nothing tells the vision transformer what to see: set pixel_width or freeze_vision=True"
            )
        self.model, self.config = model, config
        self.codebook_size = model.codebook_size
        if config.freeze_vision:
            model.vision.requires_grad_(False)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum; each image's Gumbel noise comes from its generator."""
        config = self.config
        is_quantized = int(step) >= config.quantize_start
        if int(step) == config.quantize_start > 0:
            images = preview_images(self.dataset, self.model.device, count=CALIBRATION_IMAGES)  # the same on all processes
            self.model.calibrate(images, config.keep_ratio)
            place_codes(self.model, images)
        output = self.model(
            batch.images,
            generators=generators,
            keep_ratio=config.keep_ratio,
            temperature=config.temperature,
            quantize=is_quantized,
            freeze_selection=is_quantized,
        )
        weights = {
            "features": config.feature_weight,
            "rate": config.rate_weight,
            "l1": config.pixel_weight,
            "mse": config.pixel_weight,
        }
        loss = sum(weights.get(name, 1.0) * term for name, term in output.losses.items())
        logs = {name: term.detach() for name, term in output.losses.items()} | {"keep_ratio": output.keep_ratio}
        if is_quantized:
            logs["codes"] = histogram(output.tokens.ids, self.codebook_size)
        return loss, logs

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals, the patches kept of them (the others dimmed), and their reconstructions."""
        model, images = self.model, preview_images(self.dataset, self.model.device)
        kept = F.interpolate(model.selection(images)[:, None].to(images.dtype), scale_factor=model.settings.patch_size)
        rows, titles = [images, (images + 1) * (0.2 + 0.8 * kept) - 1], ["original", "kept"]
        if model.pixels is not None:
            rows, titles = [*rows, model.decode(model.encode(images))], [*titles, "decoded"]
        return {"reconstruction": make_strip(rows, row_titles=titles)}

    @torch.no_grad()
    def save_pretrained(self, folder: Path) -> None:
        """Save the model; a selector trained here is shifted once more, since averaged weights keep another share than the last."""
        if not self.config.quantize_start:
            self.model.save_pretrained(folder)
            return
        saved = LaVIT(self.model.settings).to(self.model.device).eval()
        saved.load_state_dict(self.model.state_dict())
        saved.calibrate(preview_images(self.dataset, saved.device, count=CALIBRATION_IMAGES), self.config.keep_ratio)
        saved.save_pretrained(folder)
