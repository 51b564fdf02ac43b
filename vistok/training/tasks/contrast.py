"""The contrastive loss between images and texts (CLIP, Radford et al. 2021, arXiv 2103.00020), over all processes.

    s_ij = <image_i, text_j> / temperature;   loss = (CE_i(s) + CE_j(s^T)) / 2, with label smoothing
    equal texts are all right answers: the target of row i is uniform over them; rows without a text take no part

B images on this process, A images on all, e width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1
_OUT = -1e4  # a logit that takes no part; finite, because its target of zero is multiplied with it


def contrastive_loss(
    images: Tensor, texts: Tensor, temperature: Tensor | float, *, groups: Tensor | None = None, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Scalar loss of unit vectors images [B, e] and texts [B, e]; 0 where no row has a text.

    groups: [B] int64, equal where texts are equal, negative where there is none; None: all differ. With several processes every image is
    compared with the texts of all (equally many a process); gradients stay on their own process, as in the reference.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if groups is None:
        groups = torch.arange(len(images), device=images.device) + rank * len(images)
    all_images, all_texts, all_groups = (_gather(rows, rank, world) for rows in (images, texts, groups))
    takes_part, all_take_part = groups >= 0, all_groups >= 0
    matches = ((groups[:, None] == all_groups) & all_take_part).float()
    target = (1 - label_smoothing) * matches / matches.sum(1, keepdim=True).clamp(min=1)
    target = target + label_smoothing * all_take_part / all_take_part.sum().clamp(min=1)
    losses = [
        -(target * F.log_softmax((ours @ others.t() / temperature).float().masked_fill(~all_take_part, _OUT), dim=1)).sum(1)
        for ours, others in ((images, all_texts), (texts, all_images))
    ]
    return ((losses[0] + losses[1]) / 2 * takes_part).sum() / takes_part.sum().clamp(min=1)


def _gather(rows: Tensor, rank: int, world: int) -> Tensor:
    """Rows of all processes in order, without gradient but for those of this process."""
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank] = rows
    return torch.cat(parts)
