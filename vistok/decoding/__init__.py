"""From logits to tokens: sampling laws and the decoding loops."""

from vistok.decoding.generate import GenerationStats, generate, guidance_until
from vistok.decoding.sampling import SamplingConfig, sample, warp

__all__ = ["GenerationStats", "SamplingConfig", "generate", "guidance_until", "sample", "warp"]
