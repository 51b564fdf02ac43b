"""The demo: what the bundled models do with pictures they have never seen, measured, and laid out on one page.

    held-out images --tokenizers--> reconstructions at 1, 2, 4, ... tokens --> PSNR, SSIM, Frechet distance, retrieval
    classes, captions --pipelines--> samples --> Frechet distance, nearest training images
    all of it --vistok.demo_page--> OUT/index.html

`demo` shows the models it is given; `train_demo` trains a tokenizer and a generator first, and then shows those.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import vistok
from vistok import demo_page
from vistok.data import ImageDataset
from vistok.image import from_uint8, make_grid, make_strip, to_pil
from vistok.metrics import Evaluation, ImagesInMemory, as_saved, evaluate_generation, evaluate_reconstruction
from vistok.metrics.sources import choose
from vistok.pipelines import TokenImagePipeline
from vistok.registry import resolve
from vistok.rng import image_generators

logger = logging.getLogger("vistok")

TOKENIZERS = ("vistok/emoji-flextok", "vistok/emoji-fsq2d")
PIPELINES = ("vistok/emoji-gpt", "vistok/emoji-gpt-fsq2d")
MAX_CLASSES = 12
NUM_CLOSEST = 6
SPEED_IMAGES = 16


@dataclass(frozen=True)
class Shown:
    """One picture on the page: its file relative to the page, what it shows, and a line below it."""

    file: str
    alt: str
    caption: str = ""


@dataclass
class TokenizerResult:
    """A tokenizer on held-out images. rows: of each shown image, the original and its reconstructions at `counts`."""

    source: str
    about: str
    counts: list[int]
    rows: list[list[Shown]]
    evaluation: Evaluation
    encode_speed: float
    decode_speed: float
    """Images per second, all tokens."""


@dataclass
class PipelineResult:
    """A pipeline's samples. groups: (what was asked, its samples); captions: (held-out original, sample of its caption); closest: (sample,
    nearest training image); nearest: a line for each sample."""

    source: str
    about: str
    groups: list[tuple[str, list[Shown]]]
    captions: list[tuple[Shown, Shown]]
    closest: list[tuple[Shown, Shown]]
    nearest: list[str]
    evaluation: Evaluation
    speed: float
    """Images per second, tokens and pixels."""


@dataclass
class DemoReport:
    """Everything the page shows."""

    data: str
    tokenizers: list[TokenizerResult] = field(default_factory=list)
    pipelines: list[PipelineResult] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """The figures as text tables, a protocol line below each."""
        parts = []
        for result in self.tokenizers:
            table = _columns(result.evaluation, ("num_tokens", "psnr", "ssim", "frechet", "nearest_is_right")).table()
            speed = f"encode {result.encode_speed:.1f}, decode {result.decode_speed:.1f} images/s at {result.counts[-1]} tokens"
            parts += [f"{result.source}: {result.about}", table, protocol_line(result.evaluation), speed, ""]
        for result in self.pipelines:
            keys = ("num_samples", "frechet", "precision", "recall", "near_copies", "near_copies_of_reference")
            table, speed = _columns(result.evaluation, keys).table(), f"{result.speed:.1f} images/s"
            parts += [f"{result.source}: {result.about}", table, protocol_line(result.evaluation), speed, ""]
        return "\n".join([*parts, *(f"not here: {name}" for name in self.missing)]).rstrip()


def demo(
    out: Path,
    *,
    tokenizers: Sequence[str] = TOKENIZERS,
    pipelines: Sequence[str] = PIPELINES,
    data: str = "emoji",
    num_images: int = 160,
    num_rows: int = 8,
    num_samples: int = 6,
    seed: int = 0,
    device: torch.device | str = "cpu",
    notes: Sequence[str] = (),
    progress: bool = False,
) -> DemoReport:
    """Show and measure models, and write index.html, strips, grids, figures.json and figures.txt into `out`.

    tokenizers, pipelines: those that do not exist are listed on the page instead. num_images: held-out images measured.
    num_rows: of them shown. num_samples: for each class. notes: lines for the page's head.
    Raises OSError: none of the models exists.
    """
    began = time.perf_counter()
    report = DemoReport(data, notes=list(notes))
    found = []
    for source in (*tokenizers, *pipelines):
        try:
            resolve(source)
            found.append(source)
        except OSError:
            report.missing.append(source)
            logger.warning("%s is not here: the demo goes on without it", source)
    if not found:
        raise OSError(f"none of {', '.join(report.missing)} is here; `vistok demo --train` trains models of its own")
    for source in filter(found.__contains__, tokenizers):
        report.tokenizers.append(show_tokenizer(out, source, data, num_images, num_rows, seed, device, progress))
    for source in filter(found.__contains__, pipelines):
        report.pipelines.append(show_pipeline(out, source, data, num_samples, num_rows, seed, device, progress))
    report.seconds = time.perf_counter() - began
    write_report(out, report)
    return report


def train_demo(
    out: Path,
    *,
    data: str = "emoji",
    tokenizer_recipe: str = "fsq2d-emoji",
    generator_recipe: str = "gpt-emoji",
    tokenizer_steps: int | None = None,
    generator_steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
    **options,
) -> DemoReport:
    """Train a tokenizer into out/tokenizer, a generator on its tokens into out/generator, and show both.

    The steps are the recipes' by default. Runs that are there already, of an interrupted call, are continued. options: as for `demo`.
    """
    from vistok.training.recipes import train_generator, train_tokenizer

    common = {"data": data, "seed": seed, "threads": threads, "progress": progress}
    began = time.perf_counter()
    tokenizer, generator = out / "tokenizer", out / "generator"
    steps = {} if tokenizer_steps is None else {"max_steps": tokenizer_steps}
    logger.info("1 of 3: training the tokenizer (%s)", tokenizer_recipe)
    train_tokenizer(tokenizer_recipe, out=tokenizer, resume=_is_begun(tokenizer), **common, **steps)
    halfway = time.perf_counter()
    steps = {} if generator_steps is None else {"max_steps": generator_steps}
    logger.info("2 of 3: training the generator on its tokens (%s)", generator_recipe)
    train_generator(generator_recipe, out=generator, tokenizer=str(tokenizer), resume=_is_begun(generator), **common, **steps)
    notes = [
        f"Trained here from nothing: {tokenizer_recipe} in {(halfway - began) / 60:.1f} minutes, "
        f"{generator_recipe} in {(time.perf_counter() - halfway) / 60:.1f} minutes."
    ]
    logger.info("3 of 3: samples and figures")
    names = {"tokenizers": [str(tokenizer)], "pipelines": [str(generator)]}
    return demo(out, data=data, seed=seed, notes=notes, progress=progress, **names, **options)


def _is_begun(run: Path) -> bool:
    return (run / "config.json").is_file()


def show_tokenizer(
    out: Path, source: str, data: str, num_images: int, num_rows: int, seed: int, device: torch.device | str, progress: bool
) -> TokenizerResult:
    """Measure a tokenizer on held-out images and save a strip of some of them."""
    logger.info("%s: reconstructing held-out images", source)
    tokenizer = vistok.load(source).to(device).eval()
    dataset = vistok.open_dataset(data, image_size=tokenizer.settings.image_size, split="test")
    evaluation = evaluate_reconstruction(tokenizer, dataset, num_images=num_images, seed=seed, kid_subsets=10, progress=progress)
    counts = [row["num_tokens"] for row in evaluation.rows]
    indices = choose(dataset, num_rows, seed)
    images = _read(dataset, indices)
    encode_speed, decode_speed = measure_speed(tokenizer, _read(dataset, choose(dataset, SPEED_IMAGES, seed)))
    tokens = tokenizer.encode(images.to(device))
    decoded = [as_saved(tokenizer.decode(tokens.truncate(k), generators=image_generators(seed, indices, device)).cpu()) for k in counts]
    titles = ["original", *(f"{count} token{'s' if count > 1 else ''}" for count in counts)]
    make_strip([torch.stack(row) for row in zip(images, *decoded)], column_titles=titles).save(_new(out / f"{slug(source)}-strip.png"))
    rows = [
        [
            _save(out, f"{slug(source)}/{i}-{title.replace(' ', '-')}.png", picture, f"{dataset.names[index]}, {title}")
            for title, picture in zip(titles, pictures, strict=True)
        ]
        for i, (index, pictures) in enumerate(zip(indices, zip(images, *decoded), strict=True))
    ]
    return TokenizerResult(source, about(tokenizer), counts, rows, evaluation, encode_speed, decode_speed)


def show_pipeline(
    out: Path, source: str, data: str, num_samples: int, num_captions: int, seed: int, device: torch.device | str, progress: bool
) -> PipelineResult:
    """Sample every class and some held-out captions, save grids, measure, and look for near copies among the training images."""
    logger.info("%s: drawing samples", source)
    pipe = TokenImagePipeline.from_pretrained(source).to(device)
    pipe.set_progress_bar_config(desc="samples", unit="token", disable=not progress)
    size = pipe.tokenizer.settings.image_size
    held_out = vistok.open_dataset(data, image_size=size, split="test")
    training = vistok.open_dataset(data, image_size=size, split="train")
    reads_captions = pipe.generator.settings.text != "none"
    some = choose(held_out, num_captions, seed + 1)
    asked = list(pipe.classes[:MAX_CLASSES])
    kind = "labels" if asked else "prompts" if reads_captions else None
    asked = asked or [held_out.captions[index] for index in some] if kind else ["unconditional"]
    began = time.perf_counter()
    output = pipe(num_images=num_samples, seed=seed, **({kind: asked} if kind else {}))
    speed = len(output.images) / (time.perf_counter() - began)
    make_grid(output.images, columns=num_samples).save(_new(out / f"{slug(source)}-samples.png"))
    evaluation = evaluate_generation(
        ImagesInMemory(output.images),
        held_out,
        training=training,
        neighbours=max(1, min(3, len(output.images) - 1, len(held_out) - 1)),
        seed=seed,
        kid_subsets=10,
        device=device,
        progress=progress,
    )
    titles = [text for text in asked for _ in range(num_samples)]
    shown = [_save(out, f"{slug(source)}/sample-{i:03d}.png", image, titles[i]) for i, image in enumerate(output.images)]
    groups = [(text, shown[i * num_samples : (i + 1) * num_samples]) for i, text in enumerate(asked)]
    nearest = evaluation.rows[0]["nearest"]
    lines = [nearest_line(i, title, near, training) for i, (title, near) in enumerate(zip(titles, nearest, strict=True))]
    closest = sorted(range(len(nearest)), key=lambda i: -nearest[i]["psnr"])[:NUM_CLOSEST]
    pairs = [(shown[i], _neighbour(out, source, training, nearest[i])) for i in closest]
    if pairs:
        strip = [[Image.open(out / shown.file) for shown in pair] for pair in pairs]
        make_strip(strip, column_titles=["sample", "nearest"]).save(_new(out / f"{slug(source)}-nearest.png"))
    captions = _captioned(out, source, pipe, held_out, some, seed) if reads_captions and kind == "labels" else []
    return PipelineResult(source, about(pipe.generator, pipe.tokenizer), groups, captions, pairs, lines, evaluation, speed)


def nearest_line(number: int, asked: str, near: dict, training: ImageDataset) -> str:
    """A sample's number, what it was asked for, and its nearest training image."""
    name = training.names[near["training_image"]]
    return f"{number:4d}  {asked:<24} {near['psnr']:6.2f} dB  {name}{' (mirrored)' if near['mirrored'] else ''}"


