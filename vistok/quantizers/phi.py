"""VAR's phi: a convolution that mends what bicubic upsampling of a coarse scale's codes leaves behind.

Tian et al. 2024, arXiv 2404.02905, section 3.2 and the released tokenizer:  phi_k(h) = (1 - r) h + r conv_j(h),  j = the phi of scale k.
"""

from torch import Tensor, nn


def phi_of_scales(num_scales: int, count: int) -> tuple[int, ...]:
    """Which of `count` phis each of `num_scales` scales uses: the one whose tick on [0, 1] is nearest to k / (num_scales - 1).

    Ticks are evenly spaced; the margin at the ends is 1/(3 count) for four phis and 1/(2 count) otherwise, as in the reference. Computed in
    Python floats: with 10 scales and 4 phis two places are ties, which float32 would give to the wrong phi.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    last = 1 - margin
    step = (last - margin) / max(1, count - 1)
    ticks = [margin + j * step for j in range(count - 1)] + [last] if count > 1 else [margin]
    places = [k / max(1, num_scales - 1) for k in range(num_scales)]
    return tuple(min(range(count), key=lambda j: (abs(ticks[j] - place), j)) for place in places)


class PhiConvs(nn.Module):
    """The `refine` of a MultiScaleResidual.

    count: 1: all scales share one phi; S: scales share S phis by their place; 0: one phi a scale. ratio: r.
    table: the phi of each scale, where it should not be the nearest.
    """

    def __init__(self, code_dim: int, num_scales: int, *, count: int = 4, ratio: float = 0.5, table: tuple[int, ...] | None = None):
        super().__init__()
        phis = count or num_scales
        self.table = table or (tuple(range(num_scales)) if count == 0 else phi_of_scales(num_scales, phis))
        if len(self.table) != num_scales or not all(0 <= j < phis for j in self.table):
            raise ValueError(f"table={self.table} must name one of {phis} phis for each of {num_scales} scales")
        self.ratio = ratio
        self.convs = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(phis))

    def forward(self, codes: Tensor, number: int) -> Tensor:
        """codes: [B, d, h, w] of scale `number`, already on the last grid -> the same shape."""
        conv = self.convs[self.table[number]]
        return (1 - self.ratio) * codes + self.ratio * conv(codes.to(conv.weight.dtype)).to(codes.dtype)
