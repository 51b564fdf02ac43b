"""What a picture should show, as tokens in front of the picture's own: a class, a caption, both or neither.

    prefix = [class token] [caption tokens]          fixed length P; one learned token when there is neither

A missing condition is data, not a mode: label -1, a caption without words. Each has a learned null embedding, which serves rows without a
label or caption, dropout in training and the unconditional half of guidance.

Captions are read in one of two ways:
* "hash": words and their character trigrams are hashed into one table that trains with the generator. One token for the bag of all words,
  then one a word. Needs nothing, knows nothing beforehand; an unseen word is read by its trigrams.
* any transformers text model: frozen, its hidden states are projected by an MLP. Padding is either a learned vector, or, as in LlamaGen,
  hidden from attention on the left of the text, with a fixed table of features as the null caption.

Shapes: B images, P prefix tokens, D width, W words, T text tokens, F width of text features.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORD = re.compile(r"\w+:?|[^\w\s\x00-\x7f]")  # a style prefix ("noto:") keeps its colon; symbols beyond ASCII are words
_MAX_WORDS, _MAX_PIECES = 64, 16
NULL = -1


@dataclass(frozen=True)
class Condition:
    """Conditions of B images, as tensors.

    labels: [B] int64 class, -1 is the null class; None where the generator has no classes.
    words: [B, W, 16] int64 table rows of each word's pieces, -1 in the padding; None unless captions are hashed. No word: null caption.
    features, mask: [B, T, F] float and [B, T] bool, of a text model; None unless there is one. Nothing in the mask: null caption.
    absent: [B] bool, where the caption is null although the mask stays; None unless the padding is hidden from attention. LlamaGen's null
    caption hides what the padding of the caption in its place would hide.
    """

    labels: Tensor | None = None
    words: Tensor | None = None
    features: Tensor | None = None
    mask: Tensor | None = None
    absent: Tensor | None = None

    def _map(self, function) -> "Condition":
        return Condition(**{f.name: None if getattr(self, f.name) is None else function(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str) -> "Condition":
        """The same conditions on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        """The conditions of some of the images."""
        return self._map(lambda tensor: tensor[rows])

    def drop(self, classes: Tensor, captions: Tensor) -> "Condition":
        """Null classes and null captions where these [B] bool are True; they may be on any device."""
        out = self
        if self.labels is not None:
            out = replace(out, labels=self.labels.masked_fill(classes.to(self.labels.device), NULL))
        if self.words is not None:
            out = replace(out, words=self.words.masked_fill(captions.to(self.words.device)[:, None, None], NULL))
        if self.absent is not None:
            out = replace(out, absent=self.absent | captions.to(self.absent.device))
        elif self.mask is not None:
            out = replace(out, mask=self.mask & ~captions.to(self.mask.device)[:, None])
        return out

    def null(self) -> "Condition":
        """Null conditions of the same shape."""
        every = next((torch.ones(len(t), dtype=torch.bool) for t in (self.labels, self.words, self.mask) if t is not None), None)
        return self if every is None else self.drop(every, every)

    def and_null(self) -> "Condition":
        """These conditions, then as many null ones: the doubled batch of guidance, [2B]."""
        empty = self.null()
        both = {f.name: (getattr(self, f.name), getattr(empty, f.name)) for f in fields(self)}
        return Condition(**{name: None if pair[0] is None else torch.cat(pair) for name, pair in both.items()})


def fnv1a(text: str) -> int:
    """64-bit FNV-1a of the UTF-8 bytes: the same on every machine and in every process, unlike Python's hash."""
    value = 0xCBF29CE484222325
    for byte in text.encode("utf-8", "surrogatepass"):
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


@functools.lru_cache(maxsize=65536)
def _pieces(word: str, buckets: int) -> tuple[int, ...]:
    """Table rows of a word: the word itself, then its character trigrams, boundaries included; padded with -1 to 16."""
    framed = f"<{word}>"
    texts = [f"word {word}", *(f"tri {framed[i : i + 3]}" for i in range(len(framed) - 2))][:_MAX_PIECES]
    return (*(fnv1a(text) % buckets for text in texts), *[NULL] * (_MAX_PIECES - len(texts)))


def split_words(caption: str) -> list[str]:
    """Lower-cased words of a caption, at most 64; a style prefix keeps its colon."""
    return _WORD.findall(caption.lower())[:_MAX_WORDS]


def hash_captions(captions: Sequence[str], *, buckets: int, min_words: int) -> Tensor:
    """words [B, W, 16] int64 as in Condition; W is the longest caption, at least min_words."""
    rows = [[_pieces(word, buckets) for word in split_words(caption)] for caption in captions]
    W = max([min_words, *map(len, rows)])
    empty = (NULL,) * _MAX_PIECES
    return torch.tensor([row + [empty] * (W - len(row)) for row in rows], dtype=torch.int64).view(len(rows), W, _MAX_PIECES)


