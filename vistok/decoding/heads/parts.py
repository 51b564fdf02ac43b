"""What heads share: one decoder layer over pairs of vectors at the places of an image's tokens, a residual block, and where to begin.

B rows, T positions, D width of the target, K codebook size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.attention import Attention
from vistok.layers.kv_cache import KVCache
from vistok.layers.mlp import SwiGLU
from vistok.layers.placement import PlacedCache, Placement
from vistok.layers.rope import rope_table, rotate
from vistok.tokens import TokenLayout


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Shape of a head's decoder layer."""

    width: int = 192
    """D of the target."""
    num_heads: int = 6
    """Attention heads."""
    hidden_width: int = 512
    """Width inside the feed-forward layer."""
    layout_kind: Literal["grid", "sequence"] = "grid"
    """Where the target's tokens sit."""
    layout_shape: tuple[int, ...] = (8, 8)
    """(h, w) of a grid, (N,) of a sequence."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""

    def __post_init__(self):
        object.__setattr__(self, "layout_shape", tuple(self.layout_shape))
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 4 for each of {self.num_heads} heads: positions are rotary")
        if self.hidden_width < 1:
            raise ValueError(f"hidden_width must be at least 1, got {self.hidden_width}")


def layer_fields(target) -> dict:
    """Fields of LayerConfig that suit a target: a layer like its own."""
    config = target.settings
    return dict(
        width=config.width,
        num_heads=config.num_heads,
        hidden_width=config.hidden_width,
        layout_kind=target.layout.kind,
        layout_shape=target.layout.shape,
        norm_eps=config.norm_eps,
    )


class PairLayer(nn.Module):
    """One decoder layer over pairs of vectors.

    x = fc [a ; b];  x = x + attention(rmsnorm(x));  x = x + swiglu(rmsnorm(x))
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.width, config.width, bias=False)
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.num_heads)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden_width)
        cells = torch.arange(TokenLayout(config.layout_kind, config.layout_shape).num_tokens)
        if config.layout_kind == "grid":
            cells = torch.stack([cells // config.layout_shape[1], cells % config.layout_shape[1]], 1)
        else:
            cells = torch.stack([cells, torch.zeros_like(cells)], 1)
        self.register_buffer("rotations", rope_table(cells, config.width // config.num_heads), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():  # it starts by handing its first input through
            self.fc.weight[:, : config.width] += torch.eye(config.width)

    def forward(self, a: Tensor, b: Tensor, *, placement: Placement | None = None, cache: PlacedCache | None = None) -> Tensor:
        """[B, T, D] of pairs a, b [B, T, D]: all positions from the first on, causally; or where the placement says, behind the cache."""
        x = self.fc(torch.cat([a, b], dim=-1))
        if placement is None:
            rows, where = self.rotations[: x.shape[1]], dict(is_causal=True)
        else:
            rows = self.rotations[placement.positions.clamp(max=len(self.rotations) - 1)][:, None]
            where = dict(mask=placement.mask, cache=cache.layer(0, placement))
        x = x + self.attention(self.attention_norm(x), rotate=lambda q: rotate(q, rows), **where)
        return x + self.mlp(self.mlp_norm(x))

    def new_cache(self, batch_size: int, max_length: int) -> PlacedCache:
        """An empty cache of this layer."""
        config, weight = self.config, self.fc.weight
        return PlacedCache(
            KVCache(
                num_layers=1,
                batch_size=batch_size,
                num_heads=config.num_heads,
                max_length=max_length,
                head_width=config.width // config.num_heads,
                device=weight.device,
                dtype=weight.dtype,
            )
        )


class ResidualBlock(nn.Module):
    """x + silu(linear x), the identity at the start (Medusa, arXiv 2401.10774, section 2.1.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], returns the same shape."""
        return x + F.silu(self.linear(x))


def output_weight(target) -> Tensor:
    """The matrix [K, D] that makes the target's logits. Raises ValueError: its output layer is more than a matrix."""
    head = target.head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{type(target).__name__} has no plain output matrix, which a drafting head starts from")
    return head.weight.detach()


def check_fits(head: nn.Module, target) -> None:
    """Raises ValueError: the head was made for a target of another shape."""
    config, own = head.settings, target.settings
    pairs = [("width", config.width, own.width)]
    if hasattr(config, "codebook_size"):
        pairs.append(("codebook_size", config.codebook_size, target.vocab_size))
    if hasattr(config, "layout_kind"):
        pairs.append(("layout", TokenLayout(config.layout_kind, config.layout_shape), target.layout))
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ValueError(f"this {type(head).__name__} was trained for a target of {name} {mine}, the generator has {theirs}")
