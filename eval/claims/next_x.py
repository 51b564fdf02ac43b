"""Next-X: the same network and training, with X a token, patch, cell, subsample, scale, image or group; noisy context and teacher forcing.

    python -m eval.claims.next_x --out runs/next-x                                      an hour on a CPU core
    python -m eval.claims.next_x --steps 20 --seeds 0 --num-samples 32 --out /tmp/next-x        two minutes; shows that it works

Ren et al. 2025 (arXiv 2502.20388) report that cells beat patches, subsamples, scales and whole images, and that noisy context beats
teacher forcing. Every order is an xAR of one shape, trained on as many images from the same random numbers; all draw samples with as many
solver steps an entity. Grid orders use --tokenizer, "token" and groups the first tokens of --sequence-tokenizer. A run that is finished in
--out is used again, so the same command goes on after an interruption, and more --seeds add to what is there.
Models of noisy context draw twice: with finished entities shown clean, as published, and at --context-time with that much noise
("noisy@0.2").

    d      = log(Frechet distance of B) - log(Frechet distance of A)          mean over seeds: how much better A is, relatively
    spread = sqrt(2 / seeds) * deviation of log(Frechet distance) over seeds, pooled over all runs
    holds: d > 2 spread;   does not hold: d < -2 spread;   undecided: between, or with one seed
"""

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev, variance

import torch
import tyro
from tqdm.auto import tqdm

import vistok
from vistok.data import TokenFolder
from vistok.data.tokenize import tokenize_dataset
from vistok.decoding.flow import generate_values
from vistok.generators import FlowSampling
from vistok.metrics import FeatureStatistics, as_saved, command_line, feature_net, features_of, frechet_distance
from vistok.metrics.protocol import machine, versions
from vistok.metrics.sources import batches
from vistok.rng import image_generators
from vistok.training import TrainConfig, seeded_build, train
from vistok.training.recipes import Sources
from vistok.training.recipes.xar import xar_task

CLAIMS = {  # claim: (what should be better, what it is compared with), as (order, context)
    "cells of half the grid beat single patches": (("cell-4", "noisy"), ("patch", "noisy")),
    "cells of half the grid beat smaller cells": (("cell-4", "noisy"), ("cell-2", "noisy")),
    "cells of half the grid beat subsamples": (("cell-4", "noisy"), ("subsample-2", "noisy")),
    "cells of half the grid beat scales": (("cell-4", "noisy"), ("scale", "noisy")),
    "cells of half the grid beat the whole image": (("cell-4", "noisy"), ("image", "noisy")),
    "groups of registers beat single ones": (("group-4", "noisy"), ("token", "noisy")),
}
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare orders and contexts of xAR at equal training."""

    out: Path
    """Run folder; finished runs in it are used again."""
    data: str = "emoji"
    """A folder with classes, "emoji", or "hf:ID"."""
    tokenizer: str = "vistok/emoji-vae"
    """A tokenizer of a grid, continuous or not."""
    sequence_tokenizer: str = "vistok/emoji-flextok"
    """A tokenizer of a sequence, for the orders token and group."""
    registers: int = 16
    """How many of its tokens, from the first on."""
    orders: tuple[str, ...] = ("patch", "cell-2", "cell-4", "subsample-2", "scale", "image")
    """Orders over the grid, with noisy context."""
    sequence_orders: tuple[str, ...] = ("token", "group-4")
    """Orders over the sequence, with noisy context."""
    clean_orders: tuple[str, ...] = ("patch", "cell-4", "group-4")
    """Orders that are trained with teacher forcing too."""
    seeds: tuple[int, ...] = (0, 1)
    """One training of everything each."""
    width: int = 96
    """Width of the network, a multiple of 32."""
    depth: int = 3
    """Its blocks."""
    steps: int = 3000
    """Optimizer steps of each training."""
    batch_size: int = 32
    """Images a step."""
    num_samples: int = 256
    """Images drawn of each, going round the classes."""
    num_steps: int = 10
    """Euler steps an entity."""
    guidance_scale: float = 1.0
    """Guidance of the last entity; 1 is off."""
    context_time: float = 0.2
    """Time at which models of noisy context are shown finished entities when they draw again; 0 leaves that out."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models are measured; training uses what there is."""

    @property
    def shape(self) -> dict:
        """Fields of XARConfig."""
        first = self.depth // 2
        return dict(
            width=self.width, encoder_depth=first, decoder_depth=self.depth - first, num_heads=max(1, self.width // 32),
            hidden=self.width * 5 // 2,
        )  # fmt: skip


def main(config: Config) -> None:
    """Train what is missing, measure, judge, write."""
    todo = [(order, "noisy") for order in (*config.orders, *config.sequence_orders)]
    todo += [(order, "clean") for order in config.clean_orders]
    sources = {
        False: _tokens(config, config.tokenizer, None, "grid") if config.orders else None,
        True: _tokens(config, config.sequence_tokenizer, config.registers, "sequence") if config.sequence_orders else None,
    }
    net, real = feature_net("conv", device=config.device), FeatureStatistics()
    results: dict[str, dict[str, dict]] = {}
    for seed, (order, context) in tqdm([(seed, run) for seed in config.seeds for run in todo], desc="next-x", unit="run"):
        folder = config.out / f"seed{seed}" / f"{order}-{context}"
        if not (folder / "result.json").is_file():
            real = real if real.count else _real_statistics(config, net)
            _write(folder / "result.json", _run(order, context, seed, config, sources[order in config.sequence_orders], folder, net, real))
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if found["asked"] != _asked(config):
            raise SystemExit(f"{folder} was made with {found['asked']}, now {_asked(config)} is asked: use another --out")
        results.setdefault(f"{order} {context}", {})[str(seed)] = found
        if found["frechet_shown_noisy"] is not None:
            row = {**found, "frechet": found["frechet_shown_noisy"]}
            results.setdefault(f"{order} noisy@{config.context_time:g}", {})[str(seed)] = row
    about = {"command": command_line("eval.claims.next_x"), **_asked(config), "seeds": list(config.seeds), "shape": config.shape}
    about |= {"machine": machine(config.device), "versions": versions()}
    claims = verdicts(results, config.clean_orders)
    text = markdown(results, claims, about)
    print(text)
    (config.out / "table.md").write_text(text + "\n", encoding="utf-8")
    _write(config.out / "results.json", {"about": about, "results": results, "claims": claims})


def _asked(config: Config) -> dict:
    free = ("out", "orders", "sequence_orders", "clean_orders", "seeds", "device")
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in free}


