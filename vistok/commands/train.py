"""`vistok train tokenizer` and `vistok train generator`: a recipe, a source of images, a run folder."""

import json
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vistok.commands.common import BadImages, Folder, Model, optional

TokenizerRecipe = Literal[
    "fsq2d-tiny", "fsq2d-emoji", "vae-tiny", "vae-emoji", "vae-imagenet256", "flextok-tiny", "flextok-emoji", "flextok-imagenet256",
    "titok-tiny", "titok-tiny-text", "titok-tiny-stage1", "titok-tiny-stage2", "titok-emoji", "titok-imagenet256", "titok-text256",
    "titok-imagenet256-stage1", "titok-imagenet256-stage2",
    "vqgan-tiny", "vqgan-emoji", "vqgan-imagenet256",
    "lavit-tiny", "lavit-emoji",
    "seed-tiny", "seed-emoji",
    "tokenflow-tiny", "tokenflow-emoji", "tokenflow-imagenet256",
    "var-vqvae-tiny", "var-vqvae-emoji", "var-vqvae-imagenet256",
]
GeneratorRecipe = Literal[
    "gpt-tiny", "gpt-emoji", "gpt-emoji-16", "gpt-mixed-tiny", "gpt-mixed-emoji", "gpt-exposure-tiny", "gpt-exposure-emoji",
    "gpt-pattention-tiny", "gpt-pattention-emoji",
    "var-tiny", "var-emoji", "var-imagenet256", "gpt-imagenet256", "tokenflow-t2i-tiny", "tokenflow-t2i-emoji",
    "maskgit-tiny", "maskgit-emoji", "maskgit-imagenet256", "rar-tiny", "rar-emoji", "rar-imagenet256",
    "xar-tiny", "xar-mixed-tiny", "xar-emoji", "xar-emoji-16", "xar-imagenet256",
]

RECIPES_OWN = "default: the recipe's"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fields of TrainConfig that a recipe sets and a user may replace."""

    data: optional(str, "PATH|emoji", RECIPES_OWN) = None
    """Images: a folder (flat, or one folder a class), emoji (the bundled set), or hf:ID."""
    max_steps: optional(int, "N", RECIPES_OWN) = None
    """Optimizer steps in all; a resumed run counts on."""
    save_every: optional(int, "N", RECIPES_OWN) = None
    """Steps between checkpoints, from which --resume continues; the last step is always saved."""
    keep_checkpoints: optional(int, "N", "default: 2") = None
    """How many newest checkpoints stay on disk."""
    preview_every: optional(int, "N", RECIPES_OWN) = None
    """Steps between pictures in OUT/previews; 0 = none."""
    log_every: optional(int, "N", RECIPES_OWN) = None
    """Steps between lines of OUT/metrics.jsonl."""
    seed: optional(int, "S", "default: 0") = None
    """Decides weights at the start, order, augmentation and every random draw: the same seed gives the same run."""
    batch_size: optional(int, "N", RECIPES_OWN) = None
    """Images per optimizer step, over all processes."""
    gradient_accumulation: optional(int, "N", RECIPES_OWN) = None
    """Split each batch into so many parts: less memory, the same result."""
    learning_rate: optional(float, "RATE", RECIPES_OWN) = None
    """Peak learning rate."""
    weight_decay: optional(float, "X", RECIPES_OWN) = None
    """AdamW's weight decay."""
    warmup_steps: optional(int, "N", RECIPES_OWN) = None
    """Steps in which the learning rate rises from zero."""
    ema_decay: optional(float, "X", RECIPES_OWN) = None
    """Decay of the averaged weights that are saved as the result; 0 saves the last weights."""
    precision: optional(Literal["no", "bf16", "fp16"], "{no,bf16,fp16}", RECIPES_OWN) = None
    """Mixed precision; no is float32, fp16 needs a GPU."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps on a GPU."""
    no_flip: bool = False
    """Do not mirror images at random; for text and other things that have a left and a right."""
    on_bad_image: optional(BadImages, "{skip,error}", "default: skip") = None
    """A file that is no readable image: skip it, count it and list it in OUT/bad_images.json; or stop and name it."""
    workers: optional(int, "N", RECIPES_OWN) = None
    """Threads that decode images ahead, for data too large to keep in memory."""
    threads: optional(int, "N", "default: torch's choice") = None
    """CPU threads of torch."""
    max_bad_steps: optional(int, "N", "default: 0") = None
    """Steps with NaN or infinite numbers that are left out before the run stops."""
    no_progress: bool = False
    """Show no progress bar."""

    def overrides(self) -> dict:
        """The fields of TrainConfig that were given."""
        flags = {"compile": {"compile": True}, "no_flip": {"flip": False}, "no_progress": {"progress": False}}
        given = {}
        for field in fields(TrainOptions):
            value = getattr(self, field.name)
            if field.name in flags:
                given |= flags[field.name] if value else {}
            elif value is not None:
                given[field.name] = value
        return given


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a tokenizer: images in, a model that turns images into tokens and back out.

    OUT becomes a run folder: config.json, metrics.jsonl, log.txt, previews/ (originals above reconstructions), checkpoints/ and model/,
    which every other command takes as a model (OUT itself does too). Ctrl-C saves and stops; the same command with --resume goes on,
    bit for bit, also after a kill or a power cut.

        vistok train tokenizer --recipe fsq2d-tiny --data emoji --out runs/first          10 seconds, to see that it works
        vistok train tokenizer --recipe fsq2d-emoji --data PHOTOS --out runs/photos       about 4 minutes on two CPU cores
        accelerate launch -m vistok train tokenizer --recipe flextok-imagenet256 --vae VAE --data PHOTOS --out runs/large     many GPUs
    """

    recipe: TokenizerRecipe
    """Model, losses and settings: *-tiny take seconds on a CPU, *-emoji minutes (flextok: hours), *-imagenet256 days on GPUs."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    vae: optional(str, "MODEL", "default: the recipe's; vistok/emoji-vae for flextok-emoji") = None
    """A trained model to build on. FlexTok: the KL-VAE on whose latents it works. titok-*-stage1: the 2D tokenizer whose codes it learns;
    titok-*-stage2: the run of stage 1. tokenflow-*, seed-*: a teacher of meaning: a run of `vistok train teacher`, a timm model, or a
    transformers vision model."""
    image_size: optional(int, "PIXELS", RECIPES_OWN) = None
    """Images are resized and cropped to this square, and the model is built for it."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's."""

    def run(self) -> int:
        from vistok.training.recipes import train_tokenizer

        given = self.training.overrides() | ({} if self.image_size is None else {"image_size": self.image_size})
        folder = train_tokenizer(self.recipe, out=self.out, vae=self.vae, resume=self.resume, **given)
        return report_run(folder, f"vistok reconstruct IMAGE --model {shlex.quote(str(folder))} --out strip.png")


