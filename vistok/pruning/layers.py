"""Visual-token pruning inside the language model: tokens leave between two decoder layers, and later layers are shorter.

Hooks in front of the decoder layers do it, on stock models, in `generate` and in plain forwards alike:

    before layer k      gather hidden states, rotary tables and masks of the tokens that stay; shorter rows are filled on the left
    every layer >= k    gets a mask of its own, because its cache is shorter than the one the model sized its mask by
    after the last one  states go back to their places (zeros where a token left), so logits and labels keep their length

The cache carries a ledger: which token of the conversation sits in each of its slots, per segment (the layers between two stages), -1 for
padding. Masks of later steps and turns are made from it. Attention kernels stay what they are; with positions="keep" the result equals
hiding the dropped tokens as keys from layer k on (`vistok.testing.assert_matches_mask_oracle`).

B prompts, Q tokens of this forward, K tokens of it that are left, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.pruning.families import attention_of, family_of, is_flash, kind_of, newline_of, sliding_window, text_model, visual_mask
from vistok.pruning.hooks import Hooked
from vistok.pruning.ledger import Forward, ledger_of, new_ledger
from vistok.pruning.masks import gather_square, gather_tokens, pack_left, take, validity
from vistok.pruning.stages import LayerMethod, Stages, StageView, create_stages, layer_methods
from vistok.pruning.tap import AttentionCall, Tap

_MARK = "_vistok_layer_pruning"


@dataclass(frozen=True)
class LayerReport:
    """What the last forward with images did."""

    num_visual: tuple[int, ...]
    """Visual tokens of each prompt."""
    num_kept: tuple[tuple[int, ...], ...]
    """Visual tokens of each prompt that are left after each stage."""
    tokens_per_layer: tuple[int, ...]
    """Tokens of the longest row in each layer: the length of its cache after the prompt."""

    @property
    def cache_ratio(self) -> float:
        """Size of the cache against the unpruned one's."""
        return sum(self.tokens_per_layer) / (len(self.tokens_per_layer) * self.tokens_per_layer[0])