def _tokens(config: Config, tokenizer: str, num_tokens: int | None, name: str) -> dict:
    """The tokens of both splits, made once, and where they come from."""
    model, parts = vistok.load(tokenizer).to(config.device), []
    for split in ("train", "test"):
        dataset = vistok.open_dataset(config.data, image_size=model.settings.image_size, split=split)
        folder = config.out / "tokens" / name / split
        parts.append(tokenize_dataset(model, dataset, folder, num_tokens=num_tokens, flips=True, source=config.data))
    return {"tokenizer": tokenizer, "tokens": parts[0], "held_out": parts[1]}


def _real_statistics(config: Config, net) -> FeatureStatistics:
    """Of the training images: there are more of them than held-out ones, and so the distance is steadier."""
    size = vistok.load(config.tokenizer if config.orders else config.sequence_tokenizer).settings.image_size
    dataset = vistok.open_dataset(config.data, image_size=size, split="train")
    out = FeatureStatistics()
    for _, images in batches(dataset, range(len(dataset)), 64):
        out.update(features_of(net, images))
    return out


def _run(order: str, context: str, seed: int, config: Config, source: dict, folder: Path, net, real) -> dict:
    """Train one xAR, draw its samples, and say what both took and gave."""
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted training: its time cannot be put together from parts
    tokens: TokenFolder = source["tokens"]
    build = xar_task(config.shape)
    task = seeded_build(lambda: build(Sources(**source, order=order, context=context)), seed)
    options = TrainConfig(
        out=folder / "run", data=config.data, batch_size=config.batch_size, learning_rate=2e-3, betas=(0.9, 0.96), weight_decay=0.02,
        warmup_steps=min(50, config.steps // 4), schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, seed=seed,
        max_steps=config.steps, save_every=10**6, preview_every=0, log_every=max(1, config.steps // 20), progress=False,
    )  # fmt: skip
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    began = clock()
    train(task, tokens, options)
    trained = clock() - began
    pipe = vistok.load(folder / "run").to(config.device)
    task.model = pipe.generator
    samples, stats, seconds = _draw(pipe, task.codes, config, seed, clock, context_time=0.0)
    again = None
    if context == "noisy" and config.context_time and pipe.generator.order.num_entities > 1:
        again = _draw(pipe, task.codes, config, seed, clock, context_time=config.context_time)[0]
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return {
        "asked": _asked(config),
        "entities": pipe.generator.order.num_entities,
        "parameters": sum(parameter.numel() for parameter in pipe.generator.parameters()),
        "training_seconds": trained,
        "loss_clean_context": task.held_out_loss(context="clean"),
        "frechet": frechet_distance(real, FeatureStatistics.of(features_of(net, samples))),
        "frechet_shown_noisy": None if again is None else frechet_distance(real, FeatureStatistics.of(features_of(net, again))),
        "network_passes": stats,
        "seconds_per_image": seconds,
    }


@torch.no_grad()
def _draw(pipe, codes, config: Config, seed: int, clock, *, context_time: float) -> tuple[torch.Tensor, int, float]:
    """Samples [n, 3, H, W] as saved, network passes an image, and seconds an image without decoding."""
    model, images, seconds, passes = pipe.generator, [], 0.0, 0
    labels = [i % len(pipe.classes) if pipe.classes else -1 for i in range(config.num_samples)]
    for start in range(0, config.num_samples, 64):
        part = labels[start : start + 64]
        generators = image_generators(seed, range(start, start + len(part)), config.device)
        began = clock()
        tokens, stats = generate_values(
            model,
            model.make_condition(len(part), labels=part),
            generators=generators,
            codes=codes,
            sampling=FlowSampling(num_steps=config.num_steps, solver="euler", context_time=context_time),
            guidance_scale=config.guidance_scale,
        )
        seconds, passes = seconds + clock() - began, stats.target_passes
        images.append(as_saved(pipe.tokenizer.decode(tokens, generators=generators).float().cpu()))
    return torch.cat(images), passes, seconds / config.num_samples


def verdicts(results: dict[str, dict[str, dict]], clean_orders: tuple[str, ...] = ()) -> dict[str, dict]:
    """claim -> {"verdict", "gain", "spread"}: by how much less (a fraction) the first distance is in the log, from the results alone.

    A claim of which a side is missing is left out.
    """
    claims = {claim: tuple(f"{order} {context}" for order, context in sides) for claim, sides in CLAIMS.items()}
    claims |= {f"noisy context beats teacher forcing, {order}": (f"{order} noisy", f"{order} clean") for order in clean_orders}
    for how in {name.split()[1] for name in results if "@" in name}:  # the same claims of the other way to draw
        renamed = {claim: tuple(_if_there(side.replace("noisy", how), side, results) for side in sides) for claim, sides in claims.items()}
        claims |= {f"{claim} ({how})": sides for claim, sides in renamed.items() if sides != claims[claim]}
    logs = {name: [math.log(row["frechet"]) for row in rows.values()] for name, rows in results.items()}
    several = [values for values in logs.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    pooled = math.sqrt(sum((len(values) - 1) * variance(values) for values in several) / freedom) if freedom else None
    out = {}
    for claim, (ours, theirs) in claims.items():
        if ours not in logs or theirs not in logs:
            continue
        gain = fmean(logs[theirs]) - fmean(logs[ours])
        spread = None if pooled is None else pooled * math.sqrt(1 / len(logs[ours]) + 1 / len(logs[theirs]))
        decided = spread is not None and abs(gain) > 2 * spread
        out[claim] = {"verdict": (HOLDS if gain > 0 else FAILS) if decided else UNDECIDED, "gain": gain, "spread": spread}
    return out


def _if_there(name: str, other: str, results: dict) -> str:
    """An order of one entity is shown nothing, so that it has one way to draw."""
    return name if name in results else other


def markdown(results: dict[str, dict[str, dict]], claims: dict[str, dict], about: dict) -> str:
    """The table, the verdicts with their numbers, machine and command."""
    columns = ("X", "context", "entities", "passes an image", "ms an image", "training s", "held-out loss, clean context", "Frechet(conv)")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, rows in results.items():
        first, runs = next(iter(rows.values())), list(rows.values())
        cells = [*name.split(), first["entities"], first["network_passes"]]
        cells += [f"{1000 * fmean(run['seconds_per_image'] for run in runs):.1f}", f"{fmean(run['training_seconds'] for run in runs):.0f}"]
        cells += [f"{fmean(run['loss_clean_context'] for run in runs):.3f}", _spread([run["frechet"] for run in runs])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    images, seeds = about["steps"] * about["batch_size"], len(about["seeds"])
    sizes = sorted({f"{row['parameters'] / 1e6:.2f}" for rows in results.values() for row in rows.values()})
    lines += [
        "",
        f"{' to '.join(sizes[:: max(len(sizes) - 1, 1)])} million parameters, {images:,} training images each; {about['num_samples']} "
        f"samples, {about['num_steps']} Euler steps an entity, guidance {about['guidance_scale']:g}; grid orders on {about['tokenizer']}, "
        f"token and groups on the first {about['registers']} tokens of {about['sequence_tokenizer']}; mean ± deviation over {seeds} "
        f"seed{'s' if seeds > 1 else ''}, distances to the training images. Seconds are one core's own time.",
        "",
        "| claim of the paper, at this size | Frechet distance lower by | verdict |",
        "|---|---|---|",
    ]
    for claim, found in claims.items():
        spread = "spread unknown" if found["spread"] is None else f"± {100 * found['spread']:.1f}"
        lines.append(f"| {claim} | {100 * found['gain']:+.1f} % ({spread}) | {found['verdict']} |")
    hardware = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return "\n".join([*lines, "", f"Machine: {hardware}. Command: `{about['command']}`"])


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
