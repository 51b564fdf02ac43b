"""MaskGIT: all tokens are guessed at once, the surest are kept, and the rest are guessed again.

Chang et al. 2022, arXiv 2202.04200, section 3; the network is BERT (arXiv 1810.04805), as TiTok (arXiv 2406.07550) has it.

    network    [class, tokens or mask ids] + positions -> post-norm blocks -> logits [B, N, K]
    loss       weighted mean of -log p(id): 1 on masked tokens, unmasked_weight on the known ones

Sampling is `vistok.decoding.parallel`. B images, N tokens, K codes, C classes. Rows of the table: K codes, the mask, C classes, no class.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.classes import ClassConditioned, LayoutConfig, check_least
from vistok.generators.condition import Condition
from vistok.layers.transformer import TransformerBlock
from vistok.modeling import VisualModel
from vistok.registry import register

NORM_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(LayoutConfig):
    """Shape of the network, and how it samples."""

    layout_kind: str = "sequence"
    layout_shape: tuple[int, ...] = (32,)
    num_classes: int = 0
    num_steps: int = 8
    """S: passes of a sampling run where the caller does not say."""
    noise: float = 2.0
    """Gumbel noise at the start of a sampling run where the caller does not say."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, num_steps=1, noise=0)


@register
class MaskGIT(ClassConditioned, VisualModel):
    """A bidirectional transformer that fills masked tokens."""

    Config = MaskGITConfig

    def __init__(self, config: MaskGITConfig):
        super().__init__(config)
        self.layout, self.vocab_size = config.layout, config.codebook_size
        self.max_tokens = self.layout.num_tokens
        self.mask_id = config.codebook_size
        width = config.width
        self.embedding = nn.Embedding(config.codebook_size + config.num_classes + 2, width)
        self.positions = nn.Parameter(torch.empty(1 + self.max_tokens, width))  # class first
        self.segments = nn.Parameter(torch.empty(2, width))  # BERT's token types: only the first is ever used
        self.norm_in = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, hidden=config.hidden, norm_eps=NORM_EPS, post_norm=True) for _ in range(config.depth)
        )
        self.head = nn.Linear(width, config.codebook_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.segments, std=0.02)

    def forward(self, ids: Tensor, condition: Condition | None = None) -> Tensor:
        """Logits [B, N, K] of every token, of ids [B, N] in [0, K], K for a masked one. condition: of the B images; None: null."""
        if ids.shape[1] != self.max_tokens:
            raise ValueError(f"this generator reads {self.max_tokens} tokens an image, got {ids.shape[1]}")
        labels = (condition or self.make_condition(len(ids))).labels
        K, C = self.vocab_size, self.settings.num_classes
        row = torch.where(labels < 0, C, labels) + K + 1
        x = self.embedding(torch.cat([row[:, None], ids], dim=1)) + self.positions + self.segments[0]
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 1:])

    def num_masked(self, step: int, num_steps: int) -> int:
        """Tokens still masked after a step of S: floor(N arccos((s + 1) / S) / (pi/2))."""
        return math.floor(self.max_tokens * math.acos((step + 1) / num_steps) / (math.pi / 2))

    def masked_after(self, num_steps: int) -> tuple[int, ...]:
        """Tokens masked after each step of a run from nothing: `num_masked`, and at least one fewer than before the step."""
        left, counts = self.max_tokens, []
        for step in range(num_steps):
            left = max(min(self.num_masked(step, num_steps), left - 1), 0)
            counts.append(left)
        return tuple(counts)

    def step_sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that each step of a sampling run settles. Raises ValueError: num_tokens is not N, and there is no shorter image."""
        if num_tokens != self.max_tokens:
            raise ValueError(f"num_tokens={num_tokens} but this generator makes exactly {self.max_tokens} tokens")
        S = min(self.settings.num_steps, num_tokens)
        left = self.masked_after(S)
        return tuple(before - after for before, after in zip((num_tokens, *left), left))

    def masked_loss(
        self,
        ids: Tensor,
        condition: Condition,
        uniforms: Tensor,
        *,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training loss, cross-entropy on the masked tokens alone and without smoothing, and their accuracy: scalars.

        ids: [B, N]. uniforms: [B, N + 1] on [0, 1): one gives an image's masked share arccos(u) / (pi/2), at least one token; the others
        the order in which tokens are masked.
        """
        B, N = ids.shape
        counts = (uniforms[:, 0].acos() / (math.pi / 2) * N).round().clamp(min=1)
        is_masked = uniforms[:, 1:].argsort(1).argsort(1) < counts[:, None]
        log_p = F.log_softmax(self(ids.masked_fill(is_masked, self.mask_id), condition).float(), dim=-1)
        plain = -log_p.gather(-1, ids[..., None])[..., 0]
        smooth = (1 - label_smoothing) * plain - label_smoothing * log_p.mean(-1)
        weights = torch.where(is_masked, 1.0, unmasked_weight)
        share = is_masked / counts[:, None] / B  # a mean over images of means over their masked tokens
        accuracy = ((log_p.argmax(-1) == ids) * share).sum()
        return ((smooth * weights).sum(1) / weights.sum(1)).mean(), (plain * share).sum(), accuracy


@register
def maskgit_tiny(**overrides) -> MaskGIT:
    """The smallest that still works; for tests and tours."""
    base = MaskGITConfig(codebook_size=256, layout_shape=(16,), width=64, depth=2, num_heads=2, hidden=128)
    return MaskGIT(replace(base, **overrides))


@register
def maskgit_titok_l32(**overrides) -> MaskGIT:
    """The generator of TiTok-L-32: 24 layers of 768 over 32 tokens of 4,096 codes, 1,000 classes."""
    return MaskGIT(replace(MaskGITConfig(codebook_size=4096, num_classes=1000), **overrides))
