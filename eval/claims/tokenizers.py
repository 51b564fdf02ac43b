"""FlexTok, TokenFlow, SEED, LaVIT, TiTok and VQ at equal data, size and training time, and what becomes of their papers' claims.

    python -m eval.claims.tokenizers --minutes 10 --seeds 0 1 2 --out runs/claims-tokenizers          half a day on a CPU core
    python -m eval.claims.tokenizers --minutes 0.1 --seeds 0 --gpt-seconds 5 --out /tmp/claims        minutes; shows that it works

Each of the eight models of eval/claims/tokenizers_models.py (64 px, parameters within 20 %, asserted) trains for --minutes: its step is
timed first, then it gets as many steps as fit, so that learning rates end where they should. A model that is finished in --out is not
trained again, so the same command goes on after an interruption, and more --seeds add to what is there. Time is CPU time of this process on
a CPU, so other work on the machine does not count; on a GPU it is wall time. Results: OUT/table.md, OUT/results.json.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

import vistok
from eval.claims.tokenizers_measure import measure, seed_text_retrieval
from eval.claims.tokenizers_models import MODELS, SIZE, Entry, vae_task
from eval.claims.tokenizers_report import markdown, verdicts
from vistok.metrics import command_line
from vistok.metrics.protocol import machine, versions
from vistok.metrics.understanding import Prober
from vistok.training import TrainConfig, seeded_build, train
from vistok.training.checkpoint import write_json
from vistok.training.loop import TrainingRun

TOLERANCE = 1.2
VAE_SHARE = 0.35
MIN_STEPS = 10
PROBE_STEPS, NOMINAL_STEPS = 3, 100
FIXED_COUNTS = (8, 16, 24, 32, 48, 64)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare tokenizers at equal training time."""

    out: Path
    """Run folder; finished models in it are used again."""
    data: str = "emoji"
    """A folder with classes or captions, "emoji", or "hf:ID"; SEED and TokenFlow learn from its captions."""
    minutes: float = 10.0
    """Training time of each model."""
    seeds: tuple[int, ...] = (0,)
    """One training of every model each."""
    gpt_seconds: float = 60.0
    """Training time of the GPT on each model's tokens."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which of the models."""
    captions: str = "hash"
    """Who reads captions for retrieval: hash, minilm, or a folder (as for eval.probe)."""
    batch_size: int = 16
    """Images a step."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""


def main(config: Config) -> None:
    """Train what is missing, measure, judge, write."""
    unknown = sorted(set(config.models) - set(MODELS))
    if unknown:
        raise SystemExit(f"there is no model {unknown[0]!r}; models: {', '.join(MODELS)}")
    train_set, test_set = (vistok.open_dataset(config.data, image_size=SIZE, split=split) for split in ("train", "test"))
    prober = Prober(train_set, test_set, captions=config.captions)
    results: dict[str, dict[str, dict]] = {}
    todo = [(seed, name) for seed in config.seeds for name in config.models]
    for seed, name in tqdm(todo, desc="models", unit="model"):
        results.setdefault(name, {})[str(seed)] = result_of(name, seed, config, train_set, test_set, prober)
    sizes = {name: next(iter(rows.values()))["parameters"] for name, rows in results.items()}
    if max(sizes.values()) > TOLERANCE * min(sizes.values()):
        raise SystemExit(f"these models are not of one size within {TOLERANCE - 1:.0%}: {sizes}")
    claims = verdicts(results)
    about = {
        "command": command_line("eval.claims.tokenizers"),
        "data": config.data,
        "training_images": len(train_set),
        "test_images": len(test_set),
        "minutes": config.minutes,
        "seeds": list(config.seeds),
        "gpt_seconds": config.gpt_seconds,
        "captions": prober.encoder.name if prober.has_captions else "none",
        "chance": prober.chance(),
        "machine": machine(config.device),
        "versions": versions(),
    }
    text = markdown(results, claims, about)
    print(text)
    (config.out / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(config.out / "results.json", {"about": about, "results": results, "claims": claims})


def result_of(name: str, seed: int, config: Config, train_set, test_set, prober: Prober) -> dict:
    """The numbers of one model and seed; trained and measured unless they are there."""
    folder = config.out / f"seed{seed}" / name
    wanted = {"minutes": config.minutes, "batch_size": config.batch_size, "data": config.data, "captions": config.captions}
    wanted["gpt_seconds"] = config.gpt_seconds
    if (folder / "result.json").is_file():
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if found["asked"] != wanted:
            raise SystemExit(f"{folder} was made with {found['asked']}, now {wanted} is asked: use another --out")
        return found
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted training of this model: equal time cannot be put together from parts
    entry, clock = MODELS[name], _clock(config.device)
    started = clock()
    vae = _train_vae(folder / "vae", seed, config, train_set) if entry.needs_vae else None
    share = 1 - VAE_SHARE if entry.needs_vae else 1.0
    task, steps = _train(entry, vae, folder / "run", seed, share * 60 * config.minutes, config, train_set)
    trained = clock() - started
    model = vistok.load(folder / "run").to(config.device)
    counts = tuple(count for count in FIXED_COUNTS if count <= model.max_tokens) if entry.order == "dynamic" else ()
    options = dict(num_tokens=entry.num_tokens, counts=counts, gpt_seconds=config.gpt_seconds, seed=seed, clock=clock)
    found = measure(model, train_set, test_set, prober, **options)
    if name == "seed" and any(test_set.captions):
        found["text_space"] = seed_text_retrieval(task, test_set)
    found |= {"asked": wanted, "order": entry.order, "steps": steps, "seconds": trained}
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    write_json(folder / "result.json", found)
    return found


def _train_vae(out: Path, seed: int, config: Config, dataset):
    """FlexTok's VAE, trained from nothing on its share of the time."""
    entry = Entry("", lambda max_steps, vae: vae_task(), learning_rate=1.5e-3)
    _train(entry, None, out, seed, VAE_SHARE * 60 * config.minutes, config, dataset)
    return vistok.load(out)


