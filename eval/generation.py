"""Quality of generated images, with the protocol printed and stored beside the numbers.

    python -m eval.generation --model vistok/emoji-gpt --data emoji --num-samples 256 --out results.json
    python -m eval.generation --samples FOLDER --data PHOTOS --image-size 256 --features timm:resnet50

Frechet and kernel distance, precision and recall against a split of real images, and near copies: the nearest training image of each sample
by PSNR, mirrored or not, and the share above 25 dB. docs/evaluation.md explains every column.
A model goes round its classes, the same number of samples each; one without classes goes round the captions of the split, or `--prompts`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

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
    """Prompts to go round, instead of the model's classes or the captions of the data."""
    num_tokens: int | None = None
    """Tokens per sample; all when not given."""
    guidance_scale: float = 1.5
    """Guidance of the generator; 1 is off."""
    temperature: float = 1.0
    """Sharper below 1."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this much probability."""
    num_steps: int | None = None
    """Solver steps of an xAR's first entity; its sampler's default when not given."""
    final_steps: int | None = None
    """Solver steps of an xAR's last entity; as the first when not given."""
    solver: Literal["euler", "euler_maruyama"] | None = None
    """Solver of an xAR; its sampler's default when not given."""
    decode_steps: int | None = None
    """Solver steps of a flow decoder; the tokenizer's default when not given."""
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
    if config.samples is not None and config.image_size is None:
        raise SystemExit("samples from a folder need --image-size")
    options, model = {"samples": config.samples or "drawn by the model", "train_split": config.train_split}, {}
    if config.model is not None:
        pipeline = vistok.TokenImagePipeline.from_pretrained(config.model).to(config.device)
        drawn = draw(pipeline, config)
        samples = ImagesInMemory(drawn["images"])
        image_size = config.image_size or tuple(samples.images.shape[-2:])
        options |= drawn["options"]
        model = {"generator": model_config(pipeline.generator), "tokenizer": model_config(pipeline.tokenizer)}
    else:
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
    named = {"model": config.model or "", "model_config": model, "data": config.data, "split": config.split}
    named |= {"options": {**options, **result.protocol.options}, "command": command_line("eval.generation")}
    result = result.with_protocol(**named)
    print(result.report())
    if config.out is not None:
        result.save(config.out)
    if config.grid is not None:
        shown = torch.stack([samples.read(i) for i in range(min(64, len(samples)))])
        config.grid.parent.mkdir(parents=True, exist_ok=True)
        make_grid(shown / 127.5 - 1).save(config.grid)


def draw(pipeline, config: Config) -> dict:
    """The samples as PIL images, and the options they were drawn with; image i depends on the seed and i alone."""
    kind, asked = conditions(pipeline.classes, config)
    options = {name: getattr(config, name) for name in ("num_tokens", "guidance_scale", "temperature", "top_k", "top_p")}
    flow = {name: getattr(config, name) for name in ("num_steps", "final_steps", "solver")}
    options |= {name: value for name, value in flow.items() if value is not None}
    steps = {} if config.decode_steps is None else {"num_steps": config.decode_steps}
    images = pipeline(**{kind: asked}, **options, seed=config.seed, batch_size=config.batch_size, decode_options=steps).images
    return {
        "images": images,
        "options": options
        | {f"decode_{name}": value for name, value in steps.items()}
        | {"conditions": f"{len(set(asked))} different {kind} in turn"},
    }


def conditions(classes: Sequence[str], config: Config) -> tuple[str, list[str]]:
    """What each sample is asked for: "labels" or "prompts", and one of them for each sample."""
    kind, choices = ("prompts", config.prompts) if config.prompts or not classes else ("labels", classes)
    if not choices:
        choices = [caption for caption in vistok.open_dataset(config.data, image_size=64, split=config.split).captions if caption]
    if not choices:
        raise SystemExit(f"this model has no classes and {config.data} no captions: give --prompts")
    return kind, [choices[i % len(choices)] for i in range(config.num_samples)]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
