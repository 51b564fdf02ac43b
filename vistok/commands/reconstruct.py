"""`vistok reconstruct`: images beside what is left of them at several token counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vistok.commands.common import BadImages, Device, Model, Threads, load_tokenizer, logger, optional, shown, shows_progress, use_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Encode images, keep the first tokens, decode: one strip with a row an image and a column a token count.

    Prints the PSNR of every reconstruction (dB, higher is closer). A tokenizer of ordered tokens (FlexTok) decodes any count, from the same
    noise at every count; one of a fixed length (fsq2d, a VAE) has a single column.

        vistok reconstruct cat.jpg dog.png --model vistok/emoji-flextok --num-tokens 1 4 16 64 --out strip.png
        vistok reconstruct PHOTOS --model runs/photos --out strip.png                a folder: every image in it
    """

    images: tyro.conf.Positional[shown(tuple[str, ...], "IMAGE...", "one or more")]
    """Image files, or folders of them."""
    model: Model
    """The tokenizer: a run folder, a model folder, a bundled name or a hub id."""
    num_tokens: shown(tuple[int, ...], "K...", "default: 1 2 4 ... all") = ()
    """Token counts, one column each."""
    out: shown(Path, "FILE") = Path("strip.png")
    """Picture to write."""
    keep_size: bool = False
    """Keep each image's own size (cropped to what the model's patches divide) instead of resizing it to the model's size."""
    decode_steps: optional(int, "N", "default: the model's") = None
    """Solver steps of a flow decoder (FlexTok)."""
    guidance_scale: optional(float, "G", "default: the model's") = None
    """Guidance of a flow decoder; 1 is off."""
    seed: int = 0
    """Of the decoder's noise; image i has its own, so it does not depend on the others."""
    on_bad_image: BadImages = "error"
    """A file that is no readable image: stop and name it, or skip it."""
    device: Device = None
    """Where the model runs: cpu, cuda, cuda:1, mps."""
    threads: Threads = None
    """CPU threads of torch."""

    def run(self) -> None:
        from tqdm import tqdm

        from vistok.image import BrokenImageError, make_strip

        if not self.images:
            raise ValueError("give at least one image: vistok reconstruct IMAGE --model MODEL")
        tokenizer = load_tokenizer(self.model, use_device(self.device, self.threads))
        options = decode_options(tokenizer, num_steps=self.decode_steps, guidance_scale=self.guidance_scale)
        files = expand(self.images)
        rows, table = [], []
        for index, file in enumerate(tqdm(files, desc="reconstruct", unit="image", disable=not shows_progress())):
            try:
                image = open_for(tokenizer, file, self.keep_size)
            except BrokenImageError as error:
                if self.on_bad_image == "error":
                    raise ValueError(f"{error}; --on-bad-image skip leaves it out") from error
                logger.warning("left out %s", error)
                continue
            counts, decoded, scores = reconstructions(tokenizer, image, self.num_tokens, seed=self.seed, index=index, options=options)
            rows.append((Path(file).name, [image, *decoded]))
            table.append((Path(file).name, dict(zip(counts, scores, strict=True))))
        if not rows:
            raise ValueError(f"none of the {len(files)} images can be read")
        counts = sorted({count for _, scores in table for count in scores})
        shared = all(len(scores) == len(counts) for _, scores in table)
        titles = ["original", *(f"{count} token{'s' if count > 1 else ''}" for count in counts)] if shared else None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        make_strip([pictures for _, pictures in rows], column_titles=titles, row_titles=[short(name) for name, _ in rows]).save(self.out)
        print(psnr_table(table, counts))
        print(self.out)


def expand(paths: Sequence[str]) -> list[str]:
    """Files as they are, and for each folder the images below it. Raises ValueError: a folder without images."""
    from vistok.data.folder import list_folder

    files = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        found = list_folder(path).images
        if not found:
            raise ValueError(f"{path} holds no images")
        files += [str(Path(path) / name) for name in found]
    return files


def open_for(tokenizer, file: str, keep_size: bool) -> "Tensor":
    """One image [1, 3, H, W] at the model's size, or at its own, cropped at the centre to a multiple of the model's patches.

    Raises BrokenImageError: not readable. ValueError: smaller than a patch.
    """
    from vistok.image import open_image, resize_crop, to_tensor

    image, size = open_image(file), tokenizer.settings.image_size
    if keep_size:
        reduction = tokenizer.settings.reduction
        rows, columns = reduction if isinstance(reduction, tuple) else (reduction, reduction)
        size = (image.height // rows * rows, image.width // columns * columns)
        if 0 in size:
            raise ValueError(f"{file} is {image.height} x {image.width}, smaller than the model's {rows} x {columns} patches")
        left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
        image = image.crop((left, top, left + size[1], top + size[0]))
    return to_tensor(resize_crop(image, size))[None]


def decode_options(tokenizer, **given) -> dict:
    """The options that are not None. Raises ValueError: a flow decoder's option for a tokenizer that has none."""
    given = {name: value for name, value in given.items() if value is not None}
    if given and not hasattr(tokenizer, "decode_prefixes"):
        flag = {"num_steps": "--decode-steps", "guidance_scale": "--guidance-scale"}[next(iter(given))]
        raise ValueError(f"{flag} is for flow decoders (FlexTok); {type(tokenizer).__name__} decodes in one pass: leave it out")
    return given


def token_counts(tokenizer, wanted: Sequence[int], encoded: int) -> list[int]:
    """The counts to decode. encoded: tokens of the full image. Raises ValueError: a count that this tokenizer does not have."""
    from vistok.metrics import default_token_counts

    name = type(tokenizer).__name__
    if tokenizer.min_tokens == tokenizer.max_tokens:
        if set(wanted) - {encoded}:
            raise ValueError(
                f"{name} has a fixed length, {encoded} tokens for such an image: leave out --num-tokens; FlexTok models decode any count"
            )
        return [encoded]
    counts = sorted(set(wanted)) or default_token_counts(tokenizer.min_tokens, encoded, tokenizer.layout)
    wrong = [count for count in counts if not tokenizer.min_tokens <= count <= encoded]
    if wrong:
        raise ValueError(f"--num-tokens {wrong[0]}: this {name} makes {tokenizer.min_tokens} to {encoded} tokens")
    return counts


def reconstructions(tokenizer, image: "Tensor", wanted: Sequence[int], *, seed: int, index: int, options: dict):
    """Counts, images [1, 3, H, W] and PSNRs (dB) of one image [1, 3, H, W]; `index` is its number, which with the seed makes the noise."""
    from vistok.metrics import as_saved, psnr
    from vistok.rng import image_generators

    tokens = tokenizer.encode(image.to(tokenizer.device))
    counts = token_counts(tokenizer, wanted, int(tokens.counts[0]))
    if hasattr(tokenizer, "decode_prefixes"):
        options = {**options, "image_size": tuple(image.shape[-2:])}
    decoded = []
    for count in counts:
        generators = image_generators(seed, [index], tokenizer.device)
        decoded.append(as_saved(tokenizer.decode(tokens.truncate(count), generators=generators, **options).cpu()))
    return counts, decoded, [float(psnr(picture, image)[0]) for picture in decoded]


def psnr_table(table: list[tuple[str, dict[int, float]]], counts: Sequence[int]) -> str:
    """PSNR of every image at every count, and the mean below."""
    mean = {count: [scores[count] for _, scores in table if count in scores] for count in counts}
    lines = [*table, ("mean", {count: sum(values) / len(values) for count, values in mean.items()})] if len(table) > 1 else table
    width = max(len("PSNR, dB"), *(len(short(name)) for name, _ in lines))
    head = f"{'PSNR, dB':<{width}}" + "".join(f"{count:>8}" for count in counts) + "  tokens"
    cells = [[f"{scores[count]:.2f}" if count in scores else "-" for count in counts] for _, scores in lines]
    return "\n".join([head, *(f"{short(name):<{width}}" + "".join(f"{c:>8}" for c in row) for (name, _), row in zip(lines, cells))])


def short(name: str, limit: int = 28) -> str:
    """The name, its middle left out where it is long."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 2]}...{name[-(limit // 2 - 1) :]}"