class ClassTokens(nn.Module):
    """One token a class; the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes, self.num_tokens = num_classes, 1
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """labels: [B] int64, -1 for none. Returns [B, 1, D]."""
        return self.table(torch.where(labels < 0, self.num_classes, labels))[:, None]


class CaptionTokens(nn.Module):
    """What both kinds of captions share: slots with positions, a padding vector, a null caption."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.positions = nn.Parameter(torch.empty(num_tokens, width).normal_(std=0.02))
        self.padding = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.null = nn.Parameter(torch.empty(num_tokens, width).normal_(std=0.02))

    def fill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Padding where mask [B, P] is False, the null caption where a whole row of it is; tokens: [B, P, D]."""
        tokens = torch.where(mask[..., None], tokens, self.padding) + self.positions
        return torch.where(mask.any(1)[:, None, None], tokens, self.null)


class HashedCaption(CaptionTokens):
    """The bag of all words, then the first words one by one.

    word = sum of its pieces' rows / sqrt(number of pieces);  bag = sum of words / sqrt(number of words)
    """

    def __init__(self, num_words: int, buckets: int, width: int):
        super().__init__(1 + num_words, width)
        self.table = nn.Embedding(buckets, width)

    def forward(self, words: Tensor) -> Tensor:
        """words: [B, W, 16] as in Condition. Returns [B, 1 + num_words, D]."""
        known = words >= 0
        rows = self.table(words.clamp(min=0)) * known[..., None]
        each = rows.sum(2) / known.sum(2).clamp(min=1).sqrt()[..., None]  # [B, W, D]
        mask = known.any(2)
        bag = each.sum(1, keepdim=True) / mask.sum(1).clamp(min=1).sqrt()[:, None, None]
        n = self.num_tokens - 1
        return self.fill(torch.cat([bag, each[:, :n]], 1), torch.cat([mask.any(1, keepdim=True), mask[:, :n]], 1))


class ProjectedCaption(CaptionTokens):
    """The hidden states of a text model through an MLP."""

    def __init__(self, num_tokens: int, features: int, width: int):
        super().__init__(num_tokens, width)
        self.mlp = nn.Sequential(nn.Linear(features, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features: [B, T, F]. mask: [B, T] bool. T is num_tokens. Returns [B, T, D]."""
        return self.fill(self.mlp(features.to(self.positions.dtype)), mask)


class MaskedCaption(nn.Module):
    """LlamaGen's captions: features through an MLP, nothing added; the null caption is a fixed random table of features."""

    def __init__(self, num_tokens: int, features: int, width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.register_buffer("null", torch.randn(num_tokens, features) / features**0.5)
        self.mlp = nn.Sequential(nn.Linear(features, width, bias=False), nn.GELU("tanh"), nn.Linear(width, width, bias=False))

    def forward(self, features: Tensor, absent: Tensor) -> Tensor:
        """features: [B, T, F]. absent: [B] bool, rows with the null caption. T is num_tokens. Returns [B, T, D]."""
        return self.mlp(torch.where(absent[:, None, None], self.null, features.to(self.null.dtype)))


def align_right(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Captions with their padding moved to the left and set to zero: (features [B, T, F], mask [B, T], absent [B]).

    A caption without text is absent; its mask is all True, so that the whole null table is seen.
    """
    mask = mask.bool()
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    features = (features * mask[..., None]).gather(1, order[..., None].expand_as(features))
    absent = ~mask.any(1)
    return features, mask.gather(1, order) | absent[:, None], absent


class ConditionPrefix(nn.Module):
    """Condition -> prefix tokens [B, P, D]; see the file's head."""

    def __init__(
        self,
        *,
        width: int,
        num_classes: int,
        text: str,
        caption_tokens: int,
        caption_width: int,
        caption_buckets: int,
        caption_padding: str = "learned",
    ):
        super().__init__()
        self.classes = ClassTokens(num_classes, width) if num_classes else None
        self.caption: nn.Module | None = None
        if text == "hash":
            self.caption = HashedCaption(caption_tokens, caption_buckets, width)
        elif text != "none":
            kind = MaskedCaption if caption_padding == "hidden" else ProjectedCaption
            self.caption = kind(caption_tokens, caption_width, width)
        parts = [part for part in (self.classes, self.caption) if part is not None]
        self.num_tokens = sum(part.num_tokens for part in parts) or 1
        self.start = None if parts else nn.Parameter(torch.empty(width).normal_(std=0.02))

    def forward(self, condition: Condition, batch_size: int) -> Tensor:
        """[B, P, D]."""
        if self.start is not None:
            return self.start.expand(batch_size, 1, -1)
        parts = [] if self.classes is None else [self.classes(condition.labels)]
        if isinstance(self.caption, HashedCaption):
            parts.append(self.caption(condition.words))
        elif isinstance(self.caption, MaskedCaption):
            parts.append(self.caption(condition.features, condition.absent))
        elif self.caption is not None:
            parts.append(self.caption(condition.features, condition.mask))
        return torch.cat(parts, dim=1)

    def visible(self, condition: Condition) -> Tensor | None:
        """[B, P] bool: prefix tokens that others may attend to; None where all may be."""
        if not isinstance(self.caption, MaskedCaption):
            return None
        return condition.mask if self.classes is None else F.pad(condition.mask, (1, 0), value=True)


class TextEncoder:
    """A frozen transformers text model: captions to hidden states.

    source: folder or hub id; only safetensors weights are opened and no code from the source is run.
    num_tokens: T; longer captions are cut, shorter ones padded on the right.
    """

    def __init__(self, source: str, num_tokens: int, *, device: torch.device | str = "cpu"):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError(f"captions through {source!r} need transformers: pip install vistok[train]") from error
        self.num_tokens = num_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, padding_side="right")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
        part = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model)
        self.model = part.to(device, torch.float32).eval().requires_grad_(False)
        config = getattr(model.config, "text_config", None) or model.config
        self.width = config.hidden_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """features [B, T, F] float32, zero in the padding, and mask [B, T] bool; an empty caption has an empty mask."""
        device = next(self.model.parameters()).device
        lengths = dict(padding="max_length", truncation=True, max_length=self.num_tokens)
        batch = self.tokenizer(list(captions), **lengths, return_tensors="pt").to(device)
        mask = batch["attention_mask"].bool()
        features = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = mask & torch.tensor([bool(caption.strip()) for caption in captions], device=device)[:, None]
        return features * mask[..., None], mask


