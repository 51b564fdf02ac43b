"""How evenly soft assignments use the codes, without ever holding the N x K probabilities.

    p_i     = softmax_k(-|x_i - c_k|^2 / temperature)
    certain = mean_i H(p_i)                                   small: each vector is sure of its code
    even    = H(mean_i p_i)                                   large: all codes are used alike
    loss    = certain - even                                  may be negative; its lowest value is -log K

Yu et al. 2023 (MAGVIT-2), arXiv 2310.05737, equation 4. N vectors x of width d, K codes c.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ENTRIES = 1 << 21  # probabilities held at a time; the backward pass holds about five times as many
LOG_EPS = 1e-5  # TokenFlow's


def assignment_entropies(
    vectors: Tensor, codes: Tensor, *, temperature: float = 0.01, log_eps: float = LOG_EPS, block_entries: int = BLOCK_ENTRIES
) -> tuple[Tensor, Tensor]:
    """The entropies `certain` and `even` of vectors [N, d] over codes [K, d], in nats; float32 scalars, differentiable in both.

    log_eps: added in the logarithm of the mean; it keeps the gradient of an unused code finite.
    Blocks of vectors are computed again in the backward pass, so memory does not grow with N x K.
    """
    if not len(vectors):
        return vectors.sum(), vectors.sum()
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codes = vectors.float(), codes.float()
        certain, mean = vectors.new_zeros(()), codes.new_zeros(len(codes))
        for block in vectors.split(max(1, block_entries // len(codes))):
            part, total = checkpoint(_block, block, codes, temperature, use_reentrant=False)
            certain, mean = certain + part, mean + total
        mean = mean / len(vectors)
        return certain / len(vectors), -(mean * (mean + log_eps).log()).sum()


def _block(vectors: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum over the block's vectors of H(p_i), and of p_i [K]. The vectors' own lengths cancel in the softmax."""
    log_p = torch.addmm(codes.square().sum(1).mul(-1 / temperature), vectors, codes.t(), alpha=2 / temperature).log_softmax(1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)
