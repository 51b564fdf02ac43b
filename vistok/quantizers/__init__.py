"""Quantizers: continuous vectors to ids of a codebook and back."""

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.fsq import FSQ, FSQConfig
from vistok.quantizers.lookup import nearest_codes

__all__ = ["FSQ", "FSQConfig", "QuantizerOutput", "nearest_codes"]