def make_condition(
    config,
    batch_size: int,
    *,
    labels: Tensor | Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    features: tuple[Tensor, Tensor] | None = None,
) -> Condition:
    """Conditions of B images for a generator with this config (classes and captions named as in GPTConfig), on the CPU.

    Arguments and errors are those of `GPT.make_condition`.
    """
    if labels is not None:
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if not config.num_classes and bool((labels >= 0).any()):
            raise ValueError("labels are given but this generator has no classes (num_classes=0)")
        if bool(((labels < NULL) | (labels >= max(config.num_classes, 1))).any()):
            raise ValueError(f"labels must be in [0, {config.num_classes}) or -1, got {int(labels.min())} to {int(labels.max())}")
    if captions is not None and config.text == "none" and any(captions):
        raise ValueError('captions are given but this generator reads none (text="none")')
    made = Condition()
    if config.num_classes:
        made = replace(made, labels=torch.full((batch_size,), NULL) if labels is None else labels)
    if config.text == "hash":
        texts = [""] * batch_size if captions is None else captions
        made = replace(made, words=hash_captions(texts, buckets=config.caption_buckets, min_words=config.caption_tokens))
    elif config.text != "none":
        if features is None and captions is not None and any(captions):
            raise ValueError(f"this generator reads captions through {config.text!r}: pass features of it (TextEncoder)")
        shape = (batch_size, config.caption_tokens)
        features = features or (torch.zeros(*shape, config.caption_width), torch.zeros(shape, dtype=torch.bool))
        if config.caption_padding == "hidden":
            features = align_right(*features)
        made = replace(made, **dict(zip(("features", "mask", "absent"), features)))
    return made


def class_condition(
    batch_size: int, num_classes: int, device: torch.device, *, labels: Tensor | Sequence[int] | None, captions=None, features=None
) -> Condition:
    """Conditions of B images for a generator that knows classes alone: labels [B], -1 (the null class) for none; all none without them.

    Raises ValueError: a label is no class, or captions are given.
    """
    if features is not None or (captions is not None and any(captions)):
        raise ValueError("captions are given but this generator reads none")
    labels = torch.full((batch_size,), NULL) if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    if bool(((labels < NULL) | (labels >= num_classes)).any()):
        raise ValueError(f"labels must be in [0, {num_classes}) or -1, got {int(labels.min())} to {int(labels.max())}")
    return Condition(labels=labels.to(device))


def check_classes(classes: Sequence[str], num_classes: int) -> None:
    """Raises ValueError: there are names, but not one of its own for each class."""
    if classes and len(classes) != num_classes:
        raise ValueError(f"{len(classes)} class names for num_classes={num_classes}")
    if len(set(classes)) != len(classes):
        raise ValueError("two classes have the same name")