@dataclass(frozen=True, kw_only=True)
class TrainGenerator:
    """Train a generator: it learns which tokens follow which, for each class and caption, and so makes new images.

    The images of --data are tokenized first, into OUT-tokens (kept, and used again by --resume); or give the folder of an earlier
    `vistok tokenize` with --tokens. Classes are folder names; captions come from captions.jsonl, metadata.jsonl or .txt files beside the
    images. OUT becomes a run folder as with `vistok train tokenizer`; its model/ is a pipeline, tokenizer included.

        vistok train generator --recipe gpt-tiny --tokenizer runs/first --out runs/first-gpt          seconds, to see that it works
        vistok train generator --recipe gpt-emoji --data PHOTOS --tokenizer runs/photos --out runs/photos-gpt       about 4 minutes
        vistok train generator --recipe xar-emoji --tokenizer vistok/emoji-vae --order cell-2 --out runs/xar       about 10 minutes
    """

    recipe: GeneratorRecipe
    """Model, losses and settings: gpt-tiny takes seconds, gpt-emoji minutes on a CPU, gpt-emoji-16 only learns the first 16 tokens."""
    tokenizer: Model
    """The tokenizer whose tokens it learns: a run folder, vistok/emoji-fsq2d, vistok/emoji-flextok ..."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    tokens: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: tokenize --data)")] = None
    """A folder made by `vistok tokenize` with this tokenizer."""
    order: optional(str, "ORDER", "default: what suits the tokens") = None
    """What an xar recipe makes at once: token, patch, cell-K, subsample-Q, scale, scale-1-2-4-8, image, group-N or random-N."""
    context: optional(Literal["noisy", "clean"], "{noisy,clean}", "default: noisy") = None
    """How an xar recipe shows what came before: noisy, as published, or clean (teacher forcing)."""
    start: optional(str, "MODEL", "default: fresh weights") = None
    """A trained GPT, or a run or pipeline of one, that a gpt recipe starts from."""
    grow: optional(int, "N", "default: none") = None
    """Parameter tokens that each attention layer of --start gains before training, feed-forward layers in proportion; what it computes
    stays as it was. For gpt-pattention recipes."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's."""

    def run(self) -> int:
        from vistok.training.recipes import train_generator

        if self.tokens is not None and self.training.data is not None:
            raise ValueError("give --data or --tokens, not both: a token folder holds its images' tokens already")
        folder = train_generator(
            self.recipe,
            out=self.out,
            tokenizer=self.tokenizer,
            tokens=self.tokens,
            order=self.order,
            context=self.context,
            start=self.start,
            grow=self.grow,
            resume=self.resume,
            **self.training.overrides(),
        )
        return report_run(folder, f"vistok generate --model {shlex.quote(str(folder))} --num-images 16 --out samples")


def report_run(folder: Path, next_command: str) -> int:
    """Print where a run ended and what to do with it; the exit code: 130 when a signal ended it before its last step."""
    wanted = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]["max_steps"]
    reached = max((int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")), default=0)
    if reached < wanted:
        print(f"stopped at step {reached} of {wanted}; the same command with --resume continues", file=sys.stderr)
        return 130
    print(folder / "model")
    for line in codebook_report(folder):
        print(line, file=sys.stderr)
    print(f"next: {next_command}", file=sys.stderr)
    return 0


def codebook_report(folder: Path) -> list[str]:
    """How much of its codebook a run used in the last lines of its metrics; nothing for a run without one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next((line for line in reversed(lines) if any(name.endswith("usage") for name in line)), {})
    names = [name.removesuffix("usage") for name in last if name.endswith("usage")]
    return [
        f"{name.replace('_', ' ')}codebook up to step {last['step']}: {last[f'{name}usage']:.0%} of the codes used, "
        f"perplexity {last[f'{name}perplexity']:.0f}"
        for name in names
    ]
