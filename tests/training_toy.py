"""A tiny task with everything a run can hold: a trained model with a buffer, a second trained part, a frozen part, dropout, a codebook."""

import multiprocessing
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from vistok.data import ImageFolder
from vistok.image import to_pil
from vistok.modeling import VisualModel
from vistok.rng import randn
from vistok.training import TrainConfig, TrainingTask, seeded_build, train

CODES = 8


@dataclass(frozen=True)
class ToyConfig:
    width: int = 8


class ToyModel(VisualModel):
    """Denoises 8 x 8 images; its buffer counts the images seen, as a codebook's moving averages would."""

    Config = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, config.width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(config.width, 192))
        self.register_buffer("running_mean", torch.zeros(()))

    def forward(self, images):
        return self.layers(images).view_as(images)


class ToyTask(TrainingTask):
    codebook_size = CODES

    def __init__(self, config: ToyConfig, dropout: bool):
        super().__init__()
        self.model = ToyModel(config)
        self.critic = nn.Linear(192, 1)
        self.frozen = nn.Sequential(nn.Linear(192, CODES), nn.BatchNorm1d(CODES)).requires_grad_(False)
        if not dropout:
            self.model.layers[3].p = 0.0

    def forward(self, batch, generators, step):
        noisy = batch.images + 0.3 * randn(batch.images.shape[1:], generators)
        restored = self.model(noisy)
        if self.training:
            self.model.running_mean.lerp_(torch.tensor(float(step)), 0.1)
        error = (restored - batch.images).square().mean()
        score = self.critic(restored.flatten(1)).square().mean()
        ids = self.frozen(batch.images.flatten(1)).argmax(1)
        return error + 0.1 * score, {"error": error.detach(), "ids": torch.bincount(ids, minlength=CODES)}

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image]:
        return {"restored": to_pil(self.model(torch.zeros(1, 3, 8, 8)))[0]}


def make_folder(folder: Path, count: int = 7) -> Path:
    """A folder of `count` little images; 7 is no multiple of any batch size used here."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"image_{i}.png")
    return folder


def make_config(data: Path, out: Path, **options) -> TrainConfig:
    base = dict(
        data=str(data), out=out, image_size=8, batch_size=4, max_steps=20, warmup_steps=3, save_every=2, log_every=3, preview_every=0,
        shift=1, keep_checkpoints=3, progress=False, seed=5, weight_decay=0.1,
    )  # fmt: skip
    return TrainConfig(**{**base, **options})


def run(data: Path, out: Path, *, resume: bool = False, task_class: type = ToyTask, dropout: bool = True, **options) -> ToyTask:
    """Build and train; returns the task as the run left it."""
    config = make_config(data, out, **options)
    task = seeded_build(lambda: task_class(ToyConfig(), dropout), config.seed)
    dataset = ImageFolder(data, image_size=config.image_size, split="all", on_bad_image=config.on_bad_image)
    train(task, dataset, config, resume=resume)
    return task


class Dies(ToyTask):
    """Process 1 ends at step 3 without a word."""

    def forward(self, batch, generators, step):
        if step == 3 and os.environ["RANK"] == "1":
            os._exit(9)
        return super().forward(batch, generators, step)


class Breaks(ToyTask):
    """Process 1 has a loss that is no number at step 3."""

    def forward(self, batch, generators, step):
        loss, logs = super().forward(batch, generators, step)
        return loss * float("nan") if step == 3 and os.environ["RANK"] == "1" else loss, logs


def start(data: Path, out: Path, *, environment: dict[str, str] | None = None, **options) -> multiprocessing.Process:
    """Run in a process of its own, forked from one that has imported everything; what it raises is written beside `out`."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    context.set_forkserver_preload(["training_toy"])
    process = context.Process(target=_child, args=(data, out, environment or {}, options))
    process.start()
    return process


def _child(data: Path, out: Path, environment: dict[str, str], options: dict) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        run(data, out, **options)
    except BaseException:
        out.with_name(f"{out.name}.error{environment.get('RANK', '')}").write_text(traceback.format_exc())
        raise