def _neighbour(out: Path, source: str, training: ImageDataset, near: dict) -> Shown:
    index = near["training_image"]
    picture = from_uint8(training.read(index))
    picture = picture.flip(-1) if near["mirrored"] else picture
    name = training.names[index]
    return _save(out, f"{slug(source)}/training-{index:05d}.png", picture, name, f"{name}, {near['psnr']:.1f} dB")


def _captioned(out: Path, source: str, pipe: TokenImagePipeline, held_out: ImageDataset, indices: list[int], seed: int):
    """Pairs of a held-out image and a sample of its caption."""
    made = pipe(prompts=[held_out.captions[index] for index in indices], seed=seed, num_images=1).images
    folder = slug(source)
    return [
        (
            _save(out, f"{folder}/held-out-{i}.png", from_uint8(held_out.read(index)), held_out.captions[index]),
            _save(out, f"{folder}/caption-{i}.png", image, held_out.captions[index], held_out.captions[index]),
        )
        for i, (index, image) in enumerate(zip(indices, made, strict=True))
    ]


def measure_speed(tokenizer, images: Tensor) -> tuple[float, float]:
    """Images per second of encoding and of decoding all tokens."""
    images = images.to(tokenizer.device)
    began = time.perf_counter()
    tokens = tokenizer.encode(images)
    halfway = time.perf_counter()
    tokenizer.decode(tokens, generators=image_generators(0, range(len(images)), tokenizer.device)).cpu()
    return len(images) / (halfway - began), len(images) / (time.perf_counter() - halfway)


