"""Token reduction on the bundled test subjects: accuracy against multiply-adds of every method, and which published orderings hold.

    python -m eval.claims.pruning --out runs/claims-pruning                       both subjects: about 3 minutes on a CPU core
    python -m eval.claims.pruning --out runs/claims-pruning --num-images 100      a minute; wide intervals

Every setting sees the same held-out images (or questions), so two settings are compared image by image: the interval of a difference is
that of the paired differences, which is much narrower than the intervals of both. Random baselines are means over --seeds. A setting that
is in OUT/measurements.json is not measured again, so the same command goes on after an interruption. Results: OUT/table.md,
OUT/measurements.json, OUT/curves.png.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

import vistok
from eval.claims.pruning_report import draw_curves, learned_baselines, markdown
from eval.pruning import open_classified
from eval.pruning_measure import (
    INSIDE,
    Asked,
    Measurement,
    every_second,
    matched,
    run_lower_resolution,
    run_small_picture,
    run_vit,
    run_vlm,
    scene_questions,
    stage_shares,
)  # fmt: skip
from vistok.metrics import command_line
from vistok.metrics.protocol import machine
from vistok.pruning.learned_vit import GatedTokens
from vistok.pruning.strategies import create_strategy

VIT_BUDGETS = (0.5, 0.4, 0.35, 0.25)
VLM_BUDGETS = (0.5, 0.25, 0.12)
# name: (method, options)
VIT_SETTINGS = {
    "ToMe": ("tome", {}),
    "ToMe, no proportional attention": ("tome", {"is_proportional": False}),
    "ToMe, metric input": ("tome", {"metric": "input"}),
    "PiToMe": ("pitome", {}),
    "PiToMe, no proportional attention": ("pitome", {"is_proportional": False}),
    "PiToMe as coded": ("pitome", {"rule": "deit", "margin": 0.75, "is_proportional": False}),
    "PiToMe as coded + proportional": ("pitome", {"rule": "deit", "margin": 0.75}),
    "Zero-TPrune": ("zero_tprune", {}),
    "Zero-TPrune without S": ("zero_tprune", {"num_similar": 0}),
    "Zero-TPrune without VHF": ("zero_tprune", {"variance": None}),
    "Zero-TPrune, uniform start": ("zero_tprune", {"is_uniform": True}),
    "Zero-TPrune, page rank alone": ("zero_tprune", {"num_similar": 0, "variance": None, "is_uniform": True}),
    "class-token attention": ("cls", {}),
    "uniform": ("uniform", {}),
}
VLM_BEFORE = {
    "DivPrune": "divprune", "CDPruner": "cdpruner", "DART (embeddings)": "dart", "class-token attention": "cls", "VisionZip": "visionzip",
    "PruMerge+": "prumerge+", "HiPrune": "hiprune", "FlowCut": "flowcut", "uniform": "uniform",
}  # fmt: skip
VLM_INSIDE = {
    "FastV": ("fastv", INSIDE["fastv"]),
    "SparseVLM": ("sparsevlm", INSIDE["sparsevlm"]),
    "SparseVLM+": ("sparsevlm+", INSIDE["sparsevlm+"]),
    "DART": ("dart", INSIDE["fastv"]),
    "uniform": ("uniform", INSIDE["fastv"]),
    "PyramidDrop": ("pyramiddrop", INSIDE["pyramiddrop"]),
    "uniform in stages": ("uniform", INSIDE["pyramiddrop"]),
}


GATE_SHARES = (0.5, 0.25)
GATE_BASELINES = {"uniform": "uniform", "class-token attention": "cls", "ToMe": "tome"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare methods of token reduction on the bundled subjects."""

    out: Path
    """Folder for the results; what is measured there is used again."""
    num_images: int = 400
    """Held-out images, and as many questions."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the random baselines."""
    vit: str = "vistok/emoji-vit"
    """The classifier."""
    vlm: str = "vistok/emoji-vlm"
    """The vision-language model; "" leaves that part out."""
    learned: tuple[str, ...] = ("vistok/emoji-vlm-atp",)
    """Pruners of `vistok train pruner --target VLM`: bundled names or run folders; each is compared in its own stages."""
    gate: str = ""
    """A run of `vistok train pruner --recipe vit-gate-emoji`, compared with methods that leave as many patches in the same layers."""


class Store:
    """Measurements by key in a JSON file, written after each."""

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, about
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        before = stored.get("about", {})
        if any(before.get(name, value) not in (value, "") for name, value in about.items()):
            raise ValueError(f"{path} was measured with {before}, not with {about}: choose another --out")
        self.rows: dict[str, dict] = stored.get("rows", {})

    def measure(self, key: str, run: Callable[[], Measurement]) -> None:
        """Run unless the key is there."""
        if key in self.rows:
            return
        found = run()
        self.rows[key] = found.row() | {
            "right": found.right.int().tolist(), "divergence": [round(value, 6) for value in found.divergence.tolist()],
        }  # fmt: skip
        self._write()

    def note(self, key: str, **facts) -> None:
        """Add facts to a measured row."""
        self.rows[key] |= facts
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"about": self.about, "rows": self.rows}) + "\n", encoding="utf-8")


def main(config: Config) -> str:
    """Measure what is missing, judge, write table and picture; returns the table."""
    torch.set_grad_enabled(False)
    start = time.time()
    store = Store(config.out / "measurements.json", {"num_images": config.num_images, "vit": config.vit, "vlm": config.vlm})
    measure_vit(store, config)
    if config.vlm:
        measure_vlm(store, config)
    about = {
        "machine": machine(), "command": command_line("eval.claims.pruning"), "num_images": config.num_images, "seeds": list(config.seeds),
        "minutes": (time.time() - start) / 60,
    }  # fmt: skip
    text = markdown(store.rows, about)
    (config.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw_curves(store.rows, config.out / "curves.png")
    print(text)
    return text


def measure_vit(store: Store, config: Config) -> None:
    """Every setting at every budget, the random baseline and the smaller picture."""
    model = vistok.load(config.vit)
    images, labels = open_classified("scenes", model, config.num_images)
    full, logits = run_vit(model, images, labels, None, None)
    store.measure("vit/unpruned/1", lambda: full)
    jobs = []
    for budget in VIT_BUDGETS:
        settings = {**VIT_SETTINGS, **{f"random {seed}": ("random", {"seed": seed}) for seed in config.seeds}}
        for name, (method, options) in settings.items():
            try:
                strategy = matched(model, method, budget, **options)
            except ValueError as error:  # Zero-TPrune prunes in five layers only
                logging.info("left out: %s", error)
                continue
            jobs.append((f"vit/{name}/{budget}", lambda strategy=strategy: run_vit(model, images, labels, logits, strategy)[0]))
        jobs.append((f"vit/smaller picture/{budget}", lambda budget=budget: run_lower_resolution(model, images, labels, logits, budget)))
    if config.gate:
        gate = vistok.load(config.gate)
        for share in GATE_SHARES:
            gated = GatedTokens(gate=gate, keep_ratio=share)
            counts = list(gated.counts(len(model.blocks), model.patch_embed.num_patches))
            settings = {"delete gate": gated} | {name: create_strategy(method, r=counts) for name, method in GATE_BASELINES.items()}
            settings |= {f"random {seed}": create_strategy("random", r=counts, seed=seed) for seed in config.seeds}
            for name, strategy in settings.items():
                jobs.append((f"vit-gate/{name}/{share}", lambda strategy=strategy: run_vit(model, images, labels, logits, strategy)[0]))
    for key, job in tqdm(jobs, desc="classifier", disable=None):
        store.measure(key, job)


def measure_vlm(store: Store, config: Config) -> None:
    """Methods before and inside the language model, their baselines, and what is left when every visual token goes at layer k."""
    model = vistok.load(config.vlm)
    asked = scene_questions(model, config.num_images)
    full, reference = run_vlm(model, asked, None, None)
    store.measure("vlm/unpruned/1", lambda: full)
    store.measure("vlm/no picture/0", lambda: run_vlm(model, asked.without_pictures(), reference, None)[0])

    def job(method: str, **options) -> Callable[[], Measurement]:
        return lambda: run_vlm(model, asked, reference, method, **options)[0]

    depth = model.config.text_config.num_hidden_layers
    jobs = [(f"vlm-probe/layer {layer}/0", job("uniform", layer=layer, keep=0)) for layer in range(1, depth)]
    for budget in VLM_BUDGETS:
        jobs += [(f"vlm/{name}/{budget}", job(method, keep_ratio=budget)) for name, method in VLM_BEFORE.items()]
        jobs += [(f"vlm/random {seed}/{budget}", job("random", keep_ratio=budget, seed=seed)) for seed in config.seeds]
        jobs.append((f"vlm/smaller picture/{budget}", lambda budget=budget: run_small_picture(model, asked, reference, budget)))
        jobs += [(f"vlm-inside/{name}/{budget}", job(method, **stages(budget))) for name, (method, stages) in VLM_INSIDE.items()]
        for seed in config.seeds:
            jobs.append((f"vlm-inside/random {seed}/{budget}", job("random", seed=seed, **INSIDE["fastv"](budget))))
            jobs.append((f"vlm-inside/random in stages {seed}/{budget}", job("random", seed=seed, **INSIDE["pyramiddrop"](budget))))
    for key, run in tqdm(jobs, desc="vision-language model", disable=None):
        store.measure(key, run)
    store.rows["vlm/unpruned/1"]["kinds"] = asked.kinds
    pruners = [vistok.load(name) for name in config.learned]
    kinds = [type(pruner).__name__ for pruner in pruners]
    for number, (pruner, kind) in enumerate(zip(pruners, kinds)):
        before = kinds[:number].count(kind)
        measure_learned(store, config, pruner, f"{kind} ({before + 1})" if before else kind, model, asked, reference)


def measure_learned(store: Store, config: Config, pruner, title: str, model, asked: Asked, reference) -> None:
    """A learned pruner, and what keeps as many tokens after the same stages without learning anything."""
    layers = pruner.settings.layers
    keys = [f"vlm-learned/{name}/learned" for name in (title, *learned_baselines(title, config.seeds))]
    if all(key in store.rows for key in keys):
        return
    shares = stage_shares(model, asked, pruner)
    stages = {"layers": layers, "keep_ratios": shares}
    once = {"layer": layers[0], "keep_ratio": sum(shares) / len(shares)}
    jobs = [(pruner, {}), ("pyramiddrop", stages), ("fastv", once), (every_second(model), {"layer": layers[0], "keep_ratio": 0.25})]
    jobs += [("random", {"seed": seed, **stages}) for seed in config.seeds]
    for key, (method, options) in tqdm(list(zip(keys, jobs, strict=True)), desc=title, disable=None):
        store.measure(key, lambda method=method, options=options: run_vlm(model, asked, reference, method, **options)[0])
        store.note(key, layers=list(layers), shares=list(shares))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)))
