"""Image tokenizers, one file each; importing this package registers them all."""

from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
from vistok.tokenizers.fsq2d import FSQ2D, FSQ2DConfig
from vistok.tokenizers.lavit import LaVIT, LaVITConfig
from vistok.tokenizers.seed import SEED, SEEDConfig
from vistok.tokenizers.titok import TiTok, TiTokConfig
from vistok.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from vistok.tokenizers.vae import KLVAE, VAEConfig
from vistok.tokenizers.var_vqvae import VARVQVAE, ScaleCodesConfig, VARVQVAEConfig
from vistok.tokenizers.vision_tower import VisionTower, VisionTowerConfig
from vistok.tokenizers.vqgan import VQGAN, VQGANConfig

__all__ = [
    "FSQ2D",
    "KLVAE",
    "SEED",
    "VARVQVAE",
    "VQGAN",
    "FSQ2DConfig",
    "FlexTok",
    "FlexTokConfig",
    "LaVIT",
    "LaVITConfig",
    "SEEDConfig",
    "ScaleCodesConfig",
    "TiTok",
    "TiTokConfig",
    "TokenFlow",
    "TokenFlowConfig",
    "VAEConfig",
    "VARVQVAEConfig",
    "VQGANConfig",
    "VisionTower",
    "VisionTowerConfig",
]
