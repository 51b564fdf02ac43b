"""Attention-free image classifiers. Importing this registers them with timm: `timm.create_model("raftmlp_s")`, `"stripmlp_t"`."""

from vistok.pruning.backbones.raftmlp import RaftMLP, RaftMLPConfig
from vistok.pruning.backbones.stripmlp import StripMLP, StripMLPConfig

__all__ = ["RaftMLP", "RaftMLPConfig", "StripMLP", "StripMLPConfig"]
