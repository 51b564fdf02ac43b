"""Time guided next-token decoding of one image against transformers' `generate` of an equal model, and against others, in one run.

    python -m eval.bench.generators                          # 111 M parameters, 256 tokens, about two minutes on two cores
    python -m eval.bench.generators --size small             # 10 M parameters, 64 tokens, seconds
    python -m eval.bench.generators --peer my_module:build   # adds another implementation
    python -m eval.bench.generators --compile                # adds torch.compile; --device cuda runs all of it on a GPU, without int8

Weights are random (timing does not depend on them), float32, equal in number and shape: gpt-b here, a LlamaForCausalLM there. Guidance is
two rows, conditional and unconditional, whose logits are mixed; ids are the most probable ones, so that all do the same. Whole calls are
timed, prefill and packing of weights included, in interleaved rounds, so that a busy machine slows all; what counts is the ratio within a
round. "steps/s" is without the first step of each call. "read" is what a step has to read, weights once and the filled cache, a second;
"share" is that over the memory bandwidth measured just before. "no compiler" is what a machine without one gets (VISTOK_NATIVE=0). Then
what the packed path and int8 weights cost in logits, step by step, on these weights and on bundled generators.

Peer contract: `module:function` names a function (shape: Shape) -> generate, which is called as
generate(num_tokens, guidance_scale, on_step) and calls on_step() after each token.
"""

import importlib
import json
import os
import platform
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
from vistok.decoding import SamplingConfig, generate
from vistok.generators import GPT
from vistok.layers import native
from vistok.layers.packed import packed_linears, to_int8
from vistok.rng import image_generators


@dataclass(frozen=True)
class Shape:
    """Of the decoder: no biases, RMS norms, gated feed-forward layers, an untied head."""

    width: int
    depth: int
    num_heads: int
    hidden: int
    vocab_size: int
    grid: int


SIZES = {"base": Shape(768, 12, 12, 2048, 16384, 16), "small": Shape(320, 6, 5, 896, 4096, 8)}
BUNDLED = ("vistok/emoji-gpt", "vistok/emoji-gpt-fsq2d")


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    size: Literal["base", "small"] = "base"
    """Shape: GPT-B, or one for a quick look."""
    num_tokens: int | None = None
    """Tokens of the image; all by default."""
    rounds: int = 3
    """Interleaved rounds."""
    guidance_scale: float = 2.0
    """Mixes the two rows; 1 leaves one row."""
    threads: int | None = None
    """Threads PyTorch may use; its own choice by default."""
    device: str = "cpu"
    """Where all of it runs."""
    compile: bool = False
    """Add the same model under torch.compile; compiling takes minutes and is not timed."""
    no_transformers: bool = False
    """Leave transformers out."""
    peer: str | None = None
    """Another implementation as module:function, see the top of this file."""
    out: Path | None = None
    """Write the figures as JSON here too."""


