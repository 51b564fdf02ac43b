"""SparseVLM: text rows rate the visual tokens; what is dropped is recycled into cluster means.

Zhang et al. 2024, arXiv 2410.04417, sections 3.2 and 3.4.

    raters       = text tokens t with m_t > mean(m),   m_t = mean_j softmax_t(v_j . t_t)
    score_j      = mean over raters and heads of the logits from t to j   (the code's; the paper says probabilities)
    recycling    = density peaks: density exp(-mean of the C nearest squared distances), delta = distance to the nearest denser token,
                   centres = the C largest delta * density, every token joins its nearest centre, mean
"""

import torch
from torch import Tensor


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """visual: [N, D], text: [T, D] embeddings. Returns [T] bool: the text tokens that look at the picture more than average."""
    rating = (visual.float() @ text.float().T).softmax(dim=-1).mean(dim=0)
    return rating > rating.mean()


def sparsevlm_score(logits: Tensor, raters: Tensor, *, visual_start: int, visual_end: int) -> Tensor:
    """logits: [B, H, L, L] or only the rows after the visual span [B, H, T, L], before the softmax. raters: [T] bool, of those rows.

    Returns [B, N]: the mean logit from the raters to each visual token.
    """
    rows = logits[:, :, visual_end : visual_end + raters.numel()] if logits.shape[2] == logits.shape[3] else logits
    return rows[:, :, raters, visual_start:visual_end].float().mean(dim=(1, 2))


def sparsevlm_recycle(tokens: Tensor, num_clusters: int) -> Tensor:
    """tokens: [B, N, D]. Returns [B, C, D]: means of clusters around density peaks, centres by falling delta * density."""
    return sparsevlm_recycle_plan(tokens, num_clusters)[1]


def sparsevlm_recycle_plan(tokens: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """The same with the centres: ([B, C] int64 indices of the tokens that the clusters stand around, [B, C, D] means)."""
    B, N, D = tokens.shape
    if not 1 <= num_clusters <= N:
        raise ValueError(f"num_clusters={num_clusters} but there are {N} tokens")
    distance = torch.cdist(tokens.float(), tokens.float()) / D**0.5
    nearest = distance.topk(num_clusters, dim=-1, largest=False).values
    density = torch.exp(-(nearest**2).mean(dim=-1))
    farthest = distance.flatten(1).amax(dim=-1)[:, None, None]
    is_denser = density[:, None, :] > density[:, :, None]
    delta = torch.where(is_denser, distance, farthest).amin(dim=-1)
    centres = (delta * density).topk(num_clusters, dim=-1).indices
    to_centre = distance.gather(1, centres[..., None].expand(-1, -1, N))  # [B, C, N]
    owner = to_centre.argmin(dim=1)
    owner = owner.scatter(1, centres, torch.arange(num_clusters, device=tokens.device).expand(B, -1))
    members = torch.nn.functional.one_hot(owner, num_clusters).to(tokens.dtype).transpose(1, 2)
    return centres, members @ tokens / members.sum(dim=-1, keepdim=True)
