"""Train a TiTok, in one stage or in two.

Yu et al. 2024, arXiv 2406.07550, section 3.2 and appendix A (two stages); Kim et al. 2025, arXiv 2501.07730 (one).

    single    |x' - x|^2 + quantizer [+ lpips_weight LPIPS] [+ gan_weight GAN from step gan_start]      x in [0, 1] units
    proxy     -log p(ids of a frozen 2D tokenizer | codes) + quantizer                                  stage 1: no pixels
    pixels    as single, without the quantizer's losses: encoder and codebook are frozen                stage 2: decoder, pixel decoder

quantizer: commitment and codebook losses, or a VAE's weighted KL. A text-aware model (TA-TiTok, the second paper) trains in a single
stage; its decoder reads each image's caption through a frozen text model, so that tokens need not say what words have said.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.image import make_strip
from vistok.modeling import VisualModel
from vistok.tokenizers.titok import TiTok
from vistok.tokens import TokenLayout, VisualTokens
from vistok.training.config import plain
from vistok.training.task import TrainingTask
from vistok.training.tasks.caption_features import CaptionFeatures
from vistok.training.tasks.image_losses import ImageLossConfig, ImageLosses
from vistok.training.tasks.previews import histogram, preview_images, preview_rows


@dataclass(frozen=True, kw_only=True)
class TiTokTaskConfig(ImageLossConfig):
    """What is learned, and the weights of the losses."""

    stage: Literal["single", "proxy", "pixels"] = "single"
    """See the file's head."""
    text: str | None = None
    """Of a text-aware model: who reads the captions (caption_features.py), "hash" or a transformers text model."""


class TiTokTask(TrainingTask):
    """model: a TiTok that fits the stage. teacher: the frozen 2D tokenizer of the stage "proxy".

    Raises ValueError: the model does not fit the stage, or the teacher not the model.
    """

    def __init__(self, model: TiTok, config: TiTokTaskConfig = TiTokTaskConfig(), *, teacher: VisualModel | None = None):
        super().__init__()
        self.model, self.config = model, config
        self.teacher = None
        settings = model.settings
        if bool(settings.text_width) != (config.text is not None) or (config.text is not None and config.stage != "single"):
            raise ValueError(
                f"text={config.text!r}, stage {config.stage!r} and a model with text_width={settings.text_width}: a text-aware TiTok, and "
                "no other, trains in a single stage with a reader of captions"
            )
        self.captions = None
        if config.text is not None:
            self.captions = CaptionFeatures(config.text, num_tokens=settings.text_tokens, width=settings.text_width)
        if config.stage == "proxy":
            _check_teacher(model, teacher)
            self.teacher = teacher.requires_grad_(False).eval()
            return
        if teacher is not None:
            raise ValueError(f'stage "{config.stage}" needs no teacher; stage "proxy" does')
        if settings.target == "proxy" and model.pixel_decoder is None:
            raise ValueError("this TiTok predicts proxy codes and has no pixel decoder: add one (begin_stage_two)")
        if config.stage == "pixels":
            model.encoder.requires_grad_(False)
            if model.quantizer is not None:
                model.quantizer.requires_grad_(False)
        self.image_losses = ImageLosses(config)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The stage's loss; logs each term, and the ids' histogram where there are ids. Only a VAE draws from the generators."""
        loss, logs, tokens = (self._proxy if self.teacher is not None else self._pixels)(batch, generators, step)
        if tokens.ids is not None:
            logs["codes"] = histogram(tokens.ids, self.model.codebook_size)
        return loss, logs

    def on_start(self, dataset) -> None:
        """Raises ValueError: a text-aware model has no captions to read."""
        if self.captions is None:
            return
        if not any(dataset.captions):
            raise ValueError(
                "a text-aware TiTok reads captions, and this data set has none (captions.jsonl, metadata.jsonl or .txt files beside the "
                "images); the recipes without text need none"
            )
        self.captions.to(self.model.device)

    def _proxy(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor], VisualTokens]:
        targets = self.teacher.encode(batch.images).ids
        codes, out = self.model.tokenize(batch.images, generators=generators)
        logits = self.model.proxy_logits(codes).float().flatten(2)  # [B, K', g]
        terms = {"cross_entropy": F.cross_entropy(logits, targets), **out.losses}
        logs = {name: term.detach() for name, term in terms.items()}
        logs["accuracy"] = (logits.argmax(1) == targets).float().mean()
        return sum(terms.values()), logs, out.tokens

    def _pixels(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor], VisualTokens]:
        images = batch.images
        is_frozen = self.config.stage == "pixels"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            codes, out = self.model.tokenize(images, generators=generators)
        text = None if self.captions is None else self.captions(batch.captions).to(images.device)
        decoded = self.model.decode_codes(codes, text=text).float()
        terms = {"mse": ((decoded - images) / 2).square().mean(), **({} if is_frozen else out.losses)}
        loss, logs = self.image_losses(terms, images=images, decoded=decoded, step=step)
        return loss, logs, out.tokens

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions; in stage "proxy" the teacher decodes its own codes and the most probable ones."""
        images = preview_images(self.dataset, self.model.device)
        tokens = self.model.encode(images)
        if self.teacher is None:
            text = None
            if self.captions is not None:
                text = self.captions([self.dataset.captions[row] for row in preview_rows(self.dataset)]).to(images.device)
            rows, titles = [images, self.model.decode(tokens, text=text)], ["original", "decoded"]
        else:
            codes = tokens.values if tokens.ids is None else self.model.embed(tokens.ids)
            guesses = self.model.proxy_logits(codes).argmax(1).flatten(1)
            guessed = self.teacher.decode(VisualTokens.from_ids(guesses, self.teacher.layout))
            rows, titles = [images, self.teacher.decode(self.teacher.encode(images)), guessed], ["original", "teacher", "decoded"]
        return {"reconstruction": make_strip(rows, row_titles=titles)}

    def describe(self) -> dict[str, Any]:
        """As every task, and what the teacher is."""
        if self.teacher is None:
            return super().describe()
        return {**super().describe(), "teacher": type(self.teacher).__name__, "teacher_config": plain(self.teacher.settings)}


def _check_teacher(model: TiTok, teacher: VisualModel | None) -> None:
    """Raise ValueError where the teacher's codes are not what the model's decoder predicts."""
    settings = model.settings
    if teacher is None or settings.target != "proxy":
        raise ValueError('stage "proxy" needs a teacher and a TiTok with target="proxy"')
    grid = TokenLayout("grid", settings.grid(settings.decoder_patch_size))
    got = (teacher.codebook_size, teacher.layout, tuple(teacher.settings.image_size))
    wanted = (settings.proxy_codebook_size, grid, tuple(settings.image_size))
    if got != wanted:
        raise ValueError(
            f"the teacher makes a {got[1].kind} {got[1].shape} of {got[0]} codes from {got[2]} pixels; "
            f"the TiTok predicts a grid {wanted[1].shape} of {wanted[0]} codes for {wanted[2]} pixels"
        )


def begin_stage_two(model: TiTok, settings) -> TiTok:
    """A TiTok of `settings` (those of stage 1 and a pixel_decoder) with the weights of a stage-1 model; the pixel decoder is fresh."""
    second = TiTok(settings)
    missing, unexpected = second.load_state_dict(model.state_dict(), strict=False)
    odd = [key for key in missing if not key.startswith("pixel_decoder.")] + list(unexpected)
    if odd:
        raise ValueError(f"the stage-1 model does not fit these settings: {', '.join(odd[:5])}")
    return second