def _train(entry: Entry, vae, out: Path, seed: int, seconds: float, config: Config, dataset):
    """Train for so many seconds; returns the task and the steps it took."""
    clock = _clock(config.device)
    options = TrainConfig(
        out=out, data=config.data, image_size=SIZE, batch_size=config.batch_size, learning_rate=entry.learning_rate, betas=(0.9, 0.95),
        weight_decay=0.02, warmup_steps=20, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, flip=False,
        shift=4, seed=seed, preview_every=0, log_every=20, save_every=10**6, max_steps=NOMINAL_STEPS,
    )  # fmt: skip
    started = clock()
    per_step = _seconds_a_step(entry, vae, replace(options, out=out.with_name(f"{out.name}-timing"), progress=False), dataset, clock)
    spent = (clock() - started) / 2  # starting (cached latents, captions) is paid once more below
    steps = max(MIN_STEPS, int((seconds - spent) / per_step))
    task = seeded_build(lambda: entry.build(steps, vae), seed)
    train(task, dataset, replace(options, max_steps=steps, warmup_steps=min(50, steps // 10)))
    return task, steps


def _seconds_a_step(entry: Entry, vae, options: TrainConfig, dataset, clock) -> float:
    """Time of a step, mean over both stages by their shares, from a few steps of a copy that is thrown away."""
    task = seeded_build(lambda: entry.build(NOMINAL_STEPS, vae), 0)
    run = TrainingRun(task, dataset, options, False, None)
    batches = iter(task.make_loader(options, 0, 0, 1))
    total = 0.0
    for first, share in ((0, entry.stage), (int(entry.stage * NOMINAL_STEPS), 1 - entry.stage)):
        if not share:
            continue
        for step in range(first, first + PROBE_STEPS + 1):
            if step == first + 1:  # the first step also calibrates, starts codebooks, allocates
                started = clock()
            run.step = step
            run.train_step(batches)
        total += share * (clock() - started) / PROBE_STEPS
    run.close()
    shutil.rmtree(options.out, ignore_errors=True)
    return total


def _clock(device: str):
    return time.process_time if torch.device(device).type == "cpu" else time.perf_counter


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
