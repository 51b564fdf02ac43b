"""Time FlexTok's folded path against the written-out one, and against any other implementation, in one run.

    python -m eval.bench.flextok --size small            # 6 blocks of width 384, 64 px; about a minute on one core
    python -m eval.bench.flextok --size d12 --threads 2  # the published d12-d12 shape, 256 px, one guided step a decode; some minutes
    python -m eval.bench.flextok --peer my_module:build  # adds another implementation

Weights are random (timing does not depend on them). Paths are timed in interleaved pairs, so that a busy machine slows both; what counts is
the ratio within a pair. "folded" runs k registers in the encoder and one register for all masked ones in the decoder; "written out" runs
all R. Both times leave the VAE out; it is timed on its own. A peer is timed on whole images, VAE included, against ours likewise.

Peer contract: `module:function` names a function (settings: FlexTokConfig, state: dict of our tensors) -> object with
    encode(images [B, 3, H, W], k: int) -> ids [B, k] int64
    decode(ids [B, k] int64, steps: int, guidance: float) -> images [B, 3, H, W]
"""

import importlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import vistok
from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
from vistok.tokenizers.vae import VAEConfig
from vistok.tokens import VisualTokens

SIZES = {
    "d12": FlexTokConfig(),
    "small": FlexTokConfig(
        image_size=(64, 64), vae=VAEConfig(image_size=(64, 64), latent_channels=16), max_grid=(4, 4), encoder_width=384, encoder_depth=6,
        decoder_width=384, decoder_depth=6,
    ),
}  # fmt: skip
REPEATS = {"small": 5, "d12": 2}
STEPS = {"small": 4, "d12": 1}


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    size: Literal["small", "d12"] = "small"
    """Shape of the model and the images."""
    keep: tuple[int, ...] = (1, 32, 256)
    """Tokens per image to encode and to decode."""
    steps: int | None = None
    """Euler steps a decode; 4 for small, 1 for d12 by default."""
    guidance_scale: float = 7.5
    """Guidance of the decodes (adaptive projected); 1 leaves the unconditional pass out."""
    batch: int = 1
    """Images a call."""
    repeats: int | None = None
    """Interleaved pairs a measurement; 5 for small, 2 for d12 by default."""
    threads: int | None = None
    """Threads PyTorch may use; its own choice by default."""
    peer: str | None = None
    """Another implementation as module:function, see the top of this file."""
    out: Path | None = None
    """Write the figures as JSON here too."""


