"""Relatives of pruning that drop no token: ACT turns attention sinks down, IMA skips feed-forwards of visual tokens, Recycled Attention
looks at part of the cache between full steps.

    ACT       listed heads:  A[:, sinks] *= beta, the freed mass goes to the other columns     Yu et al. 2024, arXiv 2406.15765
    IMA       every interval-th layer between start and end: mlp(x) = 0 for visual tokens       Shukor and Cord 2024, arXiv 2405.16700
    Recycled  every period-th step full attention; between, the K tokens that step looked at    Xu et al. 2024, arXiv 2411.05787
              most (and those written since)

All three read or replace single modules of a stock model by hooks, as context managers, like `vistok.prune`, which knows them by name.

B prompts, H heads, Q queries, L keys, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vistok.pruning.families import attention_of, family_of, text_model, visual_mask
from vistok.pruning.hooks import Hooked
from vistok.pruning.masks import validity
from vistok.pruning.methods.act import turn_down
from vistok.pruning.tap import AttentionCall, Tap, attention_of_rows

_STATE = "_vistok_calibration"


class _Calibration(Hooked):
    """Knows the cache and the padding of the forward that runs."""

    def __init__(self, model: nn.Module):
        family_of(model)
        self.model, self.text = model, text_model(model)
        self._handles: list = [
            self.text.register_forward_pre_hook(self._enter_text, with_kwargs=True),
            self.text.register_forward_hook(self._leave_text),
        ]

    def _tap(self, layer: int, observe) -> None:
        self._handles.append(Tap(attention_of(self.text.layers[layer]), observe))

    def _enter_text(self, text: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError("a static cache holds empty slots, which this would count as tokens: use the dynamic cache")
        self._is_new = cache is None or cache.get_seq_length() == 0
        self._memory: dict = {}
        if cache is not None:
            if self._is_new:
                cache.__dict__[_STATE] = {}
            self._memory = cache.__dict__.setdefault(_STATE, {})
        embeds = kwargs.get("inputs_embeds")
        B, Q = (embeds if embeds is not None else kwargs["input_ids"]).shape[:2]
        mask = kwargs.get("attention_mask")
        self._is_valid, _ = validity(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None, B, Q, text.device)

    def _leave_text(self, text: nn.Module, args: tuple, output) -> None:
        made = getattr(output, "past_key_values", None)
        if made is not None:  # the model may have made the cache itself
            made.__dict__.setdefault(_STATE, self._memory)


class CalibratedAttention(_Calibration):
    """ACT: attention sinks of the listed heads are turned down. Sinks are found in the prompt; later steps use the same.

    heads: for each layer, the heads to calibrate; the paper searches them with labelled examples. beta: share of a sink's attention that
    stays. threshold: mean attention above which a column is a sink. Listed layers hold their full map, the others run as they are.
    """

    def __init__(self, model: nn.Module, *, heads: Mapping[int, Sequence[int]], beta: float, threshold: float):
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} but it is the share of a sink's attention that stays, in [0, 1]")
        config, depth = text_model(model).config, len(text_model(model).layers)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"ACT needs attention maps, whose masks it reads as sdpa or eager give them, not {config._attn_implementation!r}"
            )
        for layer, chosen in heads.items():
            if (
                not 0 <= layer < depth
                or attention_of(text_model(model).layers[layer]) is None
                or not all(0 <= head < config.num_attention_heads for head in chosen)
            ):
                raise ValueError(
                    f"heads={{{layer}: {list(chosen)}}}, there are {depth} layers of {config.num_attention_heads} attention heads"
                )
        super().__init__(model)
        for layer, chosen in heads.items():
            self._tap(layer, self._calibrated(layer, list(chosen), beta, threshold))

    def _calibrated(self, layer: int, heads: list[int], beta: float, threshold: float):
        def observe(call: AttentionCall) -> tuple[Tensor, None]:
            attention = _all_rows(call)  # [B, H, Q, L]
            chosen = attention[:, heads]
            if self._is_new or layer not in self._memory:
                self._memory[layer] = self._sinks(chosen, threshold)
            sinks = self._memory[layer]
            sinks = torch.cat([sinks, sinks.new_zeros(*sinks.shape[:2], chosen.shape[-1] - sinks.shape[-1])], dim=-1)
            attention = attention.index_copy(1, torch.tensor(heads, device=attention.device), turn_down(chosen, sinks, beta))
            value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
            return (attention.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

        return observe

    def _sinks(self, attention: Tensor, threshold: float) -> Tensor:
        """attention: [B, H, L, L]. Returns [B, H, L] bool: columns that get more than the threshold of the rows that see them."""
        is_valid = self._is_valid[:, None, :, None]
        later = self._is_valid.flip(1).cumsum(dim=1).flip(1)  # rows that see a column
        received = (attention * is_valid).sum(dim=2) / later[:, None].clamp(min=1)
        is_first = (self._is_valid.cumsum(dim=1) == 1) & self._is_valid
        return (received > threshold) & (self._is_valid & ~is_first)[:, None]


class SkippedFeedForward(_Calibration):
    """IMA: in every interval-th layer between start and end the feed-forward runs on text tokens alone."""

    def __init__(self, model: nn.Module, *, start: int = 0, end: int | None = None, interval: int = 2):
        layers = text_model(model).layers
        end = len(layers) if end is None else end
        if interval < 1 or not 0 <= start < end <= len(layers):
            raise ValueError(f"start={start}, end={end}, interval={interval} but there are {len(layers)} layers")
        self.skipped = tuple(layer for layer in range(start + 1, end) if layer % interval == 0)
        """Layers whose feed-forward visual tokens skip."""
        parts = [next((getattr(layers[layer], name, None) for name in ("mlp", "feed_forward")), None) for layer in self.skipped]
        if None in parts:
            raise ValueError(f"a {type(layers[self.skipped[parts.index(None)]]).__name__} has no feed-forward of its own to skip")
        super().__init__(model)
        self._is_visual: Tensor | None = None
        self._handles.append(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        for mlp in parts:
            self._handles += [mlp.register_forward_pre_hook(self._only_text), mlp.register_forward_hook(self._put_back)]

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        is_visual = None if ids is None or ids.shape[1] == 1 else visual_mask(model, ids)
        self._is_visual = is_visual if is_visual is not None and bool(is_visual.any()) else None

    def _only_text(self, mlp: nn.Module, args: tuple):
        if self._is_visual is None:
            return None
        x = args[0]
        if x.shape[:2] != self._is_visual.shape:
            raise RuntimeError("tokens have left inside the language model: skipping feed-forwards and dropping tokens do not go together")
        return (x[~self._is_visual][None], *args[1:])

    def _put_back(self, mlp: nn.Module, args: tuple, output: Tensor):
        if self._is_visual is None:
            return None
        full = output.new_zeros(*self._is_visual.shape, output.shape[-1])
        full[~self._is_visual] = output[0]
        return full


class RecycledAttention(_Calibration):
    """Between full steps, decoding attends to the tokens that the last full step attended to most, and to those written since."""

    def __init__(self, model: nn.Module, *, keep: int, period: int = 10):
        if keep < 1 or period < 1:
            raise ValueError(f"keep={keep}, period={period} but both are at least 1")
        super().__init__(model)
        self.keep, self.period = keep, period
        kinds = getattr(self.text.config, "layer_types", None)
        for layer, part in enumerate(self.text.layers):
            if attention_of(part) is not None and (kinds is None or kinds[layer] == "full_attention"):
                self._tap(layer, self._recycled(layer))

    def _recycled(self, layer: int):
        def observe(call: AttentionCall):
            if call.query.shape[2] > 1:
                return None
            B, groups, L, d = call.key.shape
            step, chosen, hidden, length = self._memory.get(layer, (0, None, None, 0))
            if step % self.period == 0:
                attention = _all_rows(call).unflatten(1, (groups, -1)).mean(dim=(2, 3))  # [B, groups, L]
                best = attention.topk(min(self.keep, L), dim=-1)
                # padding has probability 0: a row with fewer than `keep` real tokens must not see it later
                self._memory[layer] = (step + 1, best.indices, (best.values == 0)[:, :, None], L)
                return None
            self._memory[layer] = (step + 1, chosen, hidden, length)
            new = torch.arange(length, L, device=chosen.device).expand(B, groups, -1)
            index = torch.cat([chosen, new], dim=-1)[..., None].expand(-1, -1, -1, d)
            key, value = call.key.gather(2, index), call.value.gather(2, index)
            logits = call.query.unflatten(1, (groups, -1)).flatten(2, 3) @ key.transpose(-2, -1) * call.scale  # [B, groups, H / groups, K]
            cap = call.options.get("softcap")
            logits = logits if cap is None else torch.tanh(logits / cap) * cap
            logits[..., : chosen.shape[-1]].masked_fill_(hidden, torch.finfo(logits.dtype).min)
            return (logits.float().softmax(dim=-1).to(value.dtype) @ value).flatten(1, 2)[:, None], None

        return observe


def _all_rows(call: AttentionCall) -> Tensor:
    """[B, H, Q, L] float32 probabilities of every query of the call; rows that see nothing are 0."""
    B, _, Q, _ = call.query.shape
    return attention_of_rows(call, torch.arange(Q, device=call.query.device).expand(B, -1)).nan_to_num(0)


CALIBRATIONS = {"act": CalibratedAttention, "ima": SkippedFeedForward, "recycled": RecycledAttention}
"""By the name that `vistok.prune` takes."""
