"""From logits to tokens: sampling laws and the decoding loops."""

from vistok.decoding.exits import generate_exits
from vistok.decoding.generate import GenerationStats, generate, guidance_until, step_sizes
from vistok.decoding.parallel import generate_parallel
from vistok.decoding.rows import generate_rows
from vistok.decoding.sampling import SamplingConfig, sample, warp
from vistok.decoding.speculative import speculate
from vistok.decoding.stats import SpeculationStats

__all__ = [
    "GenerationStats",
    "SamplingConfig",
    "SpeculationStats",
    "generate",
    "generate_exits",
    "generate_parallel",
    "generate_rows",
    "guidance_until",
    "sample",
    "speculate",
    "step_sizes",
    "warp",
]
