"""From logits to tokens: sampling laws and the decoding loops."""

from vistok.decoding.generate import GenerationStats, generate, guidance_until, step_sizes
from vistok.decoding.parallel import generate_parallel
from vistok.decoding.sampling import SamplingConfig, sample, warp

__all__ = ["GenerationStats", "SamplingConfig", "generate", "generate_parallel", "guidance_until", "sample", "step_sizes", "warp"]
