"""What speculative decoding costs besides the passes of the target: verifying, drawing a tree, and the loop itself.

    python -m eval.bench.decoding                   # V = 16,384, the sizes LANTERN's code was timed at; about a minute on one core
    python -m eval.bench.decoding --loop vistok/emoji-gpt-fsq2d   # also the loop against the plain one on a model, in turns

Verification is of one image, laws included: a tree of 58 drafts with 7 below the root, where all 7 are rejected, and where 3 levels are
accepted; a chain of 4. "greedy" is temperature 0. Drawing is of a fixed tree of 25 nodes, siblings without replacement. LANTERN's published
code took, on two cores of a similar machine: sampling 0.9 to 3.4 ms, greedy 22 ms, drawing 76 ms. On a CPU the time is that of the thread,
so that other work on the machine does not count.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate, sample, warp
from vistok.decoding.accept import make_rule
from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.drafters import make_drafter
from vistok.decoding.growth import grow_template
from vistok.decoding.speculative import speculate
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.tuning import clock_for
from vistok.decoding.walk_one import walk_one

TREE_58 = ([(r, *[0] * d) for r in range(7) for d in range(5)] + [(0, *[0] * d, r) for d in range(4) for r in range(1, 7)])[:58]
TREE_25 = [(r, *[0] * d) for r in range(5) for d in range(5)]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to time."""

    vocab_size: int = 16384
    """V."""
    repeats: int = 15
    """Times a measurement is taken; the median and the least are shown."""
    top_k: int = 0
    """Warping of every law that is looked at; 0 is none."""
    threads: int = 1
    """Threads of torch."""
    loop: str | None = None
    """A pipeline on which the loop is timed against the plain one."""
    out: Path | None = None
    """Write the figures as JSON here too."""


def main(config: BenchConfig) -> None:
    torch.set_num_threads(config.threads)
    rows = [*verification(config), drawing(config)]
    if config.loop:
        rows += loop(config)
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        print(f"{row['what']:{width}}  {row['text']}")
    if config.out:
        config.out.write_text(json.dumps(rows, indent=2) + "\n")


def timed(what: str, call: Callable[[], object], repeats: int) -> dict:
    """Median and least milliseconds of a call."""
    call()
    times, clock = [], clock_for(torch.device("cpu"))
    for _ in range(repeats):
        began = clock()
        call()
        times.append(1e3 * (clock() - began))
    return {"what": what, "median_ms": statistics.median(times), "least_ms": min(times),
            "text": f"{statistics.median(times):6.2f} ms (least {min(times):.2f})"}  # fmt: skip


@torch.no_grad()
def verification(config: BenchConfig) -> list[dict]:
    """The walk over a tree and a chain, laws included: from guided logits to the verdict."""
    V, rows = config.vocab_size, []
    generator = torch.Generator().manual_seed(0)
    shape = TreeShape.from_template(TreeTemplate.from_choices(TREE_58))
    M = shape.num_tokens
    logits = torch.randn(1, M + 1, V, generator=generator) * 2
    ids = torch.randint(V, (1, M), generator=generator)
    standard = make_rule("standard")
    fixed = dict(active=torch.ones(1, dtype=torch.bool), room=torch.tensor([99]))
    q = torch.randn(1, M + 1, V, generator=generator).mul(2).softmax(-1)
    half = torch.full((1, shape.depth + 1), 0.5, dtype=torch.float64)
    nodes = [0]
    for _ in range(3):
        nodes.append(int(shape.children[0, nodes[-1], 0]))
    for lucky in (False, True):
        coins = torch.full((1, M), float("inf"), dtype=torch.float64)
        coins[0, [node - 1 for node in nodes[1:]]] = 0.0 if lucky else float("inf")
        for what in ("sampling, tree of 58 not drawn", "sampling, drawn tree of 58", "greedy, tree of 58"):
            sampling = SamplingConfig(temperature=0) if "greedy" in what else SamplingConfig(top_k=config.top_k)
            law, tokens = partial(law_of, logits, sampling), ids.clone()
            for above, node in zip(nodes, nodes[1:] if lucky else ()):
                tokens[0, node - 1] = sample(law(above), half[:, 0])
            if "drawn tree" in what:
                draft = Draft(tokens, shape, "without_replacement", q, torch.arange(M + 1)[None])
            else:
                draft = Draft(tokens, shape, "deterministic")
            call = partial(walk_one, draft, law, standard, coins=coins, position_uniforms=half, **fixed)
            rows.append(timed(f"{what}, {'3 levels accepted, then 7 rejected' if lucky else '7 rejected'}", call, config.repeats))
    chain = Draft.chain(ids[:, :4], q[:, :4])
    sampling = SamplingConfig(top_k=config.top_k)
    draws = dict(coins=torch.full((1, 4), 0.5, dtype=torch.float64), position_uniforms=torch.full((1, 5), 0.5, dtype=torch.float64))

    def verify_chain():
        laws = warp(logits[:, :5], sampling).softmax(-1)
        return walk_one(chain, lambda node: laws[:, node], standard, **draws, **fixed)

    rows.append(timed("sampling, drawn chain of 4", verify_chain, config.repeats))
    return rows


def law_of(logits: torch.Tensor, sampling: SamplingConfig, node: int) -> torch.Tensor:
    """p [1, V] after a node."""
    return warp(logits[:, node], sampling).softmax(-1)


@torch.no_grad()
def drawing(config: BenchConfig) -> dict:
    """A fixed tree drawn without replacement, from the drafter's logits on."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, config.vocab_size, generator=generator) * 2
    template, sampling = TreeTemplate.from_choices(TREE_25), SamplingConfig(top_k=config.top_k)
    uniforms = torch.rand(1, len(TREE_25), generator=generator, dtype=torch.float64)
    root = torch.zeros(1, dtype=torch.int64)

    def expand(ids, seen, depth):
        return warp(logits[None, : ids.shape[1]], sampling).softmax(-1)

    call = partial(grow_template, expand, root, template, uniforms)
    return timed("drawing a fixed tree of 25, without replacement", call, config.repeats)


@torch.no_grad()
def loop(config: BenchConfig) -> list[dict]:
    """Seconds of one guided image: the plain loop, the loop that drafts nothing, and drafters; in turns, as ratios within a turn."""
    model = vistok.load(config.loop).generator.eval()
    condition = model.make_condition(1, labels=[0] if model.settings.num_classes else None)
    call, clock = dict(guidance_scale=1.5), clock_for(model.device)
    cases = {
        "drafting nothing": ("copy", {}, 0),
        "copies, found to lose": ("copy", {}, "auto"),
        "jacobi 4": ("jacobi", dict(length=4), 4),
        "jacobi, length found": ("jacobi", dict(length=4), "auto"),
    }
    ratios = {name: [] for name in cases}
    last = {}
    for repeat in range(config.repeats):
        began = clock()
        generate(model, condition, generators=rng.image_generators(repeat, 1), **call)
        plain = clock() - began
        for name, (drafter, options, length) in cases.items():
            began = clock()
            _, last[name] = speculate(
                model, condition, drafter=make_drafter(drafter, model, **options), rule=make_rule("standard"),
                generators=rng.image_generators(repeat, 1), num_draft_tokens=length, **call,
            )  # fmt: skip
            ratios[name].append(plain / (clock() - began))
    return [
        {"what": f"loop: {name}", "ratio": statistics.median(r), "text": f"{statistics.median(r):6.2f} x plain; {last[name].summary()}"}
        for name, r in ratios.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
