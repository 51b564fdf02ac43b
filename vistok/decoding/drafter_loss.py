"""What a drafter that predicts hidden states is trained on.

Li et al. 2024 (EAGLE), arXiv 2401.15077, section 4.2:

    loss = SmoothL1(h^, h) + w CE(softmax(W h), softmax(W h^))                      W: the target's output layer, frozen

B rows, N positions, D width, V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DrafterLoss(NamedTuple):
    """Loss of a batch and how often drafter and target agree."""

    loss: Tensor
    """Scalar, with gradient."""
    num_correct: int
    """Positions where both have the same most probable token."""
    num_positions: int
    """Positions that were compared."""


def drafter_loss(
    predicted: Tensor, hidden: Tensor, head: Tensor, mask: Tensor, *, ce_weight: float = 0.1, guidance_scale: float | None = None
) -> DrafterLoss:
    """EAGLE's loss over the positions of the mask.

    predicted, hidden: [B, N, D], h^ and h. head: [V, D]. mask: [B, N], 1 where a position counts.
    guidance_scale: rows are conditional and unconditional in turn; the cross-entropy then compares u + s (c - u) at the conditional rows'
    positions. LANTERN's published loss trains with c + s (c - u), which is guidance_scale s + 1, though it draws with s.
    """
    distance = F.smooth_l1_loss(predicted, hidden, reduction="none").mean(-1)
    feature = (distance * mask).sum() / mask.sum().clamp(min=1)
    draft, target = predicted @ head.t(), hidden @ head.t()
    if guidance_scale is not None:
        draft, target = (logits[1::2] + guidance_scale * (logits[::2] - logits[1::2]) for logits in (draft, target))
        mask = mask[::2]
    entropy = -(target.softmax(-1).detach() * draft.log_softmax(-1)).sum(-1)
    agrees = (draft.argmax(-1) == target.argmax(-1)) & (mask > 0)
    loss = feature + ce_weight * (entropy * mask).sum() / mask.sum().clamp(min=1)
    return DrafterLoss(loss, int(agrees.sum()), int(mask.sum()))
