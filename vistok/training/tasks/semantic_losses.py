"""What a TokenFlow's decoded semantic tokens are compared with: a teacher's tokens, or the words, classes or captions of a data set.

    teacher   1 - cos(decoded semantic token, teacher's token at that place), mean over places
    words     cross entropy between softmax(Linear(mean semantic token)) and the uniform distribution over the image's words or class
    captions  contrast (contrast.py) between Linear(mean semantic token), unit length, and the fixed vectors a text model makes of captions

B images, N M tokens, E width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.condition import fnv1a, split_words
from vistok.metrics.captions import caption_encoder
from vistok.training.tasks.contrast import contrastive_loss

CAPTION_TEMPERATURE = 0.1


def match_teacher(semantic: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine between decoded tokens [B, N, E] and a teacher's [B, M, E]; another grid is resized to ours, bilinear.

    Raises ValueError: the widths differ.
    """
    if semantic.shape[-1] != target.shape[-1]:
        raise ValueError(f"the teacher's tokens have width {target.shape[-1]}, the model says teacher_width={semantic.shape[-1]}")
    ours, theirs = round(semantic.shape[1] ** 0.5), round(target.shape[1] ** 0.5)
    if ours != theirs:
        target = F.interpolate(target.mT.unflatten(2, (theirs, theirs)).float(), size=(ours, ours), mode="bilinear").flatten(2).mT
    return 1 - F.cosine_similarity(semantic.float(), target.float(), dim=-1).mean()


class WordHead(nn.Module):
    """Guesses an image's words (hashed into `buckets`) or class from its semantic tokens."""

    def __init__(self, width: int, *, buckets: int):
        super().__init__()
        self.buckets = buckets
        self.head = nn.Linear(width, buckets)

    def caption_targets(self, captions: Sequence[str]) -> Tensor:
        """[B, buckets]: uniform over each caption's words, 0 where there are none."""
        targets = torch.zeros(len(captions), self.buckets)
        for row, caption in zip(targets, captions):
            for word in split_words(caption):
                row[fnv1a(word) % self.buckets] = 1
        return targets / targets.sum(1, keepdim=True).clamp(min=1)

    def class_targets(self, labels: Tensor) -> Tensor:
        """[B, buckets] of labels [B]; 0 where the label is -1. Raises ValueError: more classes than buckets."""
        if len(labels) and int(labels.max()) >= self.buckets:
            raise ValueError(f"label {int(labels.max())} needs buckets={int(labels.max()) + 1} or more, got {self.buckets}")
        return F.one_hot(labels.clamp(min=0), self.buckets).float() * (labels >= 0)[:, None]

    def forward(self, semantic: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, a scalar, of tokens [B, N, E]; images without a target count as 0."""
        logits = self.head(semantic.mean(1)).float()
        return -(targets.to(logits.device) * logits.log_softmax(-1)).sum(1).mean()


class CaptionHead(nn.Module):
    """Finds an image's caption among those of the batch.

    reader: who makes the captions' vectors (vistok.metrics.captions): hash, minilm, or a folder of a transformers text model. Frozen.
    """

    def __init__(self, width: int, *, reader: str):
        super().__init__()
        self.read = caption_encoder(reader)
        self.head = nn.Linear(width, self.read.width)

    def forward(self, semantic: Tensor, texts: Sequence[str]) -> Tensor:
        """The contrastive loss, a scalar, of tokens [B, N, E]; images without a text take no part, equal texts are one answer."""
        captions = self.read([text.strip() for text in texts]).to(semantic.device)
        groups = torch.tensor([fnv1a(text) >> 1 if text.strip() else -1 for text in texts], device=semantic.device)
        return contrastive_loss(F.normalize(self.head(semantic.mean(1)).float(), dim=-1), captions, CAPTION_TEMPERATURE, groups=groups)
