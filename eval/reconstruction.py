"""Quality of a tokenizer at every token count, with the protocol printed and stored beside the numbers.

    python -m eval.reconstruction --model vistok/emoji-flextok --data emoji --split test --num-tokens 1 2 4 8 16 32 64 --out results.json

PSNR, SSIM, Frechet and kernel distance on the chosen features, the share of reconstructions whose nearest original is the right one,
codebook usage; docs/evaluation.md explains every column. The default features (`conv`) need no weights; on `--features inception` the
Frechet distance is FID. Without `--num-tokens`: 1, 2, 4, ... for a nested tokenizer, the only count of a fixed-length one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import vistok
from vistok.image import make_strip
from vistok.metrics import as_saved, command_line, evaluate_reconstruction
from vistok.metrics.evaluate import trained_image_size, with_image_size
from vistok.metrics.sources import batches, choose


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the reconstructions of a tokenizer."""

    model: str
    """A model folder, a training run, a bundled name (vistok/emoji-flextok) or a hub id."""
    data: str = "emoji"
    """A folder of images, "emoji", or "hf:ID"."""
    split: str = "test"
    """Which part of the data: train, test or all; the held-out part is the honest one."""
    num_tokens: tuple[int, ...] = ()
    """Token counts to measure; none: 1, 2, 4, ... up to all, or as many as the model chooses for each image."""
    features: str = "conv"
    """Feature net: conv, pixels:16, timm:NAME[@FILE], torchvision:NAME[@FILE], transformers:FOLDER, inception[@FILE], vistok:MODEL."""
    image_size: int | None = None
    """Pixels; the model's own size when not given."""
    num_images: int | None = None
    """Use this many images, drawn by the seed; all when not given."""
    decode_steps: int | None = None
    """Solver steps of a flow decoder; the model's default when not given."""
    guidance_scale: float | None = None
    """Guidance of a flow decoder, 1 is off; the model's default when not given."""
    seed: int = 0
    """Of the decoder's noise, the choice of images and the subsets of the kernel distance."""
    batch_size: int = 32
    """Images a batch."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""
    out: Path | None = None
    """JSON file for the numbers and their protocol."""
    strip: Path | None = None
    """PNG file for a picture: originals beside their reconstructions at every count."""
    strip_images: int = 8
    """Rows of that picture."""


def main(config: Config) -> None:
    """Load, measure, print, save."""
    tokenizer = vistok.load(config.model).to(config.device).eval()
    try:
        size = config.image_size or trained_image_size(tokenizer)
    except ValueError as error:
        raise SystemExit(f"{config.model}: {error}") from None
    dataset = vistok.open_dataset(config.data, image_size=size, split=config.split)
    given = {"num_steps": config.decode_steps, "guidance_scale": config.guidance_scale}
    options = {name: value for name, value in given.items() if value is not None}
    result = evaluate_reconstruction(
        tokenizer,
        dataset,
        num_tokens=config.num_tokens,
        features=config.features,
        num_images=config.num_images,
        batch_size=config.batch_size,
        seed=config.seed,
        decode_options=options,
        progress=True,
    )
    result = result.with_protocol(model=config.model, data=config.data, split=config.split, command=command_line("eval.reconstruction"))
    print(result.report())
    if config.out is not None:
        result.save(config.out)
    if config.strip is not None:
        save_strip(config.strip, tokenizer, dataset, [row["num_tokens"] for row in result.rows], config, options)


@torch.inference_mode()
def save_strip(path: Path, tokenizer, dataset, counts: list[int | float], config: Config, options: dict) -> None:
    """Draw originals and reconstructions, a row an image, from the same noise as in the evaluation; a float is a mean of own counts."""
    indices, images = next(batches(dataset, choose(dataset, config.strip_images, config.seed), config.strip_images))
    tokens = tokenizer.encode(images.to(config.device))
    options = with_image_size(tokenizer, options, tuple(images.shape[-2:]))
    columns = [images]
    for count in counts:
        generators = vistok.image_generators(config.seed, indices, config.device)
        part = tokens if isinstance(count, float) else tokens.truncate(count)
        columns.append(as_saved(tokenizer.decode(part, generators=generators, **options).cpu()))
    titles = ["original", *(f"{count:.4g} tokens" for count in counts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    make_strip([torch.stack(row) for row in zip(*columns)], column_titles=titles).save(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