def about(*models) -> str:
    """One line about a model or two."""
    parts = []
    for model in models:
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
        low, high = getattr(model, "min_tokens", None) or model.max_tokens, model.max_tokens
        codes = getattr(model, "codebook_size", None) or getattr(model, "vocab_size", None)
        tokens = f"{low} to {high} tokens" if low != high else f"{high} tokens"
        parts.append(f"{type(model).__name__}, {size}, {tokens}{f' of {codes:,} codes' if codes else ''}")
    return " over ".join(parts)


def protocol_line(evaluation: Evaluation) -> str:
    """Where a table's numbers come from, in one line."""
    protocol = evaluation.protocol
    told = ("num_steps", "guidance_scale", "near_copy_psnr")
    options = ", ".join(f"{key} {value}" for key, value in protocol.options.items() if key in told)
    return (
        f"{protocol.num_images} of {protocol.num_available} held-out images, {protocol.image_size[0]} x {protocol.image_size[1]} pixels; "
        f"features {protocol.features}; seed {protocol.seed}{'; ' + options if options else ''}; "
        f"{protocol.machine['device']}, {protocol.machine['threads']} threads; torch {protocol.versions['torch']}"
    )


def write_report(out: Path, report: DemoReport) -> None:
    """Write the page, the figures and the list of nearest training images."""
    figures = {result.source: result.evaluation.to_dict() for result in (*report.tokenizers, *report.pipelines)}
    _new(out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "figures.txt").write_text(report.text() + "\n", encoding="utf-8")
    for result in report.pipelines:
        (out / f"{slug(result.source)}-nearest.txt").write_text("\n".join(result.nearest) + "\n", encoding="utf-8")
    (out / "index.html").write_text(demo_page.render(report, protocol_line), encoding="utf-8")


def _columns(evaluation: Evaluation, keys: Sequence[str]) -> Evaluation:
    return Evaluation(evaluation.protocol, [{key: row[key] for key in keys} for row in evaluation.rows])


def slug(source: str) -> str:
    """A file name for a model."""
    return Path(source).name


def _read(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    return from_uint8(torch.stack([dataset.read(index) for index in indices]))


def _save(out: Path, name: str, picture: Tensor | Image.Image, alt: str, caption: str = "") -> Shown:
    file = f"pictures/{name}"
    (to_pil(picture)[0] if isinstance(picture, Tensor) else picture).save(_new(out / file))
    return Shown(file, alt, caption)


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
