"""Train a FlexTok: one flow-matching loss through the decoder, the quantizer and the encoder.

Bachmann et al. 2025, arXiv 2502.13967, sections 3.1-3.3 (nested dropout, rectified flow); Yu et al. 2024, arXiv 2410.06940 (REPA).

    keep the first k of R registers, k random;  t random, z_t = (1 - t) z + t noise
    loss = |v(z_t, t, first k codes) - (noise - z)|^2 [+ repa_weight (1 - cos(project(patch tokens), features(image)))]
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from vistok.data.loader import make_batch
from vistok.flow import sample_times
from vistok.image import from_uint8, make_strip
from vistok.rng import image_generators, rand, randn
from vistok.tokenizers.flextok import FlexTok
from vistok.training.task import TrainingTask
from vistok.training.tasks.previews import histogram, prefix_counts, preview_images

CACHE_BYTES = 1 << 30
VIEW_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FlexTokTaskConfig:
    """How FlexTok learns."""

    nested_dropout: Literal["uniform", "pow2", "uniform_pow2"] = "pow2"
    """Kept registers: uniform on 1..R; uniform on 1, 2, 4 .. R; or uniform, rounded up to a power of two."""
    shared_length: bool = False
    """One length for the whole batch instead of one an image: registers beyond it are not computed, so a step costs a fraction."""
    null_dropout: float = 0.1
    """Share of images decoded without any token, for guidance."""
    time_sampling: Literal["uniform", "mode", "logit_normal"] = "mode"
    """Law of the training times."""
    mode_scale: float = 0.25
    """Strength of "mode"."""
    noise_share: float = 0.0
    """Share of images trained at t = 1 exactly, where only the tokens tell what the image is: the encoder learns faster."""
    open_gates: bool = False
    """Start with open residual gates (FlexTok.open_gates); for runs of thousands, not hundreds of thousands, of steps."""
    cached_views: int = 2
    """Augmented views of each image encoded once by the frozen VAE: the image, its mirror, then random shifts; 0 encodes in every step."""
    view_shift: int = 6
    """Largest shift of the third and later views, in pixels."""
    repa: str | None = None
    """A timm model whose patch features the decoder's early patch tokens are aligned with; None for no alignment."""
    repa_weight: float = 1.0
    repa_block: int = 1
    """Decoder block after which the patch tokens are read."""


