"""Speed of token reduction in a vision transformer against the same model unpruned, timm with fused attention, in interleaved pairs.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python -m eval.bench.pruning --threads 2           two minutes on two idle cores
    python -m eval.bench.pruning --methods tome --cpu-time                                      on a busy machine: CPU seconds, one thread

DeiT-S at 224 with fresh weights (speed does not depend on them), the published budgets: ToMe r = 13, PiToMe keeping 0.908 a layer,
Zero-TPrune's defaults. A pair is one unpruned and one pruned forward, in turn first; the speed-up is the median of the pairs' ratios, with
the quartiles beside it. "bound" is the ratio of multiply-adds. "planning" and "folding" are the shares of the pruned
forward's processor time spent on choosing and on making the shorter sequence, readable on a busy machine too.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import tyro

import vistok
from vistok.metrics.protocol import machine

SETTINGS = {
    "tome": {"r": 13},
    "pitome": {"layer_keep_ratio": 0.908},
    "zero_tprune": {},
    "random": {"r": 13},
    "cls": {"r": 13},
}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    model: str = "deit_small_patch16_224"
    """A vision transformer of timm."""
    methods: tuple[str, ...] = ("tome", "pitome", "zero_tprune")
    """Of tome, pitome, zero_tprune, random and cls."""
    batch_size: int = 8
    """Images a forward."""
    pairs: int = 12
    """Timed pairs after two that are not."""
    threads: int | None = None
    """Threads PyTorch may use; its own choice by default."""
    cpu_time: bool = False
    """CPU seconds of the process in place of wall clock."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """Write the figures as JSON here too."""


def main(config: BenchConfig) -> None:
    unknown = set(config.methods) - set(SETTINGS)
    if unknown:
        raise SystemExit(f"--methods {' '.join(sorted(unknown))}: a method is one of {', '.join(SETTINGS)}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    print("command:   python -m eval.bench.pruning " + " ".join(sys.argv[1:]))
    where = ", ".join(f"{key} {value}" for key, value in machine(config.device).items())
    print(f"machine:   {where}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, timm {timm.__version__}")
    clock = "CPU" if config.cpu_time else "wall"
    print(f"work:      {config.model}, batch {config.batch_size}, float32, {clock} seconds, {config.pairs} pairs\n")
    print(f"{'method':14}{'unpruned':>10}{'pruned':>9}{'speed-up':>10}{'quartiles':>14}{'bound':>8}{'planning':>10}{'folding':>9}")
    torch.manual_seed(0)
    model = timm.create_model(config.model).eval().to(config.device)
    size = model.patch_embed.img_size
    images = torch.randn(config.batch_size, 3, *size, device=config.device)
    rows = []
    for method in config.methods:
        row = measure(model, images, method, config)
        rows.append(row)
        print(
            f"{method:14}{row['unpruned']:>9.3f}s{row['pruned']:>8.3f}s{row['speedup']:>9.2f}x"
            f"{row['low']:>8.2f}-{row['high']:.2f}{row['bound']:>8.2f}{row['planning']:>10.1%}{row['folding']:>9.1%}",
            flush=True,
        )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"config": asdict(config) | {"out": str(config.out)}, "machine": machine(config.device), "rows": rows}
        config.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(model, images: torch.Tensor, method: str, config: BenchConfig) -> dict:
    """One row: medians of both sides, of their ratios and of the shares of planning and folding."""
    clock = time.process_time if config.cpu_time else time.perf_counter

    def unpruned() -> float:
        start = clock()
        model(images)
        _wait(config.device)
        return clock() - start

    def pruned() -> float:
        with vistok.prune(model, method, timed=True, **SETTINGS[method]) as handle:
            start = clock()
            model(images)
            _wait(config.device)
            seconds = clock() - start
            stats.append(handle.stats())
        return seconds

    stats, times = [], []
    for number in range(config.pairs + 2):
        if number % 2:
            after = pruned()
            times.append((unpruned(), after))
        else:
            before = unpruned()
            times.append((before, pruned()))
    times, stats = times[2:], stats[2:]
    ratios = sorted(before / after for before, after in times)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "method": method, "unpruned": statistics.median(before for before, _ in times), "pruned": statistics.median(t for _, t in times),
        "speedup": statistics.median(ratios), "low": low, "high": high, "bound": 1 / stats[0].macs_ratio,
        "planning": statistics.median(report.planning_share for report in stats),
        "folding": statistics.median(report.folding_share for report in stats),
    }  # fmt: skip


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)))
