"""Image tokenizers, one file each; importing this package registers them all."""

from vistok.tokenizers.flextok import FlexTok, FlexTokConfig
from vistok.tokenizers.fsq2d import FSQ2D, FSQ2DConfig
from vistok.tokenizers.vae import KLVAE, VAEConfig

__all__ = ["FSQ2D", "KLVAE", "FSQ2DConfig", "FlexTok", "FlexTokConfig", "VAEConfig"]
