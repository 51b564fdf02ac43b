"""Residual quantization: each level quantizes what the levels above left over.

Lee et al. 2022, arXiv 2203.01941, section 3.1.

    r_1 = z;   id_l, q_l = quantize_l(r_l);   r_(l+1) = r_l - sg(q_l)
    codes = z + sg(sum_l q_l - z)                 one straight-through for the sum: its gradient reaches z once, not once a level
    loss  = mean over levels of quantize_l's

B images, L levels, d channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.vq import VQ, VQConfig


@dataclass(frozen=True, kw_only=True)
class ResidualVQConfig:
    """Shape of a residual quantizer."""

    num_levels: int = 4
    """L."""
    vq: VQConfig = field(default_factory=VQConfig)
    """Each level's codebook."""
    shared: bool = False
    """One codebook for all levels."""

    def __post_init__(self):
        if self.num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {self.num_levels}")


class ResidualVQ(nn.Module):
    """Several VQ in a row. ids have one more axis than VQ's, the levels, coarse first; -1 marks a level that was left out."""

    def __init__(self, config: ResidualVQConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.code_dim = config.vq.codebook_size, config.vq.code_dim
        self.levels = nn.ModuleList(VQ(config.vq) for _ in range(1 if config.shared else config.num_levels))

    def forward(self, z: Tensor, *, depths: Tensor | None = None) -> QuantizerOutput:
        """Quantize z [B, ..., d] float -> codes [B, ..., d] in z.dtype, ids [B, ..., L] int64.

        depths: [B] levels each image gets, 1 to L, for training with quantizer dropout; all L by default.
        In training mode the codebooks move once, after all levels.
        """
        with torch.autocast(z.device.type, enabled=False):
            residual, total = z.float(), torch.zeros_like(z, dtype=torch.float32)
            ids = torch.full((*z.shape[:-1], self.config.num_levels), -1, device=z.device)
            seen, parts = [], []
            for number in range(self.config.num_levels):
                level = self._level(number)
                kept = slice(None) if depths is None else depths.to(z.device) > number
                rows = residual[kept]
                if self.training and not (self.config.shared and number):
                    level.start(rows)
                out = level.quantize(rows)
                seen.append((rows, out.ids))
                if out.ids.numel():  # a level that no image reaches has no mean
                    parts.append(out.terms)
                ids[kept, ..., number] = out.ids
                step = torch.zeros_like(total)
                step[kept] = level.decode(out.ids).detach()
                total, residual = total + step, residual - step
            if self.training:
                self._observe(seen)
            terms = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]} if parts else {}
            codes = z.float() + (total - z.float()).detach()
        return QuantizerOutput(codes=codes.to(z.dtype), ids=ids, loss=sum(terms.values(), z.new_zeros(())), terms=terms)

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., d] float32 of ids [..., L'], the first L' <= L levels; -1 adds nothing."""
        if not 1 <= ids.shape[-1] <= self.config.num_levels:
            raise ValueError(f"ids have {ids.shape[-1]} levels, this quantizer {self.config.num_levels}")
        rows = [self._level(i).decode(level.clamp_min(0)) * (level >= 0)[..., None] for i, level in enumerate(ids.unbind(-1))]
        return sum(rows)

    def _level(self, number: int) -> VQ:
        return self.levels[0 if self.config.shared else number]

    def _observe(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Move the codebooks; a shared one once, by all levels' vectors together."""
        if not self.config.shared:
            for level, (rows, ids) in zip(self.levels, seen):
                level.observe(rows, ids)
            return
        if len({len(rows) for rows, _ in seen}) == 1:  # keep images together, so that draws do not depend on the processes
            rows, ids = torch.stack([rows for rows, _ in seen], 1), torch.stack([ids for _, ids in seen], 1)
        else:
            rows = torch.cat([rows.reshape(-1, self.code_dim) for rows, _ in seen])
            ids = torch.cat([ids.flatten() for _, ids in seen])
        self.levels[0].observe(rows, ids)
