"""Quantizers: continuous vectors to ids of a codebook and back."""

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.fsq import FSQ, FSQConfig
from vistok.quantizers.lookup import nearest_codes
from vistok.quantizers.groups import CodeGroup
from vistok.quantizers.vq import VQ, VQConfig

__all__ = ["FSQ", "VQ", "CodeGroup", "FSQConfig", "QuantizerOutput", "VQConfig", "nearest_codes"]
