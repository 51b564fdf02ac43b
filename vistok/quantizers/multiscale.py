"""Residual quantization over growing grids: each scale says what the coarser ones left out.

Tian et al. 2024 (VAR), arXiv 2404.02905, algorithms 1 and 2; Qu et al. 2024 (TokenFlow), arXiv 2412.03069. With scales s_1 < ... < s_S:

    r = h;  f = 0;  for each scale s:
        q_s = quantize(area(r, s));  u = refine_s(bicubic(q_s, s_S));  f = f + u;  r = r - sg(u)

f is what decoders and language models read. `refine` is the identity in TokenFlow and a convolution in VAR (phi.py). Two ways up to a
larger grid are in use, and they are not interchangeable:
    direct        every map goes straight to the last grid, f = sum_s refine_s(bicubic(map_s, s_S)): `decode`, `totals`;
                  VAR's generator reads area(f, s_(i+1)) of it
    progressive   the running sum grows from grid to grid, f = bicubic(f + map_s, s_(i+1)): `next_scale_inputs`; TokenFlow's generator
B images, d channels, h w the last grid, N tokens = sum of all grids, coarse to fine, each row-major.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import QuantizerOutput
from vistok.quantizers.vq import VQ


@dataclass(frozen=True)
class MultiScaleOutput:
    """total: f [B, d, h, w], gradients pass straight through. ids: [B, N] int64; a dropped scale has none.

    losses: named scalars, averaged over the scales. inputs: what each scale had to quantize, [B, d, s, s] each.
    """

    total: Tensor
    ids: Tensor
    losses: dict[str, Tensor]
    inputs: tuple[Tensor, ...]


class MultiScaleResidual(nn.Module):
    """Any quantizer, used at every scale.

    quantizer: maps [..., d] to a QuantizerOutput; has `nearest(z)` -> ids and `decode(ids)` -> codes [..., d] (as VQ does).
    scales: (rows, columns) of each grid, coarse to fine. refine: (map [B, d, h, w], number of the scale) -> map; None: the identity.
    """

    def __init__(self, quantizer: nn.Module, scales: Sequence[tuple[int, int]], *, refine: Callable[[Tensor, int], Tensor] | None = None):
        super().__init__()
        self.quantizer, self.scales = quantizer, tuple((int(h), int(w)) for h, w in scales)
        self.refine = refine
        if not self.scales or any(min(scale) < 1 for scale in self.scales):
            raise ValueError(f"scales={self.scales} must be positive sizes, coarse to fine")
        if any(a > c or b > d for (a, b), (c, d) in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales={self.scales} must not shrink")
        self.sizes = tuple(h * w for h, w in self.scales)

    @property
    def num_tokens(self) -> int:
        """N: tokens of all scales."""
        return sum(self.sizes)

    def num_scales(self, num_tokens: int) -> int:
        """How many whole scales the first `num_tokens` tokens are. Raises ValueError: they end inside a scale."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        if num_tokens not in ends:
            raise ValueError(f"{num_tokens} tokens end inside a scale; whole scales end at {', '.join(map(str, ends))}")
        return ends.index(num_tokens) + 1

    def forward(self, h: Tensor, *, num_scales: int | None = None, dropped: int | None = None) -> MultiScaleOutput:
        """Quantize h [B, d, h, w] of the last grid's size, with straight-through gradients and losses, in float32; total in h.dtype.

        num_scales: use only the first ones. dropped: the number of a scale to leave out, as training does now and then.
        In training mode a VQ's codebook moves once, by the vectors of all scales together.
        """
        numbers = range(len(self.scales) if num_scales is None else num_scales)
        if not (self.training and isinstance(self.quantizer, VQ)):
            return self._run(h, self.quantizer, numbers, dropped)
        self.start(h, num_scales=num_scales)
        out = self._run(h, self.quantizer.quantize, numbers, dropped)
        self.quantizer.observe(_rows(out.inputs), out.ids)
        return out

    @torch.no_grad()
    def start(self, h: Tensor, *, num_scales: int | None = None) -> None:
        """Place the codes of a VQ that starts by k-means over features h [B, d, h, w], reduced to each scale's grid."""
        self.quantizer.start(_rows([F.interpolate(h.float(), size=scale, mode="area") for scale in self.scales[:num_scales]]))

    def unquantized(self, h: Tensor) -> Tensor:
        """f [B, d, h, w] as if there were a code for every vector: what a first stage of training decodes, before codes are placed.

        h: [B, d, h, w]. The quantizer has `place(z)` -> the vector where codes live (as VQ does).
        """

        def as_it_is(z: Tensor) -> QuantizerOutput:
            return QuantizerOutput(codes=self.quantizer.place(z), ids=z.new_zeros(z.shape[:-1], dtype=torch.int64), loss=z.new_zeros(()))

        return self._run(h, as_it_is, range(len(self.scales)), None).total

    @torch.no_grad()
    def encode(self, h: Tensor, *, num_scales: int | None = None) -> MultiScaleOutput:
        """Ids of features h [B, d, h, w] and what they sum up to, as in forward, without gradients and losses.

        num_scales: how many of the scales, all by default.
        """

        def quantize(z: Tensor) -> QuantizerOutput:
            ids = self.quantizer.nearest(z)
            return QuantizerOutput(codes=self.quantizer.decode(ids), ids=ids, loss=z.new_zeros(()))

        return self._run(h, quantize, range(len(self.scales) if num_scales is None else num_scales), None)

    def _run(self, h: Tensor, quantize: Callable[[Tensor], QuantizerOutput], numbers: range, dropped: int | None) -> MultiScaleOutput:
        if h.shape[-2:] != self.scales[-1]:
            raise ValueError(f"features have the grid {tuple(h.shape[-2:])}, the last scale is {self.scales[-1]}")
        with torch.autocast(h.device.type, enabled=False):  # each scale reads the rounding errors of all before it
            residual, total = h.float(), torch.zeros_like(h, dtype=torch.float32)
            ids, losses, inputs = [], [], []
            for number in numbers:
                if number == dropped:
                    continue
                inputs.append(F.interpolate(residual, size=self.scales[number], mode="area"))
                out = quantize(inputs[-1].permute(0, 2, 3, 1))
                update = self._enlarged(out.codes.permute(0, 3, 1, 2), number)
                total = total + update
                residual = residual - update.detach()
                ids.append(out.ids.flatten(1))
                losses.append(out.terms)
        averaged = {name: sum(terms[name] for terms in losses) / len(losses) for name in losses[0]}
        return MultiScaleOutput(total.to(h.dtype), torch.cat(ids, dim=1), averaged, tuple(inputs))

    def _enlarged(self, codes: Tensor, number: int) -> Tensor:
        """Codes [B, d, s, s] of one scale on the last grid, refined."""
        codes = F.interpolate(codes, size=self.scales[-1], mode="bicubic")
        return codes if self.refine is None else self.refine(codes, number)

    def maps(self, ids: Tensor) -> list[Tensor]:
        """Codes of each scale, [B, d, s, s] each, of ids [B, N] that are a prefix of whole scales."""
        parts = ids.split(self.sizes[: self.num_scales(ids.shape[1])], dim=1)
        return [self.quantizer.decode(part).transpose(1, 2).unflatten(2, scale) for part, scale in zip(parts, self.scales)]

    def decode(self, ids: Tensor) -> Tensor:
        """f [B, d, h, w] of ids [B, N], a prefix of whole scales; always on the last grid."""
        return sum(self._enlarged(codes, number) for number, codes in enumerate(self.maps(ids)))

    def add(self, total: Tensor | float, ids: Tensor, number: int) -> Tensor:
        """f [B, d, h, w] after one more scale: total, 0 before the first, and the codes of that scale's ids [B, h_i w_i]."""
        codes = self.quantizer.decode(ids).transpose(1, 2).unflatten(2, self.scales[number])
        return total + self._enlarged(codes, number)

    def totals(self, ids: Tensor) -> list[Tensor]:
        """f after each scale, [B, d, h, w] each on the last grid, of ids [B, N] that are a prefix of whole scales."""
        sums: list[Tensor] = []
        for number, part in enumerate(ids.split(self.sizes[: self.num_scales(ids.shape[1])], dim=1)):
            sums.append(self.add(sums[-1] if sums else 0.0, part, number))
        return sums

    def running_sums(self, ids: Tensor) -> list[Tensor]:
        """f after each scale, reduced to that scale's grid by area, [B, d, s, s] each: the image as far as that scale knows it."""
        sums, total = [], 0
        for number, codes in enumerate(self.maps(ids)):
            total = total + self._enlarged(codes, number)
            sums.append(F.interpolate(total, size=self.scales[number], mode="area"))
        return sums

    def next_scale_inputs(self, ids: Tensor, *, refined: int | None = None) -> list[Tensor]:
        """What TokenFlow's language model reads in place of each scale but the first, [B, d, s, s] each.

        Here the running sum grows from grid to grid, f = bicubic(f + map_(i-1), s_i), instead of each map going straight to the last
        grid as in `decode`. ids: [B, N], a prefix of n whole scales; gives the inputs of scales 1 ... min(n, S - 1), counted from 0.
        refined: the number of a scale whose input already holds its own codes, f + map_i, for another pass over it.
        """
        maps = self.maps(ids)
        inputs, total = [], maps[0]
        for number in range(1, min(len(maps) + 1, len(self.scales))):
            total = F.interpolate(total, size=self.scales[number], mode="bicubic")
            known = total + maps[number] if number < len(maps) else total
            inputs.append(known if number == refined else total)
            total = known
        return inputs


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, d, s, s] of several scales as vectors [B, N, d], in the order of their ids."""
    return torch.cat([codes.flatten(2).transpose(1, 2) for codes in maps], dim=1)