def main(config: BenchConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = build(SIZES[config.size])
    H, W = model.settings.image_size
    images = torch.rand(config.batch, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    describe(config, model)
    rows = [*vae_rows(config, model, images), *path_rows(config, model, images)]
    if config.peer is not None:
        rows += peer_rows(config, model, images)
    print(f"\npeak memory of the process: {max(row['peak_gib'] for row in rows):.2f} GiB")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(
            json.dumps({"config": asdict(config) | {"out": str(config.out)}, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )


def build(settings: FlexTokConfig) -> FlexTok:
    """A FlexTok with random weights, none of them zero."""
    torch.manual_seed(0)
    model = FlexTok(settings).eval()
    decoder = model.decoder
    for linear in (*(block.modulation for block in decoder.blocks), decoder.head_modulation, decoder.head):
        torch.nn.init.normal_(linear.weight, std=0.02)
    return model


def describe(config: BenchConfig, model: FlexTok) -> None:
    """Say what ran where: a figure without its machine and command is no figure."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = {name: sum(p.numel() for p in getattr(model, name).parameters()) / 1e6 for name in ("encoder", "decoder", "vae")}
    print("command:   python -m eval.bench.flextok " + " ".join(sys.argv[1:]))
    print(f"machine:   {cpu}, {usable} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}")
    print(
        f"torch:     {torch.__version__}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}, float32"
    )
    print(f"model:     {config.size}, " + ", ".join(f"{name} {millions:.1f} M" for name, millions in count.items()))
    H, W = model.settings.image_size
    print(f"work:      batch {config.batch} of {H} x {W}, {steps_of(config)} Euler steps a decode, guidance {config.guidance_scale}\n")
    print(f"{'measurement':34}{'median s':>10}{'images/s':>10}{'RSS peak':>10}{'ratio':>8}{'spread':>14}")


def steps_of(config: BenchConfig) -> int:
    return STEPS[config.size] if config.steps is None else config.steps


def vae_rows(config: BenchConfig, model: FlexTok, images: torch.Tensor) -> list[dict]:
    """The VAE alone: what neither path can save."""
    latents = model.encode_latents(images)
    with torch.no_grad():
        return measure(config, "vae encode", {"vae": lambda: model.vae.encode_latents(images)}) + measure(
            config, "vae decode", {"vae": lambda: model.vae.decode_latents(latents)}
        )


@torch.no_grad()
def path_rows(config: BenchConfig, model: FlexTok, images: torch.Tensor) -> list[dict]:
    """Folded against written out, with the check that both give the same."""
    latents, rows = model.encode_latents(images), []
    ids = model.quantize(latents).ids
    kept = [k for k in config.keep if k <= model.max_tokens]
    for k in kept:
        paths = {
            "folded": lambda k=k: model.quantize(latents, num_tokens=k).ids,
            "written out": lambda k=k: model.quantize(latents).ids[:, :k],
        }
        if not all(torch.equal(path(), ids[:, :k]) for path in paths.values()):
            raise RuntimeError(f"encoding {k} tokens differs between the paths")
        rows += measure(config, f"encode {k}", paths)
    for k in kept:
        tokens = VisualTokens.from_ids(ids[:, :k], model.layout)

        def decode(folded: bool, tokens=tokens) -> torch.Tensor:
            return model.decode_to_latents(tokens, num_steps=steps_of(config), guidance_scale=config.guidance_scale, folded=folded)

        difference = float((decode(True) - decode(False)).abs().max())
        if difference > 1e-3:
            raise RuntimeError(f"decoding {k} tokens differs between the paths by {difference}")
        rows += measure(config, f"decode {k}", {"folded": lambda: decode(True), "written out": lambda: decode(False)})
    return rows


def peer_rows(config: BenchConfig, model: FlexTok, images: torch.Tensor) -> list[dict]:
    """Ours and the peer on whole images."""
    module, _, function = config.peer.partition(":")
    if not module or not function:
        raise SystemExit(f"--peer {config.peer!r} must be module:function")
    peer = getattr(importlib.import_module(module), function)(model.settings, model.state_dict())
    rows, ids = [], model.encode(images).ids
    for k in (k for k in config.keep if k <= model.max_tokens):
        agreement = float((peer.encode(images, k) == ids[:, :k]).float().mean())
        rows += measure(
            config,
            f"whole encode {k}",
            {"ours": lambda k=k: model.encode(images, num_tokens=k), "peer": lambda k=k: peer.encode(images, k)},
        )
        print(f"  ids equal to the peer's: {agreement:.1%}")
        part, options = ids[:, :k], {"num_steps": steps_of(config), "guidance_scale": config.guidance_scale}
        paths = {
            "ours": lambda part=part, options=options: model.decode(VisualTokens.from_ids(part, model.layout), **options),
            "peer": lambda part=part: peer.decode(part, steps_of(config), config.guidance_scale),
        }
        rows += measure(config, f"whole decode {k}", paths)
    return rows


def measure(config: BenchConfig, name: str, paths: dict[str, Callable[[], object]]) -> list[dict]:
    """Time paths in turn, the first of a round changing each time; the ratio is that of the second path to the first, round by round."""
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    peaks = dict.fromkeys(paths, 0.0)
    order = list(paths)
    for path in order:
        paths[path]()  # warm up
    for repeat in range(REPEATS[config.size] if config.repeats is None else config.repeats):
        for path in order if repeat % 2 == 0 else reversed(order):
            reset_peak()
            start = time.perf_counter()
            paths[path]()
            seconds[path].append(time.perf_counter() - start)
            peaks[path] = max(peaks[path], peak_gib())
    rows = []
    for i, path in enumerate(order):
        median = statistics.median(seconds[path])
        ratios = [other / first for first, other in zip(seconds[order[0]], seconds[path])]
        row = {"name": name, "path": path, "seconds": seconds[path], "images_per_second": config.batch / median, "peak_gib": peaks[path]}
        line = f"{name + ', ' + path:34}{median:>10.4f}{config.batch / median:>10.3f}{peaks[path]:>6.2f} GiB"
        if i:
            row["ratio"] = statistics.median(ratios)
            line += f"{row['ratio']:>7.2f}x{min(ratios):>8.2f}-{max(ratios):.2f}"
        print(line, flush=True)
        rows.append(row)
    return rows


def reset_peak() -> None:
    """Start counting this process's peak memory anew, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that since the start, which peak_gib still reports


def peak_gib() -> float:
    """Peak resident memory since the last reset (since the start where there is none), in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # spinning threads inflate every time on a busy machine; read when torch loads, so start anew
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, "-m", "eval.bench.flextok", *sys.argv[1:]])
    main(tyro.cli(BenchConfig, description=f"Time FlexTok's exact fast path (vistok {vistok.__version__})."))