class FlexTokTask(TrainingTask):
    """model: a FlexTok, whose VAE (if any) stays frozen. config: how it learns."""

    def __init__(self, model: FlexTok, config: FlexTokTaskConfig = FlexTokTaskConfig()):
        super().__init__()
        self.model, self.config = model, config
        self.codebook_size = model.codebook_size
        self._cache: Tensor | None = None
        if config.open_gates:
            model.open_gates()
        if config.repa is not None:
            self.repa = RepaHead(model.settings.decoder_width, config.repa)

    @torch.no_grad()
    def on_start(self, dataset) -> None:
        """Encode the views of every image once, where they serve and fit in memory."""
        views = self.config.cached_views
        if self.model.vae is None or self.config.repa is not None or not views:
            return
        device, shape = self.model.device, self._encode_views(dataset, range(1)).shape[2:]
        if 4 * len(dataset) * views * shape.numel() > CACHE_BYTES:
            return
        self._cache = torch.empty(len(dataset), views, *shape, device=device)
        for start in tqdm(range(0, len(dataset), VIEW_BATCH), desc="encoding views", disable=None):
            rows = range(start, min(start + VIEW_BATCH, len(dataset)))
            self._cache[rows.start : rows.stop] = self._encode_views(dataset, rows)

    def _encode_views(self, dataset, rows: range) -> Tensor:
        """Latents [n, V, C, h, w] of images `rows`; a view depends on (image, view) alone."""
        pixels = torch.stack([dataset.read(row) for row in rows])
        latents = []
        for view in range(self.config.cached_views):
            positions = np.arange(rows.start, rows.stop) * self.config.cached_views + view
            unused = torch.zeros(len(rows), dtype=torch.int64)
            if view < 2:
                images = from_uint8(pixels.flip(-1) if view else pixels)
            else:
                images = make_batch(pixels, unused, [], unused, positions, seed=0, flip=True, shift=self.config.view_shift).images
            latents.append(self.model.encode_latents(images.to(self.model.device)))
        return torch.stack(latents, dim=1)

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The flow-matching loss; per image, its generator gives time, length, dropout and noise."""
        config, model = self.config, self.model
        device = batch.images.device
        uniforms = rand((5,), generators, device=device)
        with torch.no_grad():
            if self._cache is None:
                latents = model.encode_latents(batch.images)
            else:
                latents = self._cache[batch.indices, (uniforms[:, 4] * self.config.cached_views).long()]
        noise = randn(latents.shape[1:], generators, device=device)
        times = sample_times(uniforms[:, 0], sampling=config.time_sampling, mode_scale=config.mode_scale)
        times = torch.where(uniforms[:, 1] < config.noise_share, 1.0, times)
        counts, num_tokens = self._lengths(uniforms[:, 2], step)
        output, tapped = model(
            latents,
            noise=noise,
            times=times,
            counts=counts,
            num_tokens=num_tokens,
            is_dropped=uniforms[:, 3] < config.null_dropout,
            tap=config.repa_block if config.repa is not None else None,
        )
        loss = output.losses["flow"]
        logs = {"flow": loss.detach(), "tokens": counts.float().mean(), "codes": histogram(output.tokens.ids, self.codebook_size)}
        if config.repa is not None:
            alignment = self.repa(tapped, batch.images)
            loss = loss + config.repa_weight * alignment
            logs["repa"] = alignment.detach()
        return loss, logs

    def _lengths(self, uniforms: Tensor, step) -> tuple[Tensor, int]:
        """Kept registers of each image [B], and how many registers to run."""
        R = self.model.max_tokens
        if not self.config.shared_length:
            return nested_lengths(uniforms, R, self.config.nested_dropout), R
        # drawn on the CPU from the step alone: every process and micro batch of a step gets the same length, without a device sync
        shared = nested_lengths(rand((1,), image_generators(0, [int(step)]))[0], R, self.config.nested_dropout)
        return torch.full(uniforms.shape, int(shared), device=uniforms.device), int(shared)

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions from 1, 2, 4, ... tokens, all from the same noise."""
        images = preview_images(self.dataset, self.model.device)
        counts = prefix_counts(self.model.max_tokens)
        decoded = self.model.decode_prefixes(self.model.encode(images), counts, image_size=tuple(images.shape[-2:]))
        return {"prefixes": make_strip([images, *decoded], row_titles=["original", *(str(count) for count in counts)])}


def nested_lengths(uniforms: Tensor, num_registers: int, law: str) -> Tensor:
    """Kept registers, int64 like uniforms [B] in [0, 1): see FlexTokTaskConfig.nested_dropout."""
    uniform = (uniforms * num_registers).long() + 1
    if law == "uniform":
        return uniform.clamp(max=num_registers)
    powers = torch.tensor(prefix_counts(num_registers), device=uniforms.device)
    if law == "pow2":
        return powers[(uniforms * len(powers)).long().clamp(max=len(powers) - 1)]
    return powers[torch.searchsorted(powers, uniform.clamp(max=num_registers))]


class RepaHead(nn.Module):
    """Projects patch tokens onto a frozen backbone's patch features and measures 1 - cosine."""

    def __init__(self, width: int, backbone: str, hidden: int = 2048):
        super().__init__()
        import timm

        self.backbone = timm.create_model(backbone, pretrained=True, num_classes=0, dynamic_img_size=True).eval().requires_grad_(False)
        features = self.backbone.num_features
        self.project = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features))
        mean, std = (torch.tensor(self.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, patch_tokens: Tensor, images: Tensor) -> Tensor:
        """patch_tokens: [B, N, D] of a square grid; images: [B, 3, H, W] in [-1, 1]. Returns a scalar."""
        self.backbone.eval()
        with torch.no_grad():
            target = self.backbone.forward_intermediates(
                (images / 2 + 0.5 - self.mean) / self.std, indices=1, intermediates_only=True, output_fmt="NCHW"
            )[0]
        side = round(patch_tokens.shape[1] ** 0.5)
        ours = self.project(patch_tokens).transpose(1, 2).unflatten(2, (side, -1))
        ours = F.interpolate(ours, size=target.shape[-2:], mode="bilinear")
        return 1 - F.cosine_similarity(ours.float(), target.float(), dim=1).mean()
