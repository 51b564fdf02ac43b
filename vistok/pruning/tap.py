"""Reading and replacing single attention layers of transformers models: queries and keys after their rotary positions, any kernel.

`ALL_ATTENTION_FUNCTIONS` is the library's own table of attention kernels, looked up by each attention module's config. A tap gives one
module a copy of its config that names an entry of ours; that entry shows the call to whoever asked and goes on to the kernel of before. The
model's config, and so its masks, stay as they are: SDPA and FlashAttention keep running, and no other layer notices.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "vistok_tap"
_STATE = "_vistok_tap"


@dataclass
class AttentionCall:
    """One call of an attention kernel."""

    module: nn.Module
    query: Tensor
    """[B, H, Q, d], after rotary positions."""
    key: Tensor
    """[B, H_kv, K, d], the cache's included."""
    value: Tensor
    """[B, H_kv, K, d]."""
    mask: Any
    """What the kernel gets: None (causal, or everything in a vision tower), [B, 1, Q, K] bool or additive, [B, K] for FlashAttention."""
    scale: float
    options: dict
    """The call's other arguments."""


def logits_of(call: AttentionCall, rows: Tensor) -> Tensor:
    """rows: [B, R] int64, numbers of the call's queries. Returns [B, H, R, K] float32: their scaled logits to every key, not masked."""
    query, key = call.query, call.key
    B, H, _, d = query.shape
    R, groups = rows.shape[1], key.shape[1]
    query = query.gather(2, rows[:, None, :, None].expand(B, H, R, d)).float()
    logits = query.reshape(B, groups, H // groups * R, d) @ key.float().transpose(-2, -1) * call.scale
    logits, cap = logits.view(B, H, R, -1), call.options.get("softcap")
    return logits if cap is None else torch.tanh(logits / cap) * cap


def attention_of_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """rows: [B, R] int64, numbers of the call's queries. Returns [B, H, R, K] float32: what they attend to, as the kernel masks it.

    For the attention of a decoder: without a mask it is causal.
    """
    logits, mask = logits_of(call, rows), call.mask
    B, _, R, K = logits.shape
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask.expand(B, -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(B, mask.shape[1], R, mask.shape[-1]))
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    else:
        hidden = torch.arange(K, device=rows.device) > rows[:, None, :, None] + K - call.query.shape[2]
        if isinstance(mask, Tensor):  # FlashAttention's [B, K]
            hidden = hidden | ~mask[:, None, None, -K:].bool()
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(dim=-1)


Observer = Callable[[AttentionCall], "tuple[Tensor, Tensor | None] | None"]
"""Returns None to only look, or the kernel's result [B, Q, H, d] and weights to stand in for it."""


class _State:
    def __init__(self, module: nn.Module):
        self.config, self.observers = module.config, []

    def kernel(self, module: nn.Module):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)


def _tapped(module, query, key, value, attention_mask, scaling=None, **options):
    state = module.__dict__[_STATE]
    call = AttentionCall(module, query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling, options)
    for observe in tuple(state.observers):
        result = observe(call)
        if result is not None:
            return result
    return state.kernel(module)(module, query, key, value, attention_mask, scaling=scaling, **options)


class Tap:
    """`observe` sees every attention call of `module` until `remove`. Several may listen to one module."""

    def __init__(self, module: nn.Module, observe: Observer):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if not hasattr(getattr(module, "config", None), "_attn_implementation"):
            raise ValueError(
                f"{type(module).__name__} does not choose its kernel from transformers' table, so its attention cannot be read"
            )
        self.module, self.observe = module, observe
        if _STATE not in module.__dict__:
            ALL_ATTENTION_FUNCTIONS.register(_NAME, _tapped)
            module.__dict__[_STATE] = _State(module)
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = _NAME
        module.__dict__[_STATE].observers.append(observe)

    def remove(self) -> None:
        """Stop listening; the last one out gives the module its config back."""
        state = self.module.__dict__.get(_STATE)
        if state is None or self.observe not in state.observers:
            return
        state.observers.remove(self.observe)
        if not state.observers:
            self.module.config = state.config
            del self.module.__dict__[_STATE]
