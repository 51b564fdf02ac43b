"""Generators of visual tokens, one file each; importing this package registers them all."""

from vistok.generators import llamagen  # noqa: F401 - registers its shapes
from vistok.generators.condition import Condition, TextEncoder
from vistok.generators.gpt import GPT, GPTConfig
from vistok.generators.maskgit import MaskGIT, MaskGITConfig
from vistok.generators.order import OrderConfig, PredictionOrder
from vistok.generators.rar import RAR, RARConfig
from vistok.generators.tokenflow_t2i import TokenFlowT2I, TokenFlowT2IConfig
from vistok.generators.var import VAR, VARConfig
from vistok.generators.xar import XAR, XARConfig
from vistok.generators.xar_sampling import FlowSampling

__all__ = [
    "GPT",
    "RAR",
    "VAR",
    "XAR",
    "Condition",
    "FlowSampling",
    "GPTConfig",
    "MaskGIT",
    "MaskGITConfig",
    "OrderConfig",
    "PredictionOrder",
    "RARConfig",
    "TextEncoder",
    "TokenFlowT2I",
    "TokenFlowT2IConfig",
    "VARConfig",
    "XARConfig",
]
