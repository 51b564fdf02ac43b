"""Quality of generated images, with the protocol printed and stored beside the numbers.

    python -m eval.generation --model vistok/emoji-gpt --data emoji --num-samples 256 --out results.json
    python -m eval.generation --samples FOLDER --data PHOTOS --image-size 256 --features timm:resnet50

Frechet and kernel distance, precision and recall against a split of real images, and near copies: the nearest training image of each sample
by PSNR, mirrored or not, and the share above 25 dB. docs/evaluation.md explains every column.
A model draws the same number of samples for every class of the data; with `--prompts` it goes round the prompts instead.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

import vistok
from vistok.image import make_grid
from vistok.metrics import ImagesInMemory, command_line, evaluate_generation
from vistok.metrics.protocol import model_config


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the samples of a model, or those in a folder."""

    model: str | None = None
    """A pipeline: folder, training run, bundled name (vistok/emoji-gpt) or hub id."""
    samples: str | None = None
    """A folder of samples, instead of a model."""
    data: str = "emoji"
    """The real images: a folder, "emoji", or "hf:ID"."""
    split: str = "test"
    """Which part of them the samples are compared with."""
    train_split: str = "train"
    """Where near copies are looked for; "" leaves this check out."""
    num_samples: int = 256
    """How many images the model draws."""
    prompts: tuple[str, ...] = ()
    """Prompts to go round, instead of the classes of the data."""
    guidance_scale: float | None = None
    """Guidance of the generator; the pipeline's default when not given."""
    num_tokens: int | None = None
    """Tokens per sample; the pipeline's default when not given."""
    features: str = "conv"
    """Feature net: conv, pixels:16, timm:NAME[@FILE], torchvision:NAME[@FILE], transformers:FOLDER, inception[@FILE], vistok:MODEL."""
    image_size: int | None = None
    """Pixels at which everything is compared; a model's own size when not given."""
    num_reference: int | None = None
    """Use this many real images, drawn by the seed; all when not given."""
    seed: int = 0
    """Of the samples, the choice of real images and the subsets of the kernel distance."""
    batch_size: int = 32
    """Images a batch."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model and the feature net run."""
    out: Path | None = None
    """JSON file for the numbers and their protocol."""
    grid: Path | None = None
    """PNG file for a picture of the first 64 samples."""


def main(config: Config) -> None:
    """Draw or open the samples, measure, print, save."""
    if (config.model is None) == (config.samples is None):
        raise SystemExit("give either --model or --samples")
    described, options = {}, {}
    if config.model is not None:
        pipeline = vistok.TokenImagePipeline.from_pretrained(config.model).to(config.device)
        asked = conditions(config)
        options = {name: value for name in ("guidance_scale", "num_tokens") if (value := getattr(config, name)) is not None}
        samples = ImagesInMemory(draw(pipeline, asked, config, options))
        image_size = config.image_size or tuple(samples.images.shape[-2:])
        described = {name: model_config(part) for name, part in pipeline.components.items() if hasattr(part, "config")}
        options |= {"conditions": next(iter(asked)), "different_conditions": len(set(asked[next(iter(asked))]))}
    else:
        if config.image_size is None:
            raise SystemExit("samples from a folder need --image-size")
        image_size = config.image_size
        samples = vistok.open_dataset(config.samples, image_size=image_size, split="all")
    result = evaluate_generation(
        samples,
        vistok.open_dataset(config.data, image_size=image_size, split=config.split),
        training=vistok.open_dataset(config.data, image_size=image_size, split=config.train_split) if config.train_split else None,
        features=config.features,
        num_reference=config.num_reference,
        batch_size=config.batch_size,
        seed=config.seed,
        device=config.device,
        progress=True,
    )
    named = {"model": config.model or "", "model_config": described, "data": config.data, "split": config.split}
    options |= {**result.protocol.options, "samples": config.samples or "drawn by the model", "train_split": config.train_split}
    protocol = dataclasses.replace(result.protocol, **named, options=options, command=command_line("eval.generation"))
    result = dataclasses.replace(result, protocol=protocol)
    print(result.report())
    if config.out is not None:
        result.save(config.out)
    if config.grid is not None:
        shown = torch.stack([samples.read(i) for i in range(min(64, len(samples)))])
        config.grid.parent.mkdir(parents=True, exist_ok=True)
        make_grid(shown / 127.5 - 1).save(config.grid)


def conditions(config: Config) -> dict[str, list[str]]:
    """What each sample is asked for: the prompts in turn, or the classes of the data in turn."""
    if config.prompts:
        return {"prompts": [config.prompts[i % len(config.prompts)] for i in range(config.num_samples)]}
    classes = vistok.open_dataset(config.data, image_size=config.image_size or 64, split=config.split).classes
    if not classes:
        raise SystemExit(f"{config.data} has no classes to draw from: give --prompts")
    return {"labels": [classes[i % len(classes)] for i in range(config.num_samples)]}


def draw(pipeline, asked: dict[str, list[str]], config: Config, options: dict) -> list:
    """PIL images, one for each condition; image i depends on the seed and i alone."""
    (kind, values), images = next(iter(asked.items())), []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(values), config.batch_size), desc="sample", unit="batch"):
        part = values[start : start + config.batch_size]
        generators = vistok.image_generators(config.seed, range(start, start + len(part)), config.device)
        images += pipeline(**{kind: part}, num_images=1, generators=generators, **options).images
    return images


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
