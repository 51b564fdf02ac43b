"""`vistok models`, `vistok info` and `vistok convert`: what models there are, what one is, and how to bring one from elsewhere."""

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from vistok.commands.common import Folder, Model, optional, shown

CARD_NAMES = ("README.md", "card.md")
CARD_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the presets, which `vistok.create` builds with fresh weights, and the trained models that come with the package.

    A name, and one line about it.

        vistok models                  all of them
        vistok models "vistok/*"       the trained ones
    """

    pattern: tyro.conf.Positional[shown(str, "PATTERN", "default: all")] = "*"
    """Shell pattern of names."""

    def run(self) -> None:
        from vistok.registry import list_models, resolve

        names = list_models(self.pattern)
        if not names:
            raise ValueError(f"no model matches {self.pattern!r}; `vistok models` lists all")
        width = max(map(len, names))
        for name in names:
            about = card_lines(resolve(name), 1) if name.startswith("vistok/") else preset_lines(name)[:1]
            print(f"{name:<{width}}  {about[0] if about else ''}".rstrip())


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a model is: class, parameters, tokens, codebook, image size, classes, config, and the start of its card.

    A pipeline's parts are told one after the other.

        vistok info vistok/emoji-flextok
        vistok info flextok-d12-d12                     a preset: shapes only, nothing is allocated
    """

    model: tyro.conf.Positional[Model]
    """A preset, a run folder, a model folder, a bundled name or a hub id."""

    def run(self) -> None:
        import torch

        from vistok.registry import create, list_models, load, resolve

        if not self.model.startswith("vistok/") and self.model in list_models():
            with torch.device("meta"):
                model = create(self.model)
            where, about = "preset, fresh weights", preset_lines(self.model)
        else:
            folder = resolve(self.model)
            model, where, about = load(folder), str(folder), card_lines(folder, CARD_LINES)
        parts = {name: getattr(model, name) for name in ("generator", "tokenizer") if hasattr(model, name)}
        if parts:
            print(f"{self.model}: {type(model).__name__} ({where})")
        for title, part in (parts or {self.model: model}).items():
            print("\n".join(description(part, title if parts else f"{title}: {type(part).__name__} ({where})")))
        if about:
            print("\n".join(["", *about]))


def description(model, title: str) -> list[str]:
    """The facts about one model, a line each."""
    facts = {"class": f"{type(model).__name__}: {inspect.getdoc(type(model)).partition(chr(10))[0]}"}
    facts["parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    if not hasattr(model, "settings"):  # a model of timm or transformers
        return [title, *(f"  {name:<11} {value}" for name, value in facts.items())]
    settings = model.settings
    low, high = getattr(model, "min_tokens", None), getattr(model, "max_tokens", None)
    if high is not None:
        facts["tokens"] = f"{low} to {high} an image" if low is not None and low != high else f"{high} an image"
    size = getattr(model, "codebook_size", None) or getattr(model, "vocab_size", None)
    facts["codebook"] = f"{size:,} codes" if size else "none, continuous values"
    if hasattr(settings, "image_size"):
        facts["image size"] = "{} x {} pixels".format(*settings.image_size)
    if getattr(settings, "classes", ()):
        facts["classes"] = ", ".join(f"{i} {name}" for i, name in enumerate(settings.classes))
    config = {key: value for key, value in dataclasses.asdict(settings).items() if key not in ("image_size", "classes")}
    facts["config"] = ", ".join(f"{key}={value}" for key, value in config.items())
    return [title, *(f"  {name:<11} {value}" for name, value in facts.items())]


def preset_lines(name: str) -> list[str]:
    """The docstring of a preset."""
    from vistok.registry import preset_help

    return preset_help(name).splitlines()


def card_lines(folder: Path, limit: int) -> list[str]:
    """The first lines of a model's card that say something: no front matter, no heading marks, no empty lines."""
    card = next((folder / name for name in CARD_NAMES if (folder / name).is_file()), None)
    if card is None:
        return []
    text = card.read_text(encoding="utf-8")
    if text.startswith("---\n") and "\n---\n" in text:
        text = text.split("\n---\n", 1)[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("#", "!["))] if limit == 1 else lines
    return told[:limit]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Read an official checkpoint and write it as a vistok model folder, or, with --to-official, the other way round.

    Nothing in a checkpoint is imported or run; a key too many, too few or of another shape is an error that names it.

        vistok convert flextok downloads/flextok_d12_d12 --out models/flextok-d12
        vistok convert kl-vae downloads/vae --out models/vae --set image_size=[256,256]
    """

    format: tyro.conf.Positional[shown(str, "FORMAT")]
    """What the checkpoint is: flextok, kl-vae (a diffusers AutoencoderKL), kl-16 (the VAE of MAR and xAR, and others in LDM's form), titok,
    maskgit, rar, llamagen (its tokenizer or GPT), var, xar, seed, lavit, tokenflow or tokenflow-t2i."""
    path: tyro.conf.Positional[shown(str, "PATH")]
    """Its folder or weights file; with --to-official, a vistok model (folder, bundled name or hub id)."""
    out: Folder
    """Folder to write; it must not exist, or be empty."""
    set: shown(tuple[str, ...], "NAME=VALUE...", "default: none") = ()
    """Config fields that the checkpoint does not say, values as JSON: image_size=[256,256] decode_steps=25."""
    config: optional(Path, "FILE", "default: the one beside the weights") = None
    """The official configuration, a JSON file (flextok)."""
    to_official: bool = False
    """Write a vistok model in the official format."""

    def run(self) -> None:
        from vistok.convert import convert, export

        if self.out.is_dir() and any(self.out.iterdir()) or self.out.is_file():
            raise ValueError(f"{self.out} is not empty; choose another --out")
        if self.to_official:
            if self.set or self.config is not None:
                raise ValueError("--set and --config say what an official checkpoint leaves out; --to-official takes neither")
            print(export(self.format, self.path, self.out))
            return
        overrides = dict(parse_setting(text) for text in self.set)
        if self.config is not None:
            overrides["config"] = json.loads(self.config.read_text(encoding="utf-8"))
        try:
            print(convert(self.format, self.path, self.out, **overrides))
        except TypeError as error:
            raise ValueError(f"{self.format} does not take these settings: {error}") from error


def parse_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE with a JSON value (a list is a tuple), or plain text where it is no JSON. Raises ValueError: no name or no value."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed
