"""Fast decoding on a bundled generator: passes, wall clock and fidelity of drafters and rules, and what becomes of their papers' claims.

    python -m eval.claims.decoding --eagle vistok/emoji-gpt-fsq2d-eagle --out runs/claims-decoding       minutes on an idle CPU core
    python -m eval.claims.decoding --num-samples 16 --repeats 1 --out /tmp/claims                        seconds; shows that it works

Every setting makes the same images: image i has the same class and the same generator everywhere. Passes and fidelity come from large
batches. Time is of the clock on the wall, so the machine should be idle, for one image at a time, each setting beside the plain loop,
as a ratio to the plain loop of that repeat; the median over the repeats is reported. Fidelity: the Frechet distance of conv features to
samples of the plain loop with other seeds (two sets of those give the floor); to real training images; and the pixel distance to the plain
loop's image of the same seed. Of a few hundred images these distances are mostly floor: they show a large loss, not a small one.
Results: OUT/table.md, OUT/results.json, OUT/curve.png.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

import vistok
from eval.claims.decoding_report import draw_curve, markdown, verdicts
from vistok.decoding import GenerationStats, generate, generate_exits, generate_rows
from vistok.decoding.accept import make_rule
from vistok.decoding.drafters import make_drafter
from vistok.decoding.speculative import speculate
from vistok.metrics import as_saved, command_line, feature_net, features_of, frechet_between
from vistok.metrics.protocol import machine, versions
from vistok.rng import image_generators
from vistok.tokens import VisualTokens

FLOOR_SEED = 1000  # of the plain samples that all others are compared with


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare ways of decoding on one pipeline."""

    out: Path
    """Folder for the results."""
    model: str = "vistok/emoji-gpt-fsq2d"
    """A pipeline whose generator predicts one next token after another."""
    eagle: str | None = None
    """Its EAGLE head; without one the settings that need it are left out."""
    medusa: str | None = None
    """Its Medusa heads; likewise."""
    chimera: str | None = None
    """Its Chimera heads; likewise."""
    judge: str | None = None
    """Its judge; likewise."""
    data: str = "emoji"
    """Real images for the Frechet distance."""
    num_samples: int = 128
    """Images of each setting, for passes and fidelity."""
    repeats: int = 9
    """Images of each setting whose time is taken, one at a time."""
    guidance_scale: float = 1.5
    """Guidance of all settings."""
    batch_size: int = 64
    """Images at once where no time is taken."""
    device: str = "cpu"
    """Where the models run."""
    threads: int = 1
    """Threads of torch."""


@dataclass(frozen=True)
class Setting:
    """One way to decode. drafter None: `schedule`, or the plain loop. num_draft_tokens: all, or "auto" to find out how many pay."""

    name: str
    family: str
    drafter: str | None = None
    drafting: dict = field(default_factory=dict)
    rule: str = "standard"
    options: dict = field(default_factory=dict)
    schedule: Callable | None = None
    num_draft_tokens: str | None = None


def settings(config: Config, model) -> list[Setting]:
    """All settings that the given heads allow, by family."""
    window, layout, depth = {"length": 6}, model.layout, len(model.blocks)
    found = [Setting("plain", "plain"), Setting("chosen by itself", "exact", "jacobi", window, num_draft_tokens="auto")]
    found += [Setting("copies", "exact", "copy", {"length": 3})]
    eagle = {"head": config.eagle, "length": 3}
    if config.eagle:
        best = {**eagle, "shape": "best", "width": 2, "length": 3, "num_tokens": 6}
        found += [
            Setting("EAGLE", "exact", "eagle", eagle),
            Setting("EAGLE-2 tree", "exact", "eagle", best),
            Setting("EAGLE, chain or tree", "exact", "eagle", {**eagle, "length": 4, "shape": "auto"}, num_draft_tokens="auto"),
            *(Setting(f"EAGLE, LANTERN delta {d}", "lantern", "eagle", eagle, "lantern", {"k": 100, "delta": d}) for d in (0.05, 0.2)),
            *(
                Setting(f"EAGLE, LANTERN++ lambda {m}", "lantern++", "eagle", eagle, "lantern++", {"k": 100, "multiple": m})
                for m in (2.0, 4.0)
            ),
            *(Setting(f"EAGLE, budget {e}", "budget", "eagle", eagle, "lantern_budget", {"eps": e}) for e in (0.1, 0.3)),
        ]
    if config.medusa:
        medusa = {"head": config.medusa, "length": 3}
        found += [
            Setting("Medusa", "exact", "medusa", medusa),
            Setting("Medusa, typical", "typical", "medusa", medusa, "typical"),
            *(Setting(f"Medusa, budget {e}", "budget", "medusa", medusa, "lantern_budget", {"eps": e}) for e in (0.2, 0.4)),
        ]
    if config.chimera:
        found += [Setting("Chimera", "exact", "chimera", {"head": config.chimera, "length": 3})]
    if config.judge:
        found += [Setting("SJD, judge", "judge", "jacobi", window, "judge", {"head": config.judge})]
    found += [
        Setting("SJD", "exact", "jacobi", window),
        *(Setting(f"SJD, GSD window {w}", "gsd", "jacobi", window, "gsd", {"window": w, "reach": 10.0}) for w in (3, 7)),
        *(Setting(f"SJD, LANTERN delta {d}", "lantern", "jacobi", window, "lantern", {"k": 100, "delta": d}) for d in (0.05, 0.2)),
        *(Setting(f"SJD, LANTERN++ lambda {m}", "lantern++", "jacobi", window, "lantern++", {"k": 100, "multiple": m}) for m in (2.0, 4.0)),
        *(Setting(f"SJD, budget {e}", "budget", "jacobi", window, "lantern_budget", {"eps": e}) for e in (0.1, 0.2, 0.4)),
        *(Setting(f"SJD, mixture {e}", "budget", "jacobi", window, "mixture", {"eps": e}) for e in (0.2, 0.4)),
    ]
    if layout.kind == "grid":
        windows = sorted({max(layout.shape[1] // part, 1) for part in (4, 2)})
        found += [Setting(f"ZipAR window {w}", "zipar", schedule=partial(generate_rows, window=w)) for w in windows]
        adapts = partial(generate_rows, window_adapts=True)
        found += [Setting(f"ZipAR window {w} or more", "zipar", schedule=partial(adapts, window=w)) for w in windows]
    least = max(depth // 2, 1)
    return [*found, Setting(f"exits down to {1 + least} of {depth} layers", "exits", schedule=partial(generate_exits, least=least))]


class Runner:
    """Makes images under a setting; drafters and rules are made once."""

    def __init__(self, pipe, config: Config):
        self.pipe, self.config, self.made = pipe, config, {}

    def __call__(self, setting: Setting, numbers: list[int], seed: int = 0) -> tuple[VisualTokens, GenerationStats]:
        """Tokens of the images of these numbers."""
        model, classes = self.pipe.generator, max(len(self.pipe.classes), 1)
        condition = model.make_condition(len(numbers), labels=[n % classes for n in numbers] if self.pipe.classes else None)
        common = dict(generators=image_generators(seed, numbers, self.config.device), guidance_scale=self.config.guidance_scale)
        if setting.schedule is not None:
            return setting.schedule(model, condition, **common)
        if setting.drafter is None:
            return generate(model, condition, **common)
        if setting.name not in self.made:
            drafter = make_drafter(setting.drafter, model, **setting.drafting)
            self.made[setting.name] = drafter, make_rule(setting.rule, tokenizer=self.pipe.tokenizer, target=model, **setting.options)
        drafter, rule = self.made[setting.name]
        return speculate(
            model, condition, drafter=drafter, rule=rule, num_draft_tokens=setting.num_draft_tokens or drafter.num_nodes, **common
        )


def in_batches(run: Runner, setting: Setting, config: Config, seed: int = 0) -> tuple[torch.Tensor, GenerationStats]:
    """Images [n, 3, H, W] as they would be saved, and what they cost."""
    images, total = [], None
    for start in range(0, config.num_samples, config.batch_size):
        numbers = list(range(start, min(start + config.batch_size, config.num_samples)))
        tokens, stats = run(setting, numbers, seed)
        with torch.inference_mode():
            images.append(
                as_saved(run.pipe.tokenizer.decode(tokens, generators=image_generators(seed, numbers, config.device)).float().cpu())
            )
        total = stats if total is None else total + stats
    return torch.cat(images), total


def measure(config: Config) -> dict:
    """All numbers, as plain data."""
    torch.set_num_threads(config.threads)
    pipe = vistok.load(config.model).to(config.device)
    run, net = Runner(pipe, config), feature_net("conv")
    asked = settings(config, pipe.generator)
    real = vistok.open_dataset(config.data, image_size=pipe.tokenizer.settings.image_size, split="train")
    features = {"real": features_of(net, torch.stack([real.read(i) for i in range(0, len(real), 3)]).float() / 127.5 - 1)}
    plain, *_ = in_batches(run, asked[0], config, FLOOR_SEED)
    features["plain"] = features_of(net, plain)
    rows, same = {}, None
    for setting in asked:
        images, stats = in_batches(run, setting, config)
        same = images if same is None else same
        found = features_of(net, images)
        drafted = getattr(stats, "image_passes", 0)  # an image's own, without the pass that reads the condition
        passes = (
            drafted + stats.num_images if drafted else stats.target_passes / -(-config.num_samples // config.batch_size) * stats.num_images
        )
        spent = getattr(stats, "total_variation_spent", None if setting.schedule else 0.0)
        rows[setting.name] = {
            "family": setting.family,
            "passes_per_image": passes / stats.num_images,
            "tokens_per_pass": stats.num_tokens / passes,
            "acceptance": list(getattr(stats, "acceptance_by_depth", ())),
            "spent_per_token": None if spent is None else spent / stats.num_tokens,
            "frechet_plain": frechet_between(found, features["plain"]),
            "frechet_real": frechet_between(found, features["real"]),
            "pixel_distance": float((images - same).square().flatten(1).mean(1).sqrt().mean()),
            "options": {**setting.drafting, "rule": setting.rule, **setting.options} if setting.drafter else {},
        }
        row = rows[setting.name]
        print(f"{setting.name:32s} {row['tokens_per_pass']:5.2f} tokens a pass, Frechet {row['frechet_plain']:.3f}", flush=True)
    for name, timed in speed(run, asked, config).items():
        rows[name] |= timed
    another, _ = in_batches(run, asked[0], config, 2 * FLOOR_SEED)
    about = {
        "model": config.model,
        "num_samples": config.num_samples,
        "repeats": config.repeats,
        "guidance_scale": config.guidance_scale,
        "floor": frechet_between(features_of(net, another), features["plain"]),
        "pixel_floor": float((another - same).square().flatten(1).mean(1).sqrt().mean()),
        "machine": machine(config.device),
        "versions": versions(),
        "command": command_line("eval.claims.decoding"),
    }
    return {"about": about, "rows": rows}


def speed(run: Runner, asked: list[Setting], config: Config) -> dict[str, dict]:
    """Seconds of one image at a time, and ratios to the plain loop (the first setting), which runs beside each of them, in turn first.

    The first repeats only warm up: what `num_draft_tokens="auto"` has found of drafting is then remembered, as in any longer use.
    """

    def timed(setting: Setting, image: int) -> float:
        began = time.perf_counter()
        run(setting, [image])
        return time.perf_counter() - began

    found = {}
    for setting in asked:
        pairs = []
        for repeat in range(-2, config.repeats):
            both = [(asked[0], max(repeat, 0)), (setting, max(repeat, 0))]
            own = [timed(*one) for one in (both if repeat % 2 else both[::-1])]
            pairs.append(own if repeat % 2 else own[::-1])
        ratios = [plain / seconds for plain, seconds in pairs[2:]]
        found[setting.name] = {"seconds": median(seconds for _, seconds in pairs[2:]), "speedups": ratios, "speedup": median(ratios)}
    return found


def main(config: Config) -> None:
    """Measure, judge, write."""
    results = measure(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results["verdicts"] = [asdict(verdict) for verdict in verdicts(results["rows"], results["about"])]
    (config.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (config.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw_curve(results, config.out / "curve.png")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