class PrunedLayers(Hooked):
    """The hooks on one model."""

    def __init__(self, model: nn.Module, method: LayerMethod, stages: Stages, *, positions: str = "keep"):
        self.model, self.method, self.stages, self.positions = model, method, stages, positions
        self.text = text_model(model)
        self.layers = list(self.text.layers)
        check_inside(model, stages, positions)
        self._now: Forward | None = None
        self._top: tuple[Tensor, Tensor | None] | None = None
        self._last: Forward | None = None
        self._counts: list[int] = []
        self._window = sliding_window(model)
        self._kinds = getattr(self.text.config, "layer_types", None)
        self._handles: list = []
        model.__dict__[_MARK] = self
        self._attach_all()

    def remove(self) -> None:
        """Take every hook off; the model is as it was. The report stays readable. Caches made so far belong to the pruned model."""
        super().remove()
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK]
            self.text.__dict__.pop("_deepstack_process", None)
            self.model.__dict__.pop("_prefill", None)

    def stats(self) -> LayerReport:
        """Token counts of the last forward that dropped some."""
        last = self._require()
        return LayerReport(tuple(self._counts), tuple(map(tuple, last.kept)), tuple(last.lengths))

    def drops(self) -> list[tuple[int, Tensor]]:
        """[(layer, [B, L] bool)]: the tokens of the prompt that are gone from this layer on. Raises ValueError for a method that merges."""
        if self.method.merges:
            raise ValueError("this method merges tokens: what it does is not the same as masking some of them")
        return list(self._require().dropped)

    def _require(self) -> Forward:
        if self._last is None:
            raise RuntimeError("no forward with images has run through the pruned layers yet")
        return self._last

    def _attach(self) -> None:
        add = self._handles.append
        if hasattr(self.model, "_prefill"):
            self.model.__dict__["_prefill"] = self._whole_prefill
        add(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        add(self.text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        add(self.text.register_forward_hook(self._leave_text))
        for number in range(self.stages.at[0], len(self.layers)):
            add(self.layers[number].register_forward_pre_hook(self._layer_hook(number), with_kwargs=True))
        if self.method.reads == "before":
            for layer in self.stages.at:
                add(Tap(attention_of(self.layers[layer - 1]), self._reader(layer)))
        if hasattr(self.text, "_deepstack_process"):
            original = self.text._deepstack_process
            self.text.__dict__["_deepstack_process"] = lambda x, mask, embeds: original(x, *self._deepstack(mask, embeds))

    def _whole_prefill(self, input_ids: Tensor, generation_config, *args, **kwargs):
        """The prefill of `generate`, in one piece."""
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: a chunk would lose tokens before the question is read; "
                "prune before the language model, or leave it out"
            )
        return type(self.model)._prefill(self.model, input_ids, generation_config, *args, **kwargs)

    def _layer_hook(self, number: int):
        return lambda layer, args, kwargs: self._enter_layer(number, layer, args, kwargs)

    def _reader(self, layer: int):
        def read(call: AttentionCall) -> None:
            if self._now is not None and self._now.drops_tokens:
                self._now.calls[layer] = call

        return read

    # The hooks, in the order a forward runs them.

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._top = None if ids is None else (visual_mask(model, ids), kwargs.get("attention_mask"))

    def _enter_text(self, text: nn.Module, args: tuple, kwargs: dict) -> None:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        top, self._top = self._top, None
        if embeds is None:
            embeds = text.get_input_embeddings()(kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0])
        B, Q, _ = embeds.shape
        ledger = ledger_of(cache, self.stages.at, B, embeds.device)
        mask = kwargs.get("attention_mask") if top is None else top[1]
        is_valid, all_valid = validity(mask, B, Q, embeds.device)
        is_visual = is_valid.new_zeros(B, Q) if top is None or top[0].shape != (B, Q) else top[0] & is_valid
        if Q > 1 and (newline := newline_of(self.model)) is not None:
            is_visual = is_visual & (embeds != newline.to(embeds)).any(dim=-1)
        drops = Q > 1 and bool(is_visual.any())
        if drops:
            place = torch.where(is_valid, torch.arange(Q, device=is_valid.device), 0)
            if bool(is_visual.gather(1, place.amax(dim=1, keepdim=True)).any()):
                raise ValueError("a prompt ends inside a picture: what stays is chosen for the words behind it, so pass whole prompts")
        self._now = Forward(B, Q, is_visual, is_valid, all_valid, embeds, ledger, drops)
        if drops:
            self._counts = is_visual.sum(dim=1).tolist()  # read on the host once a prompt: row lengths are shapes
            self._now.lengths = [Q] * self.stages.at[0]

    def _enter_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict):
        now = self._now
        if now is None or not now.drops_tokens and now.is_untouched:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = dict(kwargs)
        if number in self.stages.at:
            now.segment = self.stages.at.index(number)
            if now.drops_tokens:
                hidden = self._drop(number, layer, hidden, kwargs)
            now.columns[now.segment] = (*now.tokens(), now.all_valid and not now.has_filling)
        if now.drops_tokens:
            now.lengths.append(hidden.shape[1])
        if now.is_untouched:
            return None
        rows = now.rows
        if rows is not None:
            args = tuple(gather_tokens(x, rows) if _is_per_token(x, now) else x for x in args[1:])
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(gather_tokens(x, rows) for x in kwargs["position_embeddings"])
            if isinstance(kwargs.get("position_ids"), Tensor):
                kwargs["position_ids"] = take(kwargs["position_ids"], rows)
        else:
            args = args[1:]
        if self.positions == "compact":
            kwargs["position_embeddings"] = self._compact(number, hidden)
        kwargs["attention_mask"] = self._mask(number, layer, hidden, kwargs)
        if is_flash(self.model):
            kwargs["position_ids"] = None  # FlashAttention would read a gap as the border between two packed sequences
        return (hidden, *args), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def _leave_text(self, text: nn.Module, args: tuple, output):
        now, self._now = self._now, None
        if now is None:
            return None
        made = getattr(output, "past_key_values", None)
        if now.ledger is None and made is not None and made.get_seq_length() == now.Q:  # the model made the cache itself
            now.ledger = new_ledger(made, self.stages.at)
        ledger = now.ledger
        if ledger is not None:
            self._record(now)
            ledger.length += now.Q
            ledger.has_dropped = ledger.has_dropped or now.rows is not None
            ledger.since_stage = 0 if now.rows is not None else ledger.since_stage + now.Q
        if not now.drops_tokens:
            return None
        self._last = now
        now.calls.clear()
        if now.rows is None:
            return None
        states = output.last_hidden_state
        full = states.new_zeros(now.B, now.Q + 1, states.shape[-1])
        place = torch.where(now.rows >= 0, now.rows, now.Q)
        output.last_hidden_state = full.scatter(1, place[..., None].expand_as(states), states)[:, :-1]
        return output

    # What they do.

    def _drop(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        """The tokens that stay before this layer; sets `rows`."""
        now, stage = self._now, self.stages.at.index(number)
        B, Q = now.B, now.Q
        current, is_valid = now.tokens()
        places = current.clamp(min=0)
        is_visual = now.is_visual.gather(1, places) & is_valid
        counts = [self.stages.count(stage, n) for n in self._counts]
        now.kept.append(tuple(min(count, n) for count, n in zip(counts, self._counts)))
        if not self.method.is_adaptive and now.kept[-1] == (now.kept[-2] if stage else tuple(self._counts)):
            now.dropped.append((number, torch.zeros_like(now.is_visual)))
            return hidden  # all of them stay: the next layers run as they would without us
        rotary = kwargs.get("position_embeddings")
        rotary = None if rotary is None else tuple(gather_tokens(x, places) for x in rotary)
        view = StageView(number, hidden, is_visual, is_valid & ~is_visual, gather_tokens(now.embeddings, places), rotary)
        view.ordinal = torch.where(is_visual, (now.is_visual.cumsum(dim=1) - 1).gather(1, places), -1)
        view.call = self._read_next(number, layer, hidden, kwargs) if self.method.reads == "next" else now.calls.pop(number, None)
        with torch.no_grad():
            choice = self.method.choose(view, counts)
        left = (is_visual & choice.stays).sum(dim=1).tolist()
        if self.method.is_adaptive:
            now.kept[-1] = tuple(left)
        elif left != list(now.kept[-1]):
            raise RuntimeError(f"the method keeps {left} visual tokens of each prompt, asked for {list(now.kept[-1])}")
        local = pack_left(choice.stays & is_visual | is_valid & ~is_visual)
        now.has_filling = len(set((local >= 0).sum(dim=1).tolist())) > 1
        before = torch.zeros(B, Q + 1, dtype=torch.bool, device=hidden.device).scatter(1, torch.where(is_valid, current, Q), True)
        now.rows = torch.where(local >= 0, current.gather(1, local.clamp(min=0)), -1)
        after = torch.zeros_like(before).scatter(1, torch.where(now.rows >= 0, now.rows, Q), True)
        now.dropped.append((number, (before & ~after)[:, :Q]))
        return gather_tokens(hidden if choice.hidden is None else choice.hidden.to(hidden), local)

    def _read_next(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> AttentionCall:
        """The call that the layer to come would make on all tokens: its projections run, its kernel does not."""
        norm = getattr(layer, "input_layernorm", None)
        if norm is None:
            raise ValueError(f"a {type(layer).__name__} has no input_layernorm to read the next layer's attention through; take fastv")
        now, seen = self._now, []
        rows, is_valid = now.tokens()
        options = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "past_key_values", "use_cache")}
        rotary = options.get("position_embeddings")
        if rotary is not None:
            options["position_embeddings"] = tuple(gather_tokens(x, rows.clamp(min=0)) for x in rotary)
        options["attention_mask"] = is_valid  # for the reader, no kernel sees it
        options["position_ids"] = None

        def stop(call: AttentionCall):
            seen.append(call)
            raise _Read

        tap = Tap(attention_of(layer), stop)
        try:
            with torch.no_grad():
                attention_of(layer)(hidden_states=norm(hidden), past_key_values=None, **options)
        except _Read:
            pass
        finally:
            tap.remove()
        return seen[0]

    def _record(self, now: Forward) -> None:
        """Write this forward's tokens into the slots of every segment."""
        for number, segment in enumerate(now.ledger.segments):
            if now.rows is None and now.all_valid:
                segment.columns.append((now.ledger.length, now.Q))
                continue
            rows, is_real, is_clean = now.columns[number] if number in now.columns else (*now.tokens(), now.all_valid)
            segment.columns.append(torch.where(is_real, rows + now.ledger.length, -1))
            segment.is_clean = segment.is_clean and is_clean

    def _mask(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict):
        """The mask of this layer, made once for all layers of a segment and a kind of attention."""
        now = self._now
        window = self._window if self._kinds is None or self._kinds[number] == "sliding_attention" else None
        key = (now.segment, window)
        if key not in now.masks:
            cache = kwargs.get("past_key_values") if now.has_past else None
            num_past = cache.layers[number].keys.shape[-2] if cache is not None else 0
            now.masks[key] = self._make_mask(kwargs.get("attention_mask"), num_past, window, hidden)
        return now.masks[key]

    def _make_mask(self, given, num_past: int, window: int | None, hidden: Tensor):
        """given: the model's own mask for the whole sequence. Returns one for the tokens that are in this segment's caches."""
        now = self._now
        rows, is_real, is_clean = now.columns[now.segment]
        segment = None if now.ledger is None else now.ledger.segments[now.segment]
        K, is_single = rows.shape[1], rows.shape[1] == 1
        past_clean = not num_past or segment.is_clean
        sees_all = window is None or (now.ledger.length if now.ledger else 0) + now.Q <= window
        if is_single and past_clean and is_clean and sees_all:
            return None  # one query that sees every slot
        past = segment.joined(now.B, rows.device)[:, -num_past:] if num_past else rows.new_zeros(now.B, 0)
        if is_flash(self.model):
            return None if past_clean and is_clean else torch.cat([past >= 0, is_real], dim=1)
        start = now.ledger.length if num_past else 0
        if isinstance(given, Tensor) and given.ndim == 4 and now.drops_tokens:
            allowed = gather_square(given[..., -now.Q :], rows)
            allowed = allowed if allowed.dtype == torch.bool else allowed > -1
        elif given is None and not num_past and is_clean and now.drops_tokens:
            return None  # causal, and so are the rows that are left
        else:
            distance = rows[:, None, :, None] - rows[:, None, None, :]
            allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        allowed = allowed & is_real[:, None, None, :] | torch.eye(K, dtype=torch.bool, device=rows.device) & ~is_real[:, None, :, None]
        if num_past:
            seen = (past >= 0)[:, None, None, :].expand(now.B, allowed.shape[1], K, -1)
            if window is not None:
                seen = seen & (rows[:, None, :, None] + start - past[:, None, None, :] < window)
            allowed = torch.cat([seen, allowed], dim=-1)
        if self.text.config._attn_implementation == "sdpa":
            return allowed
        return torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~allowed, torch.finfo(hidden.dtype).min)

    def _compact(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables with this segment's tokens counted anew."""
        now = self._now
        if now.segment not in now.rotary:
            _, is_real, _ = now.columns[now.segment]
            segment = None if now.ledger is None or not now.has_past else now.ledger.segments[now.segment]
            start = 0 if segment is None else (segment.joined(now.B, hidden.device) >= 0).sum(dim=1, keepdim=True)
            now.rotary[now.segment] = self.text.rotary_emb(hidden, (start + is_real.cumsum(dim=1) - 1).clamp(min=0))
        return now.rotary[now.segment]

    def _deepstack(self, mask: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Qwen3 adds features to the visual tokens after early layers: only to those that are left."""
        now = self._now
        if now is None or now.rows is None:
            return mask, embeds
        places = now.rows.clamp(min=0)
        number = (mask.flatten().long().cumsum(0) - 1).view_as(mask).gather(1, places)  # which of all visual tokens this is
        mask = mask.gather(1, places) & (now.rows >= 0)
        return mask, embeds[number[mask]]


class _Read(Exception):  # noqa: N818  not an error: the kernel has been seen
    pass


def _is_per_token(x, now: Forward) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (now.B, now.Q)


def check_inside(model: nn.Module, stages: Stages, positions: str) -> None:
    """Raise ValueError, with the reason, unless tokens may leave before these layers of the model's language model."""
    family, text, kind = family_of(model), text_model(model), kind_of(model)
    layers = text.layers
    if _MARK in model.__dict__:
        raise ValueError(f"the layers of this {kind} are already pruned: leave the first `with vistok.prune(...)` or call its remove()")
    if family.not_inside:
        raise ValueError(f"no token can leave inside {kind}: {family.not_inside}; prune before the language model")
    if getattr(text.config, "num_kv_shared_layers", 0):
        raise ValueError(f"no token can leave inside {kind}: late layers read the keys of early ones; prune before the language model")
    if not all(1 <= layer < len(layers) for layer in stages.at):
        raise ValueError(
            f"layers={stages.at} but tokens leave before the layers 1 to {len(layers) - 1}; before layer 0 is before the language model"
        )
    kernel = text.config._attn_implementation
    if kernel not in ("sdpa", "eager") and "flash" not in kernel:
        raise ValueError(f"the attention kernel {kernel!r} is not supported inside the language model: sdpa, eager and flash_attention are")
    if "flash" in kernel and sliding_window(model) is not None:
        raise ValueError(
            "FlashAttention measures a sliding window in the tokens that are left: set sdpa, or prune before the language model"
        )
    if positions not in ("keep", "compact"):
        raise ValueError(f'positions={positions!r} but it is "keep" (the unpruned prompt\'s) or "compact" (counted anew in each segment)')
    if positions == "compact":
        rotary = getattr(text, "rotary_emb", None)
        if rotary is None or sliding_window(model) is not None or "mrope" in str(getattr(text.config, "rope_parameters", "")):
            raise ValueError(
                f'positions="compact" needs one table of rotary positions in a line and no sliding window, which {kind} has not'
            )


def prune_layers(model: nn.Module, method: "str | LayerMethod", *, seed: int = 0, positions: str = "keep", **stages) -> PrunedLayers:
    """Drop visual tokens between layers of the language model in every forward with images until the returned handle is removed.

    method: a name in `vistok.pruning.stages`, or a `LayerMethod`. stages: layer with keep or keep_ratio, or layers with keep_ratios, shares
    of the visual tokens that a prompt began with; without layers, the paper's, scaled to the model's depth. seed: of "random". positions:
    "keep" or "compact" (counted anew after each stage, as the original code of PyramidDrop and SparseVLM does).
    """
    known = layer_methods(seed)
    if isinstance(method, str) and method not in known:
        raise ValueError(f"method {method!r} is not known inside a language model; there are {', '.join(known)}")
    family_of(model)
    plan = create_stages(method if isinstance(method, str) else "", len(text_model(model).layers), **stages)
    return PrunedLayers(model, known[method] if isinstance(method, str) else method, plan, positions=positions)
