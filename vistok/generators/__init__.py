"""Generators of visual tokens, one file each; importing this package registers them all."""

from vistok.generators.condition import Condition, TextEncoder
from vistok.generators.gpt import GPT, GPTConfig

__all__ = ["GPT", "Condition", "GPTConfig", "TextEncoder"]
