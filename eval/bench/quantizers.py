"""Time and memory of our quantizers beside plain chunked torch, vector-quantize-pytorch and any other, in one run.

    python -m eval.bench.quantizers                                # 4,096 vectors of width 32, 8,192 codes: some minutes on one core
    python -m eval.bench.quantizers --vectors 16384 --codes 32768  # the size of the published tokenizers; the peer takes over 8 GB
    python -m eval.bench.quantizers --peer my_module:build         # adds another implementation

"plain" is the least that a lookup costs: `addmm` and `argmax` over blocks of 512 vectors, then a gather. The peak of memory is that above
what the process held before the call. Times are the process's CPU seconds (on an accelerator wall seconds, synchronised), the median of
the repeats after a warm-up, the implementations taking turns; what counts is the ratio within a run.

    eval            ids and codes, no gradients
    train ema       forward with moving-average codebook, backward to the vectors
    train gradient  forward with learned codebook, backward to vectors and codes ("plain": the two losses by hand)
    train entropy   the same with the entropy term

Peer contract: `module:function` names a function (codebook [K, d], mode: str) -> callable(vectors [N, d]) -> (codes [N, d], ids [N], loss),
or None for a mode it does not have. Its ids are compared with ours.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import vistok
from eval.bench.flextok import peak_gib, reset_peak
from vistok.quantizers import VQ, VQConfig

MODES = ("eval", "train ema", "train gradient", "train entropy")
PLAIN_ROWS = 512
Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    vectors: int = 4096
    """N."""
    codes: int = 8192
    """K."""
    dim: int = 32
    """d."""
    modes: tuple[str, ...] = MODES
    """Which of the modes above."""
    repeats: int = 3
    """Timed calls after one that is not."""
    device: str = "cpu"
    """Device to run on."""
    threads: int | None = None
    """Threads PyTorch may use; its own choice by default."""
    skip_peers: bool = False
    """Leave vector-quantize-pytorch out: at 16,384 vectors and 32,768 codes it needs 8 GB and minutes."""
    peer: str | None = None
    """Another implementation as module:function, see the top of this file."""
    out: Path | None = None
    """Write the figures as JSON here too."""


def main(config: BenchConfig) -> None:
    unknown = set(config.modes) - set(MODES)
    if unknown:
        raise SystemExit(f"--modes {' '.join(sorted(unknown))}: a mode is one of {', '.join(map(repr, MODES))}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    describe(config)
    rows = []
    for mode in config.modes:
        results = measure(config, mode)
        plain = next((row["seconds"] for row in results if row["name"] == "plain"), None)
        for row in results:
            row["ratio"] = row["seconds"] / plain if plain else None
            ratio = "" if plain is None else f"{row['ratio']:>9.2f}x"
            print(
                f"{mode:16}{row['name']:28}{row['seconds']:>10.4f}{row['peak_mb']:>10.0f} MB{ratio:>10}{row['same_ids']:>11.2%}", flush=True
            )
        rows += results
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(
            json.dumps({"config": asdict(config) | {"out": str(config.out)}, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )


def describe(config: BenchConfig) -> None:
    """Say what ran where."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    where = cpu if config.device == "cpu" else torch.cuda.get_device_name(config.device)
    print("command:   python -m eval.bench.quantizers " + " ".join(sys.argv[1:]))
    print(f"machine:   {where}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"work:      {config.vectors} vectors of width {config.dim}, {config.codes} codes, float32\n")
    print(f"{'mode':16}{'implementation':28}{'seconds':>10}{'peak':>13}{'ratio':>10}{'same ids':>11}")


def implementations(config: BenchConfig) -> list[str]:
    names = ["plain", "vistok"]
    if not config.skip_peers:
        if importlib.util.find_spec("vector_quantize_pytorch") is None:
            raise SystemExit("vector-quantize-pytorch is not installed: pip install vistok[dev], or leave it out with --skip-peers")
        names.append("vector-quantize-pytorch")
    return [*names, config.peer] if config.peer else names


def measure(config: BenchConfig, mode: str) -> list[dict]:
    """One row an implementation that has the mode."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(config.codes, config.dim, generator=generator).to(config.device)
    vectors = torch.randn(config.vectors, config.dim, generator=generator).to(config.device)
    expected = ours(codebook, "eval")(vectors)[1]
    rows = []
    for name in implementations(config):
        quantize = build(name, codebook, mode)
        if quantize is None:
            continue
        one_call(quantize, vectors[:1], mode)  # what a first call loads and allocates for good is not the lookup's
        before = memory(config.device, reset=True)
        same = float((one_call(quantize, vectors, mode) == expected).float().mean())
        rows.append({"name": name, "mode": mode, "all": [], "peak_mb": memory(config.device) - before, "same_ids": same})
    for _ in range(config.repeats):
        for row in rows:
            quantize = build(row["name"], codebook, mode)
            start = clock(config.device)
            one_call(quantize, vectors, mode)
            row["all"].append(clock(config.device) - start)
    return [row | {"seconds": statistics.median(row["all"])} for row in rows]


def one_call(quantize: Quantize, vectors: Tensor, mode: str) -> Tensor:
    """Quantize, and in training go backward to the vectors and what else learns; the ids [N]."""
    vectors = vectors.detach().requires_grad_(mode != "eval")
    with torch.set_grad_enabled(mode != "eval"):
        codes, ids, loss = quantize(vectors)
        if mode != "eval":
            (codes.sum() + loss.sum()).backward()
    return ids.flatten()


def build(name: str, codebook: Tensor, mode: str) -> Quantize | None:
    """The implementation's callable for a mode, with a copy of the codebook."""
    if name in ("plain", "vistok", "vector-quantize-pytorch"):
        return {"plain": plain, "vistok": ours, "vector-quantize-pytorch": theirs}[name](codebook.clone(), mode)
    module, _, function = name.partition(":")
    if not module or not function:
        raise SystemExit(f"--peer {name!r} must be module:function")
    return getattr(importlib.import_module(module), function)(codebook.clone(), mode)


def plain(codebook: Tensor, mode: str) -> Quantize | None:
    """The least that does it; no entropy term."""
    if mode == "train entropy":
        return None
    codebook.requires_grad_(mode == "train gradient")
    sums, counts = codebook.detach().clone(), codebook.new_ones(len(codebook))

    def quantize(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            bias = codebook.square().sum(1) * -0.5
            ids = torch.cat([torch.addmm(bias, block, codebook.t()).argmax(1) for block in vectors.split(PLAIN_ROWS)])
            if mode == "train ema":
                counts.lerp_(torch.bincount(ids, minlength=len(codebook)).float(), 0.01)
                sums.lerp_(torch.zeros_like(sums).index_add_(0, ids, vectors), 0.01)
        picked = F.embedding(ids, codebook)
        loss = 0.25 * F.mse_loss(vectors, picked.detach()) + F.mse_loss(picked, vectors.detach())
        if mode == "train ema":
            codebook.copy_(sums / counts[:, None])
        return vectors + (picked - vectors).detach(), ids, loss

    return quantize


def ours(codebook: Tensor, mode: str) -> Quantize:
    update = {"eval": "frozen", "train ema": "ema"}.get(mode, "gradient")
    entropy = 0.1 if mode == "train entropy" else 0.0
    vq = VQ(VQConfig(codebook_size=len(codebook), code_dim=codebook.shape[1], update=update, entropy_weight=entropy)).to(codebook.device)
    vq.set_codebook(codebook)
    vq.train(mode != "eval")

    def quantize(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = vq(vectors)
        return out.codes, out.ids, out.loss

    return quantize


def theirs(codebook: Tensor, mode: str) -> Quantize:
    from vector_quantize_pytorch import VectorQuantize

    learned = {"learnable_codebook": True, "ema_update": False} if mode in ("train gradient", "train entropy") else {}
    entropy = {"codebook_diversity_loss_weight": 0.1} if mode == "train entropy" else {}
    vq = VectorQuantize(
        dim=codebook.shape[1], codebook_size=len(codebook), decay=0.99, commitment_weight=0.25, rotation_trick=False, **learned, **entropy
    ).to(codebook.device)
    vq._codebook.embed.data.copy_(codebook[None])
    if "embed_avg" in dict(vq._codebook.named_buffers()):
        vq._codebook.embed_avg.copy_(codebook[None])
    vq.train(mode != "eval")
    return lambda vectors: tuple(part[0] if part.ndim > 1 else part for part in vq(vectors[None]))


def memory(device: str, *, reset: bool = False) -> float:
    """Peak memory since the last reset, MB; after a reset what is held now."""
    if device == "cpu":
        if reset:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # else the next call fills what the last one freed, unseen
            reset_peak()
        return peak_gib() * 1024
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=f"Time quantizers (vistok {vistok.__version__})."))