@torch.no_grad()
def main(config: BenchConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shape = SIZES[config.size]
    device = torch.device(config.device)
    model = build(shape).to(device)
    N = config.num_tokens or model.max_tokens
    bandwidth = read_bandwidth(device)
    describe(config, model, N, bandwidth)
    ways = {} if config.no_transformers else {"transformers": transformers_way(shape, device)}
    if config.peer is not None:
        module, _, function = config.peer.partition(":")
        if not module or not function:
            raise SystemExit(f"--peer {config.peer!r} must be module:function")
        ways["peer"] = getattr(importlib.import_module(module), function)(shape)
    ways["vistok, plain"] = lambda *arguments: plain_loop(model, *arguments)
    ways["vistok"] = lambda *arguments: our_way(model, *arguments)
    if device.type == "cpu" and native.is_available():
        ways["vistok, no compiler"] = lambda *arguments: without_compiler(our_way, model, *arguments)
    if config.compile:
        compiled = build(shape).to(device)
        compiled.compile(fullgraph=True)
        ways["vistok, compiled"] = lambda *arguments: our_way(compiled, *arguments)
    if device.type == "cpu":
        int8 = to_int8(build(shape))
        ways["vistok, int8"] = lambda *arguments: our_way(int8, *arguments)
    rows = measure(config, ways, model, N, bandwidth)
    errors = [logit_errors("packed, random weights", model, model, N)]
    if device.type == "cpu":
        errors.append(logit_errors("int8, random weights", model, int8, N))
        for name in BUNDLED:  # these lie on disk as int8, so that their rounding is in both
            trained = vistok.load(name).generator
            errors.append(logit_errors(f"int8, {name}", trained, to_int8(vistok.load(name).generator), trained.max_tokens))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {"config": asdict(config) | {"out": str(config.out)}, "bandwidth": bandwidth, "rows": rows, "errors": errors}
        config.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def build(shape: Shape) -> GPT:
    """A GPT of this shape with random weights, one class token in front."""
    torch.manual_seed(0)
    fields = dict(width=shape.width, depth=shape.depth, num_heads=shape.num_heads, hidden=shape.hidden)
    return vistok.create("gpt-b", **fields, codebook_size=shape.vocab_size, layout_shape=(shape.grid, shape.grid), num_classes=1).eval()


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that can be read: the best of a sum, of torch's one-row product and of ours, over half a GiB."""
    table, vector = torch.ones(16384, 8192, device=device), torch.ones(1, 16384, device=device)
    ways = [table.sum, lambda: vector @ table]
    if device.type == "cpu" and native.is_available():
        ways.append(lambda: native.linear_rows(vector[:, :8192], table))
    best = 0.0
    for _ in range(4):
        for read in ways:
            wait(device)
            began = time.perf_counter()
            read()
            wait(device)
            best = max(best, table.nbytes / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def step_bytes(model: GPT, rows: int, num_tokens: int, *, weight_bytes: int = 4) -> int:
    """Bytes a step has to read: all matrices once, and the keys and values there are, on average."""
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    config = model.settings
    return weights * weight_bytes + 2 * config.depth * rows * config.width * 4 * num_tokens // 2


# -- the ways: generate(num_tokens, guidance_scale, on_step) ------------------------------------------------------------------------------


def our_way(model: GPT, num_tokens: int, guidance_scale: float, on_step: Callable[[], None]) -> None:
    options = dict(num_tokens=num_tokens, guidance_scale=guidance_scale, sampling=SamplingConfig(temperature=0))
    uniforms = torch.zeros(1, num_tokens)
    generate(model, model.make_condition(1, labels=[0]), uniforms=uniforms, on_step=lambda step, ids: on_step(), **options)


def without_compiler(way: Callable, *arguments) -> None:
    """A way, with torch's products in the place of ours."""
    native.enabled = False
    try:
        way(*arguments)
    finally:
        native.enabled = True


def plain_loop(model: GPT, num_tokens: int, guidance_scale: float, on_step: Callable[[], None]) -> None:
    """The same with the layers as they are: what packing gains."""
    condition = model.make_condition(1, labels=[0])
    condition = condition if guidance_scale == 1 else condition.and_null()
    rows = len(condition.labels)
    cache, ids = model.new_cache(rows, num_tokens), torch.empty(rows, 0, dtype=torch.int64, device=model.device)
    for step in range(num_tokens):
        logits = model(ids, condition if step == 0 else None, cache=cache)[:, -1]
        logits = logits if rows == 1 else logits[1:] + guidance_scale * (logits[:1] - logits[1:])
        ids = logits.argmax(-1, keepdim=True).expand(rows, 1)
        on_step()


def transformers_way(shape: Shape, device: torch.device) -> Callable:
    """transformers' own generate on two rows, with a logits processor that mixes them."""
    from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.num_heads,
        intermediate_size=shape.hidden, max_position_embeddings=shape.grid**2 + 1, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval().to(device)

    class Guide(LogitsProcessor):
        def __init__(self, scale: float, on_step: Callable[[], None]):
            self.scale, self.on_step = scale, on_step

        def __call__(self, input_ids, scores):
            self.on_step()
            if len(scores) == 1:
                return scores
            guided = scores[1:] + self.scale * (scores[:1] - scores[1:])
            return guided.expand(2, -1)

    def way(num_tokens: int, guidance_scale: float, on_step: Callable[[], None]) -> None:
        ids = torch.tensor([[1], [2]], device=device)[: 1 if guidance_scale == 1 else 2]
        guide = LogitsProcessorList([Guide(guidance_scale, on_step)])
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, logits_processor=guide)

    return way


# -- measuring ----------------------------------------------------------------------------------------------------------------------------


def measure(config: BenchConfig, ways: dict[str, Callable], model: GPT, N: int, bandwidth: float) -> list[dict]:
    """Time the ways in turn, the first of a round changing each time; ratios are to the first way, round by round."""
    calls: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order = list(ways)
    for name in order:
        ways[name](20, config.guidance_scale, lambda: None)  # warm up: more than the 16 steps from which weights are packed
    for number in range(config.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            stamps: list[float] = []

            def stamp(stamps=stamps) -> None:
                wait(model.device)
                stamps.append(time.perf_counter())

            began = time.perf_counter()
            ways[name](N, config.guidance_scale, stamp)
            seconds = time.perf_counter() - began
            if len(stamps) != N:
                raise RuntimeError(f"{name} made {len(stamps)} steps instead of {N}")
            calls[name].append((seconds, (N - 1) / (stamps[-1] - stamps[0])))
    print(f"{'':20}{'call s':>9}{'steps/s':>9}{'spread':>15}{'read GB/s':>11}{'share':>8}{'faster, whole calls':>28}")
    rows = []
    for name in order:
        seconds, rates = zip(*calls[name])
        size = step_bytes(model, 1 if config.guidance_scale == 1 else 2, N, weight_bytes=1 if name.endswith("int8") else 4)
        rate = statistics.median(rates)
        ratios = [first / mine for (first, _), mine in zip(calls[order[0]], seconds)]
        row = {"name": name, "seconds": seconds, "steps_per_second": rates, "bytes_per_step": size, "ratio": statistics.median(ratios)}
        line = f"{name:20}{statistics.median(seconds):>9.2f}{rate:>9.1f}{f'{min(rates):.1f} to {max(rates):.1f}':>15}"
        line += f"{size * rate / 1e9:>11.1f}{size * rate / bandwidth:>8.0%}"
        print(line + f"{row['ratio']:>11.2f}x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        rows.append(row)
    return rows


def logit_errors(name: str, exact: GPT, other: GPT, N: int) -> dict:
    """How far the logits of `other` (of the packed path, where it is `exact` itself) are from those of `exact`, along its own samples.

    `exact` reads each sample in one plain pass, `other` a token a step, as generation does.
    """
    sampling, condition = dict(num_tokens=N, generators=image_generators(0, 4)), exact.make_condition(4)
    ids = generate(exact, condition, **sampling)[0].ids[:, : N - 1]
    expected = exact(ids, condition)
    cache = other.new_cache(len(ids), N)
    with packed_linears(other, len(ids)):
        steps = [other(ids[:, :0], condition, cache=cache), *(other(ids[:, n : n + 1], cache=cache) for n in range(N - 1))]
    logits = torch.cat(steps, dim=1)
    law, log_law = expected.softmax(-1), expected.log_softmax(-1)
    kl = (law * (log_law - logits.log_softmax(-1))).sum(-1)
    best = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    error = {
        "name": name, "largest": float((logits - expected).abs().max()), "rms": float((logits - expected).square().mean().sqrt()),
        "deviation": float(expected.std()), "kl": float(kl.mean()), "largest_kl": float(kl.max()), "same_best_id": float(best),
    }  # fmt: skip
    print(
        f"{name + ':':34}logits off by {error['largest']:.1e} at most, {error['rms']:.1e} rms (they vary by {error['deviation']:.2f}); "
        f"KL {error['kl']:.1e} nats a token, {error['largest_kl']:.1e} at most; same best id {error['same_best_id']:.1%}"
    )
    return error


def describe(config: BenchConfig, model: GPT, N: int, bandwidth: float) -> None:
    """Say what ran where: a figure without its machine and command is no figure."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print("command:   python -m eval.bench.generators " + " ".join(sys.argv[1:]))
    print(f"machine:   {cpu}, {usable} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}")
    print(
        f"torch:     {torch.__version__}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}, float32"
    )
    print(
        f"product:   {'our own, built by the compiler here' if native.is_available() else 'of torch: no compiler here, or VISTOK_NATIVE=0'}"
    )
    if not config.no_transformers:
        print(f"peer:      transformers {importlib.import_module('transformers').__version__}, LlamaForCausalLM.generate")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    read = step_bytes(model, 1 if config.guidance_scale == 1 else 2, N) / 1e6
    print(f"model:     {config.size}, {size:.1f} M parameters; a step reads {read:.0f} MB in float32")
    print(f"work:      1 image of {N} tokens on {config.device}, guidance {config.guidance_scale}, {config.rounds} rounds")
    print(f"memory:    {bandwidth / 1e9:.1f} GB/s read\n")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=f"Time next-token decoding against transformers (vistok {vistok.__version__})."))
