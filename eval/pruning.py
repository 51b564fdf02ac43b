"""What token reduction does to a model: accuracy, agreement and divergence from the unpruned one, multiply-adds, time, cache.

    python -m eval.pruning --model vistok/emoji-vit                                     all methods at four budgets, 3 minutes on a CPU core
    python -m eval.pruning --model vistok/emoji-vlm --methods divprune fastv            questions about rendered scenes, for each kind
    python -m eval.pruning --model RUN --data PHOTOS --budgets 0.7 0.5 --out results.json  a classifier of `vistok train classifier`

A vision transformer is measured at shares of its multiply-adds, a vision-language model at shares of its visual tokens. Two baselines are
always in the table: random tokens, and a smaller picture. `kl` is KL(unpruned || pruned) in nats, of the class or of the first word of the
answer; `agreement` the share of images or questions with the unpruned model's answer. Times are CPU seconds of one image or answer on a
CPU; a model this small is dominated by the number of operations, so read multiply-adds for what a large model would save.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import vistok
from eval.pruning_measure import (
    INSIDE,
    Asked,
    Measurement,
    matched,
    run_lower_resolution,
    run_small_picture,
    run_vit,
    run_vlm,
    scene_questions,
)  # fmt: skip
from vistok.metrics import command_line
from vistok.metrics.protocol import machine, versions

VIT_METHODS = ("tome", "pitome", "zero_tprune", "cls", "uniform")
VLM_METHODS = ("divprune", "cdpruner", "dart", "cls", "visionzip", "prumerge+", "hiprune", "fastv", "pyramiddrop", "sparsevlm", "uniform")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure token reduction."""

    model: str = "vistok/emoji-vit"
    """A classifier of timm or a LLaVA of transformers: bundled name, run folder, model folder or hub id."""
    methods: tuple[str, ...] = ()
    """Methods besides the baselines; none: all that fit the model."""
    budgets: tuple[float, ...] = ()
    """Shares of the multiply-adds (classifier) or of the visual tokens (language model); none: four of them."""
    data: str = "scenes"
    """For a classifier: a folder with a folder a class, whose classes are the model's, or the rendered scenes; the test split."""
    num_images: int = 500
    """Images or questions."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the random baseline; its row is their mean."""
    out: Path | None = None
    """JSON file for the numbers."""


def main(config: Config) -> dict[str, dict]:
    """Measure, print the table, store it; returns the rows by "method @ budget"."""
    torch.set_grad_enabled(False)
    model = vistok.load(config.model)
    rows = _language(model, config) if hasattr(model, "processor") else _vision(model, config)
    print(f"\n{machine()}  {command_line('eval.pruning')}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": config.model,
            "command": command_line("eval.pruning"),
            "machine": machine(),
            "versions": versions(),
            "rows": rows,
        }
        config.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


def _vision(model, config: Config) -> dict[str, dict]:
    images, labels = open_classified(config.data, model, config.num_images)
    full, logits = run_vit(model, images, labels, None, None)
    rows = {}
    _show(rows, "unpruned", 1.0, [full])
    for budget in config.budgets or (0.7, 0.5, 0.4, 0.35):
        for method in config.methods or VIT_METHODS:
            if method != "cls" or model.num_prefix_tokens:
                _show(rows, method, budget, [run_vit(model, images, labels, logits, matched(model, method, budget))[0]])
        drawn = [run_vit(model, images, labels, logits, matched(model, "random", budget, seed=seed))[0] for seed in config.seeds]
        _show(rows, "random", budget, drawn)
        _show(rows, "smaller picture", budget, [run_lower_resolution(model, images, labels, logits, budget)])
    return rows


def _language(model, config: Config) -> dict[str, dict]:
    asked = scene_questions(model, config.num_images)
    full, reference = run_vlm(model, asked, None, None)
    rows = {}
    _show(rows, "unpruned", 1.0, [full], asked)
    blank, _ = run_vlm(model, asked.without_pictures(), reference, None)
    _show(rows, "no picture", 0.0, [blank], asked)
    for budget in config.budgets or (0.5, 0.33, 0.22, 0.11):
        for method in config.methods or VLM_METHODS:
            options = INSIDE[method](budget) if method in INSIDE else {"keep_ratio": budget}
            _show(rows, method, budget, [run_vlm(model, asked, reference, method, **options)[0]], asked)
        for name, options in (("random", {}), ("random inside", {"layer": 2})):
            drawn = [run_vlm(model, asked, reference, "random", seed=seed, keep_ratio=budget, **options)[0] for seed in config.seeds]
            _show(rows, name, budget, drawn, asked)
        _show(rows, "smaller picture", budget, [run_small_picture(model, asked, reference, budget)], asked)
    return rows


def open_classified(data: str, model, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, H, W] in [-1, 1] of the test split and their labels [n]. Raises ValueError: the classes are not the model's."""
    from vistok.data import open_dataset
    from vistok.image import from_uint8

    dataset = open_dataset(data, image_size=tuple(model.patch_embed.img_size), split="test")
    names = getattr(model, "label_names", None)
    if names and list(names) != list(dataset.classes):
        raise ValueError(f"the classes of {data} ({', '.join(dataset.classes[:5])} ...) are not the model's ({', '.join(names[:5])} ...)")
    chosen = torch.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).long().tolist()
    return from_uint8(torch.stack([dataset.read(i) for i in chosen])), torch.tensor([dataset.labels[i] for i in chosen])


def _show(rows: dict[str, dict], method: str, budget: float, found: list[Measurement], asked: Asked | None = None) -> None:
    parts = [measurement.row() for measurement in found]
    row = {key: None if parts[0][key] is None else sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    if asked is not None:
        right = torch.stack([measurement.right.float() for measurement in found]).mean(dim=0)
        row["kinds"] = {kind: float(right[[k == kind for k in asked.kinds]].mean()) for kind in sorted(set(asked.kinds))}
    rows[f"{method} @ {budget:g}"] = row
    if len(rows) == 1:
        print(
            f"{'method':17}{'budget':>7}{'accuracy':>10}{'agrees':>8}{'kl':>9}{'macs':>7}{'ms':>8}{'tokens':>8}"
            + f"{'cache KB':>9}{'prefill':>9}{'a word':>8}" * (asked is not None)
        )
    cache = "" if row["cache_bytes"] is None else f"{row['cache_bytes'] / 1024:8.1f}"
    phases = "" if row["prefill_ms"] is None else f"{row['prefill_ms']:9.2f}{row['step_ms'] or 0:8.2f}  "
    kinds = ", ".join(f"{kind} {100 * value:.0f}" for kind, value in row.get("kinds", {}).items())
    print(
        f"{method:17}{budget:>7g}{100 * row['accuracy']:>9.1f}%{100 * row['agreement']:>7.1f}%{row['kl']:>9.4f}{row['macs_ratio']:>7.2f}"
        f"{row['ms']:>8.2f}{row['tokens']:>8.1f}{cache}{phases}{kinds}",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)))
