"""Time visual-token pruning in a vision-language model against the same model unpruned, in one run.

    python -m eval.bench.pruning_vlm                          # 12 layers of width 512, 576 + 96 tokens; about two minutes on one core
    python -m eval.bench.pruning_vlm --size 0.5b --threads 2  # the shape of Qwen2-0.5B; many minutes on a laptop
    python -m eval.bench.pruning_vlm --clock cpu              # processor time: on a machine that others use

Weights are random (timing does not depend on them). A measurement is a row of pairs, pruned and unpruned one right after the other, the
first of a pair changing each time, so that a busy machine slows both; what counts is the ratio within a pair, its median and its range.

    prefill   generate() of one token: encode the image, choose, run the language model on the prompt. The vision tower is the same in both
              and small here (2 layers); its time alone is printed, so that the language model's share can be told
    decode    one more token on a filled cache, with the hooks of pruning inside the language model and without any
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

import vistok

IMAGE, SIDE, TEXT = 31999, 24, 96
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8},
    "0.1b": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
}
AIMS = {0.5: 1.5, 0.25: 2.3, 0.1: 3.2}
"""Share kept before the language model -> times faster a prefill should be."""


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    size: Literal["tiny", "small", "0.1b", "0.5b"] = "small"
    """Shape of the language model."""
    methods: tuple[str, ...] = ("uniform", "divprune", "visionzip")
    """Methods before the language model."""
    inside: tuple[str, ...] = ("fastv", "pyramiddrop")
    """Methods inside it, with the paper's stages."""
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Shares of the visual tokens that stay."""
    repeats: int = 5
    """Pairs a measurement."""
    steps: int = 16
    """Tokens decoded in a row for a decoding time."""
    clock: Literal["wall", "cpu"] = "wall"
    """Time on the wall, or the processor time of this process."""
    threads: int = 1
    """Threads PyTorch may use."""
    out: Path | None = None
    """Write the figures as JSON here too."""


def main(config: BenchConfig) -> None:
    torch.set_num_threads(config.threads)
    model, inputs = build(SIZES[config.size])
    describe(config, model)
    rows = [*prefill_rows(config, model, inputs), *decode_rows(config, model, inputs)]
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        settings = asdict(config) | {"out": str(config.out)}
        config.out.write_text(json.dumps({"config": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def build(shape: dict) -> tuple[torch.nn.Module, dict]:
    """A LLaVA of random weights and a prompt with one image of 576 tokens and 96 of text."""
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        image_size=SIDE * 14, patch_size=14, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    text = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **shape)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=SIDE**2)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    words = torch.randint(3, 30000, (TEXT,))
    ids = torch.cat([words[: TEXT // 2], torch.full((SIDE**2,), IMAGE), words[TEXT // 2 :]])[None]
    pixels = torch.randn(1, 3, SIDE * 14, SIDE * 14)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def describe(config: BenchConfig, model: torch.nn.Module) -> None:
    """Say what ran where: a figure without its machine and command is no figure."""
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    millions = sum(p.numel() for p in model.model.language_model.layers.parameters()) / 1e6
    print("command:   python -m eval.bench.pruning_vlm " + " ".join(sys.argv[1:]))
    print(f"machine:   {cpu}, {config.threads} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {config.clock} time")
    print(f"versions:  torch {torch.__version__}, transformers {transformers.__version__}, sdpa attention, float32")
    print(f"model:     {config.size}: {model.config.text_config.num_hidden_layers} layers, {millions:.0f} M without embeddings")
    print(f"work:      one image of {SIDE**2} tokens, {TEXT} of text; median of {config.repeats} interleaved pairs\n")
    print(f"{'measurement':38}{'unpruned ms':>12}{'pruned ms':>11}{'times':>8}{'range':>14}   aim")


@torch.no_grad()
def prefill_rows(config: BenchConfig, model: torch.nn.Module, inputs: dict) -> list[dict]:
    """generate() of one token with and without pruning."""
    only = {"max_new_tokens": 1, "do_sample": False, "suppress_tokens": [IMAGE]}

    def run() -> None:
        model.generate(**inputs, **only)

    def pruned(method: str, options: dict) -> Callable[[], None]:
        def once() -> None:
            with vistok.prune(model, method, **options):
                run()

        return once

    rows = [measure(config, "vision tower alone, twice", lambda: encode(model, inputs), lambda: encode(model, inputs))]
    for method in config.methods:
        for ratio in config.keep_ratios:
            name = f"prefill, {method}, {1 - ratio:.0%} removed"
            rows.append(measure(config, name, run, pruned(method, {"keep_ratio": ratio}), AIMS.get(ratio)))
    for method in config.inside:
        if method == "pyramiddrop":
            rows.append(measure(config, "prefill, pyramiddrop inside", run, pruned(method, {})))
            continue
        for ratio in config.keep_ratios:
            name = f"prefill, {method} inside, {1 - ratio:.0%} removed"
            rows.append(measure(config, name, run, pruned(method, {"keep_ratio": ratio})))
    return rows


def encode(model: torch.nn.Module, inputs: dict) -> None:
    """What every prefill does first."""
    model.get_image_features(inputs["pixel_values"])


@torch.no_grad()
def decode_rows(config: BenchConfig, model: torch.nn.Module, inputs: dict) -> list[dict]:
    """Single tokens on a filled cache: without hooks, with hooks and nothing dropped, with hooks on shorter caches; also with padding."""
    short = {name: torch.cat([value, value]) for name, value in inputs.items()}
    short["input_ids"][1, :8], short["attention_mask"][1, :8] = 0, 0
    rows = []
    for batch, prompt in (("", inputs), ("2 rows, one padded, ", short)):
        plain = filled(model, prompt)
        for name, options in (
            ("hooks, all kept", {"method": "fastv", "keep_ratio": 1.0}),
            ("fastv, 75% removed", {"method": "fastv", "keep_ratio": 0.25}),
            ("pyramiddrop", {"method": "pyramiddrop"}),
        ):
            with vistok.prune(model, **options):
                cache = filled(model, prompt)

            def hooked(cache=cache, options=options, prompt=prompt) -> None:
                with vistok.prune(model, **options):
                    decode(config, model, cache, prompt)

            unhooked = partial(decode, config, model, plain, prompt)
            rows.append(measure(config, f"decode, {batch}{name}", unhooked, hooked, calls=config.steps))
    return rows


def filled(model: torch.nn.Module, prompt: dict):
    """The cache after the prompt."""
    return model(**prompt, use_cache=True, logits_to_keep=1).past_key_values


def decode(config: BenchConfig, model: torch.nn.Module, cache, prompt: dict) -> None:
    """Some tokens, one at a time, and back to the prompt."""
    mask, length = prompt["attention_mask"], prompt["input_ids"].shape[1]
    is_padded = not bool(mask.all())
    token = torch.full((len(mask), 1), 7)
    for step in range(config.steps):
        position = torch.full((len(mask), 1), length + step)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        model(input_ids=token, attention_mask=mask if is_padded else None, position_ids=position, past_key_values=cache, use_cache=True)
    cache.crop(-config.steps)


def measure(
    config: BenchConfig, name: str, plain: Callable[[], None], pruned: Callable[[], None], aim: float | None = None, *, calls: int = 1
) -> dict:
    """Time both in interleaved pairs and print a row. calls: what one call of each counts as."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    seconds: dict[bool, list[float]] = {False: [], True: []}
    plain(), pruned()  # warm up
    for repeat in range(config.repeats):
        for is_pruned in (False, True) if repeat % 2 == 0 else (True, False):
            start = clock()
            (pruned if is_pruned else plain)()
            seconds[is_pruned].append((clock() - start) / calls)
    ratios = [a / b for a, b in zip(seconds[False], seconds[True])]
    row = {
        "name": name, "unpruned_ms": 1e3 * statistics.median(seconds[False]), "pruned_ms": 1e3 * statistics.median(seconds[True]),
        "times": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "aim": aim,
    }  # fmt: skip
    spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
    print(f"{name:38}{row['unpruned_ms']:12.1f}{row['pruned_ms']:11.1f}{row['times']:8.2f}{spread:>14}   {'' if aim is None else aim}")
    return row


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
