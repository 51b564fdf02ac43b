"""What pruning inside the language model remembers: of a cache, which token sits in each slot; of a forward, which tokens are left.

A segment is the layers between two stages. B prompts, Q tokens of a forward, K of them left.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEDGER = "_vistok_ledger"


@dataclass
class Segment:
    """The slots of the caches of the layers between two stages."""

    columns: list = field(default_factory=list)
    """The token of the conversation in each slot, to be joined: [B, n] int64 with -1 for padding, or (first, n) for a run of tokens."""
    is_clean: bool = True
    """No slot is padding, so a single query sees everything."""

    def joined(self, B: int, device) -> Tensor:
        """[B, slots] int64."""
        runs = [x if isinstance(x, Tensor) else torch.arange(x[0], x[0] + x[1], device=device).expand(B, -1) for x in self.columns]
        self.columns = [torch.cat(runs, dim=1)]
        return self.columns[0]


@dataclass
class Ledger:
    """What a cache holds."""

    layers: tuple[int, ...]
    """Of the stages."""
    segments: list[Segment]
    length: int = 0
    """Tokens of the conversation so far, dropped ones and padding included: the length of the first layer's cache."""
    has_dropped: bool = False
    """Whether any token was ever dropped; until then the model needs no help."""
    since_stage: int = 0
    """Tokens since the last forward that dropped any: these can be taken back."""


@dataclass
class Forward:
    """One forward through the language model."""

    B: int
    Q: int
    is_visual: Tensor
    is_valid: Tensor
    all_valid: bool
    embeddings: Tensor
    ledger: Ledger | None
    drops_tokens: bool
    rows: Tensor | None = None
    """[B, K] int64 into the Q tokens, -1 for filling; None while all are there."""
    has_filling: bool = False
    segment: int = 0
    columns: dict = field(default_factory=dict)
    """(rows [B, K], which are real [B, K], whether all are) by segment."""
    masks: dict = field(default_factory=dict)
    """By segment and window."""
    rotary: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)
    dropped: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    lengths: list = field(default_factory=list)

    @property
    def has_past(self) -> bool:
        return self.ledger is not None and self.ledger.length > 0

    @property
    def is_untouched(self) -> bool:
        """Nothing has left, now or before: the layers run as they would without us."""
        return self.rows is None and not (self.ledger is not None and self.ledger.has_dropped)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """([B, K] int64: the tokens that are here, -1 for filling; [B, K] bool: those that are no padding)."""
        if self.rows is None:
            return torch.arange(self.Q, device=self.is_valid.device).expand(self.B, self.Q), self.is_valid
        return self.rows, (self.rows >= 0) & self.is_valid.gather(1, self.rows.clamp(min=0))


def new_ledger(cache, layers: tuple[int, ...]) -> Ledger:
    """An empty ledger, on the cache from now on."""
    ledger = Ledger(layers, [Segment() for _ in layers])
    setattr(cache, _LEDGER, ledger)
    return ledger


def ledger_of(cache, layers: tuple[int, ...], B: int, device) -> Ledger | None:
    """The ledger of a cache, a new one if it is empty, in step with what was taken back from it; None without a cache.

    Raises ValueError: the cache is static, was not made by a model pruned before these layers, or was changed in ways that are not known.
    """
    if cache is None:
        return None
    if getattr(cache, "is_compileable", False):
        raise ValueError("a static cache keeps every layer at full length, where nothing is saved: use the dynamic cache inside the model")
    length, ledger = cache.get_seq_length(), getattr(cache, _LEDGER, None)
    if length == 0:
        return new_ledger(cache, layers)
    if ledger is None or ledger.layers != layers:
        made = "not made by the pruned model" if ledger is None else f"made with stages before layers {ledger.layers}, not {layers}"
        raise ValueError(f"this cache was {made}: start the conversation inside `with vistok.prune(...)`")
    surplus = ledger.length - length
    if surplus > 0:  # cropped, as assisted decoding does with rejected tokens
        if surplus > ledger.since_stage:
            raise ValueError(f"the cache was cropped by {surplus} tokens, into the prompt whose tokens are dropped: that cannot be undone")
        for segment in ledger.segments:
            segment.columns = [segment.joined(B, device)[:, :-surplus]]
        ledger.length, ledger.since_stage = length, ledger.since_stage - surplus
    recorded = next((x for x in ledger.segments[-1].columns if isinstance(x, Tensor)), None)
    if surplus < 0 or recorded is not None and recorded.shape[0] != B:
        raise ValueError("the cache was changed outside the pruned model: its layers hold other tokens than were recorded")
    return ledger
