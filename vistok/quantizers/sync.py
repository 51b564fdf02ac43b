"""Sums and draws over the vectors of all processes, with the same result on each of them.

Without torch.distributed, or with one process, nothing is sent. Every process of the group has to make the same calls in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Number of this process, and of all processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(*tensors: Tensor) -> list[Tensor]:
    """Each tensor's sum over the processes, in its own dtype; one float32 message, so integers stay exact below 2^24."""
    if world()[1] == 1:
        return list(tensors)
    message = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(message)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors)]


def draw_vectors(vectors: Tensor, count: int, *, seed: int) -> Tensor:
    """Up to `count` random vectors of all processes' vectors, without repetition, NaN and infinite ones left out; [<= count, d].

    vectors: [B, ..., d]. The draw depends on the seed and the global batch only: image i of it is taken to be row i // world of process
    i % world, as vistok's loaders deal them, so that two processes draw what one would.
    """
    rank, processes = world()
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    sizes = torch.zeros(processes, 2, device=flat.device)
    sizes[rank] = torch.tensor([len(vectors), len(flat) // max(1, len(vectors))])
    (sizes,) = sum_over_processes(sizes)
    items, each = sizes.long().cpu().unbind(1)
    if (each != each[0]).any():  # rows of different lengths: deal single vectors
        items, each = items * each, torch.ones_like(each)
    length = int(each[0])
    images = torch.arange(processes * int(items.max()))
    images = images[images // processes < items[images % processes]]
    order = torch.randperm(len(images) * length, generator=torch.Generator().manual_seed(seed))[:count]
    image, place = images[order // max(1, length)], order % max(1, length)
    mine = image % processes == rank
    picked = flat.new_zeros(len(order), flat.shape[1] + 1, dtype=torch.float32)
    rows = flat[(image[mine] // processes * length + place[mine]).to(flat.device)].float()
    finite = rows.isfinite().all(1, keepdim=True)
    picked[mine.to(flat.device)] = torch.cat([rows.where(finite, 0), finite.float()], 1)
    (picked,) = sum_over_processes(picked)
    return picked[picked[:, -1] > 0.5, :-1]
