"""Captions as rows of features, a row a token: what the decoder of a text-aware TiTok reads beside the image's tokens.

    "hash"       word i of the caption is a fixed random direction, seeded by the word; no weights, the same on every machine
    otherwise    the last hidden states of a frozen transformers text model (published: CLIP's)

B captions, T tokens, F width.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vistok.generators.condition import TextEncoder, fnv1a, split_words


class CaptionFeatures:
    """source: "hash", or a folder or hub id of a transformers text model. num_tokens: T; longer captions are cut. width: F.

    Raises ValueError: the text model's states have another width.
    """

    def __init__(self, source: str, *, num_tokens: int, width: int):
        self.source, self.num_tokens, self.width = source, num_tokens, width
        self.encoder = None if source == "hash" else TextEncoder(source, num_tokens)
        if self.encoder is not None and self.encoder.width != width:
            raise ValueError(f"{source} makes features of width {self.encoder.width}, the model reads text_width={width}")

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features [B, T, F] float32, 0 behind a caption's last token."""
        if self.encoder is not None:
            return self.encoder(captions)[0]
        features = torch.zeros(len(captions), self.num_tokens, self.width)
        for row, caption in zip(features, captions):
            for place, word in zip(row, split_words(caption)):
                place.copy_(_direction(word, self.width))
        return features

    def to(self, device: torch.device | str) -> "CaptionFeatures":
        """Move the text model; features come from where it is."""
        if self.encoder is not None:
            self.encoder.model.to(device)
        return self


@lru_cache(maxsize=65536)
def _direction(word: str, width: int) -> Tensor:
    """[F] with entries of variance 1."""
    return torch.randn(width, generator=torch.Generator().manual_seed(fnv1a(word)))
