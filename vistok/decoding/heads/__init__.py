"""Small networks that read a frozen target: heads that draft its next tokens, and one that judges drafts. Importing registers them all."""

from vistok.decoding.heads.chimera import ChimeraConfig, ChimeraHeads
from vistok.decoding.heads.eagle import EagleConfig, EagleHead
from vistok.decoding.heads.judge import JudgeConfig, JudgeHead
from vistok.decoding.heads.medusa import MedusaConfig, MedusaHeads

__all__ = [
    "ChimeraConfig",
    "ChimeraHeads",
    "EagleConfig",
    "EagleHead",
    "JudgeConfig",
    "JudgeHead",
    "MedusaConfig",
    "MedusaHeads",
]
