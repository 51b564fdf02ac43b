"""The parts of LaVIT's dynamic tokenizer: selector, merger, feature decoder, the two kinds of diffusion conditioning, pixel decoder.

Jin et al. 2024, arXiv 2309.04669, section 3.1.

    selector   log p(keep, drop | patch) from the patch and the mean of all patches
    merger     self-attention   patch u sees v  iff  v <= u and (v is kept or v = u)
               cross-attention  patch u sees v  iff  v is dropped; keys are the untouched patches, all seen alike if none is dropped
    decoder    one learned query a patch reads the codes; their places in the image are not given, only their order

B images, N patches, M rows of a ragged batch, D width, d code width, h heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.attention import Attention, CrossAttention
from vistok.layers.conv import ResBlock
from vistok.layers.mlp import MLP

NO_WEIGHT = 1e-30  # stands for epsilon 0: defined where nothing may be seen, without effect elsewhere
PADDING_LOGIT = -10000.0


def kept_rows(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept patches are: rows [B, M] int64, kept positions in order, then others up to the longest; and counts [B] int64.

    keep: [B, N] bool.
    """
    counts = keep.sum(1)
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
    return order[:, : max(1, int(counts.max()))], counts


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, N, D] at rows [B, M] -> [B, M, D]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


class Selector(nn.Module):
    """Log-probabilities [B, N, 2] of keeping (index 0) and dropping each patch."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(), nn.Linear(width // 4, 2)
        )

    def forward(self, patches: Tensor) -> Tensor:
        local, shared = F.gelu(self.mix(self.norm(patches))).chunk(2, dim=-1)
        x = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
        return self.head(x).float().log_softmax(-1)


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor, eps: float) -> Tensor:
    """Attention whose weights are scaled by how far each key is allowed, float32 inside.

    a = exp(s - max_v s) allow;  weights = (a + eps/N) / (sum_v a + eps)

    q: [B, h, M, d]; k, v: [B, h, N, d]; allow: [0, 1], broadcastable to [B, h, M, N]; gradients flow into it. Returns [B, M, h d].
    """
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    a = (scores - scores.amax(-1, keepdim=True)).exp() * allow
    weights = (a + eps / a.shape[-1]) / (a.sum(-1, keepdim=True) + eps)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, T, parts D] -> `parts` tensors [B, h, T, d]."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class ReadingBlock(nn.Module):
    """Parts of a block that looks at itself, then at something else, then feeds forward; each after a norm."""

    def __init__(self, width: int, num_heads: int, hidden: int, norm_eps: float):
        super().__init__()
        self.self_norm = nn.LayerNorm(width, eps=norm_eps)
        self.self_attention = Attention(width, num_heads, bias=True)
        self.cross_norm = nn.LayerNorm(width, eps=norm_eps)
        self.cross_attention = CrossAttention(width, width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden)


class MergerBlock(ReadingBlock):
    """x += self(x); x += cross(x, origin); x += mlp(x), each after a norm."""

    def forward(self, x: Tensor, origin: Tensor, allow_self: Tensor, allow_cross: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """All patches x [B, N, D], or, for the last block, only those of rows [B, M]; allow_self is [B, 1, M or N, N]."""
        attention = self.self_attention
        q, k, v = _heads(attention.qkv(self.self_norm(x)), attention.num_heads, 3)
        if rows is not None:
            x = gather_rows(x, rows)
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        x = x + attention.proj(weighted_attention(q, k, v, allow_self, eps))
        return self._rest(x, origin, allow_cross, eps)

    def forward_compact(self, x: Tensor, origin: Tensor, allow_cross: Tensor, eps: float) -> Tensor:
        """Kept patches alone, [B, M, D], padding behind them: what `forward` gives them where eps has no weight."""
        x = x + self.self_attention(self.self_norm(x), is_causal=True)
        return self._rest(x, origin, allow_cross, eps)

    def _rest(self, x: Tensor, origin: Tensor, allow_cross: Tensor, eps: float) -> Tensor:
        attention = self.cross_attention
        (q,) = _heads(attention.query(self.cross_norm(x)), attention.num_heads, 1)
        k, v = _heads(attention.key_value(origin), attention.num_heads, 2)
        x = x + attention.proj(weighted_attention(q, k, v, allow_cross, eps))
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """Kept patches take in what the dropped ones held.

    eps: the share of attention spread over all patches (see weighted_attention). 0: dropped patches then have no part in the
    self-attention of kept ones, so `kept` does not compute them at all.
    """

    def __init__(self, width: int, depth: int, num_heads: int, hidden: int, *, norm_eps: float, eps: float):
        super().__init__()
        self.eps = eps
        self.origin_norm = nn.LayerNorm(width, eps=norm_eps)
        self.blocks = nn.ModuleList(MergerBlock(width, num_heads, hidden, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def _allow(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, N, N] for self-attention, [B, 1, 1, N] for cross-attention, of keep [B, N] float."""
        N = keep.shape[1]
        itself = torch.eye(N, device=keep.device)
        allow = torch.tril(keep.float()[:, None, None, :] * (1 - itself) + itself)
        return allow, (1 - keep.float())[:, None, None, :]

    def forward(self, patches: Tensor, keep: Tensor) -> Tensor:
        """All patches [B, N, D] -> [B, N, D], of which the kept are of use; keep: [B, N], 1 or 0, with gradients in training."""
        allow_self, allow_cross = self._allow(keep)
        origin, x = self.origin_norm(patches), patches
        for block in self.blocks:
            x = block(x, origin, allow_self, allow_cross, self.eps or NO_WEIGHT)
        return self.norm(x)

    def kept(self, patches: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The kept rows of `forward`, left-aligned [B, M, D] (arbitrary beyond an image's count), and counts [B].

        keep: [B, N] bool. With eps > 0 every row is needed as a key until the last block, which computes kept rows only.
        """
        rows, counts = kept_rows(keep)
        origin, allow_cross = self.origin_norm(patches), (~keep).float()[:, None, None, :]
        if not self.eps:
            x = gather_rows(patches, rows)
            for block in self.blocks:
                x = block.forward_compact(x, origin, allow_cross, NO_WEIGHT)
            return self.norm(x), counts
        allow_self, x = self._allow(keep)[0], patches
        for block in self.blocks[:-1]:
            x = block(x, origin, allow_self, allow_cross, self.eps)
        allow_rows = allow_self.gather(2, rows[:, None, :, None].expand(-1, -1, -1, keep.shape[1]))
        return self.norm(self.blocks[-1](x, origin, allow_rows, allow_cross, self.eps, rows)), counts


class DecoderBlock(ReadingBlock):
    """Queries see each other, then the codes, then a feed-forward layer; each after a norm."""

    def forward(self, x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attention(self.self_norm(x))
        x = x + self.cross_attention(self.cross_norm(x), codes, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class FeatureDecoder(nn.Module):
    """Codes of any number to the features of all N patches."""

    def __init__(self, *, num_patches: int, code_dim: int, width: int, depth: int, num_heads: int, hidden: int, out: int, norm_eps: float):
        super().__init__()
        self.from_codes = nn.Linear(code_dim, width)
        self.positions = nn.Parameter(torch.empty(num_patches, width).normal_(std=0.02))
        self.queries = nn.Parameter(torch.empty(num_patches, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads, hidden, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

    def forward(self, codes: Tensor, counts: Tensor) -> Tensor:
        """codes: [B, M, d], of which the first counts [B] are read. Returns [B, N, out]."""
        valid = torch.arange(codes.shape[1], device=codes.device) < counts[:, None]
        y = self.from_codes(codes.to(self.positions.dtype)) * valid[..., None] + self.positions[: codes.shape[1]]
        mask = ((~valid).to(y.dtype) * PADDING_LOGIT)[:, None, None, :]
        x = self.queries.expand(len(codes), -1, -1)
        for block in self.blocks:
            x = block(x, y, mask)
        return self.head(self.norm(x))


class AttentionPool(nn.Module):
    """One vector [B, out] of tokens [B, N, D]: their mean asks, mean and tokens answer (CLIP's pooling, arXiv 2103.00020)."""

    def __init__(self, num_tokens: int, width: int, num_heads: int, out: int):
        super().__init__()
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.empty(1 + num_tokens, width).normal_(std=width**-0.5))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions
        q, k, v = _heads(self.qkv(x), self.num_heads, 3)
        return self.proj(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))


class Conditioning(nn.Module):
    """Features [B, N, C] as the conditioning of a diffusion model.

    sizes: (width,) for one text encoder (SD 1.5, "lowres"); (width 1, width 2) for two and a pooled vector of width 2 (SDXL, "highres").
    """

    def __init__(self, num_patches: int, width: int, sizes: tuple[int, ...], pool_heads: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.pool = AttentionPool(num_patches, width, pool_heads, sizes[1]) if len(sizes) == 2 else None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prompt embeddings [B, N, sum of sizes] and the pooled vector [B, sizes[1]], None where there is one size."""
        embeddings = torch.cat([project(features) for project in self.projections], dim=-1)
        return embeddings, None if self.pool is None else self.pool(features)


class PixelDecoder(nn.Module):
    """A small convolutional network from patch features to pixels; ours, not the paper's, which leaves pixels to a diffusion model."""

    def __init__(self, *, grid: tuple[int, int], patch_size: int, in_width: int, width: int, depth: int):
        super().__init__()
        self.grid = grid
        self.proj = nn.Linear(in_width, width)
        self.net = nn.Sequential(
            *(ResBlock(width) for _ in range(depth)),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 3 * patch_size**2, 3, padding=1),
            nn.PixelShuffle(patch_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, in_width] -> [B, 3, H, W], unclamped."""
        return self.net(self.proj(features).transpose(1, 2).unflatten(2, self.grid))
