"""Quantizers: continuous vectors to ids of a codebook and back."""

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.fsq import FSQ, FSQConfig
from vistok.quantizers.groups import CodeGroup
from vistok.quantizers.lfq import LFQ, LFQConfig
from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.multiscale import MultiScaleOutput, MultiScaleResidual
from vistok.quantizers.phi import PhiConvs
from vistok.quantizers.residual import ResidualVQ, ResidualVQConfig
from vistok.quantizers.vq import VQ, VQConfig

__all__ = [
    "FSQ",
    "LFQ",
    "VQ",
    "CodeGroup",
    "FSQConfig",
    "LFQConfig",
    "MultiScaleOutput",
    "MultiScaleResidual",
    "PhiConvs",
    "QuantizerOutput",
    "ResidualVQ",
    "ResidualVQConfig",
    "VQConfig",
    "nearest_codes",
]
