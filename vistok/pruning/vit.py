"""Token reduction inside vision transformers of timm and transformers, by hooks on their own modules.

    k, q   = outputs of k_norm, q_norm (timm) or k_proj, q_proj (transformers): fused attention stays on
    A      = input of timm's attn_drop, only in layers where the method reads the whole map: these run timm's written-out attention
    bias   = log size as the attention's additive mask                proportional attention
    x, s   = fold(x, s) in a pre-hook of the second norm              between attention and feed-forward
    f      = what the feed-forward branch would add, kept aside       that branch ran on the folded tokens
    out    = x + f in a hook of the block                             so no forward is copied or replaced
    rope   = the kept patches' rows of the rotary table
    pool   = the model's own pooling on the restored tokens: mean and attention pooling weigh a token with its size

State of a forward is kept by layer, so activation checkpointing recomputes the same. B batch, N tokens, P prefix tokens (class,
distillation, registers) in front, which are never reduced.
"""

import time
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from vistok.pruning.blocks import BlockParts, ViTParts, check_mask, parts_of
from vistok.pruning.cost import ViTCost, ViTReport
from vistok.pruning.hooks import Hooked
from vistok.pruning.plan import ReductionPlan, gather_rows
from vistok.pruning.strategies import Strategy, create_strategy, log_size

_MARK = "_vistok_pruning"


@dataclass(frozen=True)
class _Entry:
    """The tokens as they enter a layer."""

    num_tokens: int
    size: Tensor | None = None  # [B, N, 1] float32; None: every token stands for itself
    position: Tensor | None = None  # [B, N] original index; None: all are in place


class _View:
    """One layer in one forward: what the hooks saw. Implements strategies.LayerView."""

    def __init__(self, layer: int, num_layers: int, num_prefix: int, parts: BlockParts, is_proportional: bool):
        self.layer, self.num_layers, self.num_prefix = layer, num_layers, num_prefix
        self.parts, self.is_proportional = parts, is_proportional
        self.entry: _Entry | None = None
        self.rope = self.input = self.query = self.key = self.probabilities = None
        self.count = self.num_patches = 0
        self.merged = self.branch = self.plan = self.after = None

    def metric(self, name: str) -> Tensor:
        if name == "input":
            return self.input.detach()
        if name not in ("key", "query"):
            raise ValueError(f"metric={name!r} but it is one of key, query, input")
        return _mean_of_heads(getattr(self, name).detach())

    def keys(self) -> Tensor:
        return self.key.detach()

    def attention(self, rows: int | None = None) -> Tensor:
        if self.probabilities is not None:
            return self.probabilities[:, :, :rows].detach()
        query, key = self._rotated(self.query.detach()), self._rotated(self.key.detach())
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query[:, :, :rows].float() @ key.float().transpose(-2, -1) * self.parts.scale
        if self.is_proportional and self.entry.size is not None:
            logits = logits + log_size(self.entry.size, torch.float32)
        return logits.softmax(dim=-1)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.rope is None:
            return x
        P = self.num_prefix
        return torch.cat([x[:, :, :P], self.parts.rotate(x[:, :, P:], self.rope)], dim=2)


class PrunedViT(Hooked):
    """The hooks on one model."""

    def __init__(self, model: nn.Module, strategy: Strategy, *, restore: bool = False, timed: bool = False):
        self.parts = parts_of(model)
        check_supported(model, self.parts, strategy, restore=restore)
        self.model, self.strategy, self.timed = model, strategy, timed
        self._restores = restore or (self.parts.head_reads_patches and strategy.is_merging)
        self._handles, self._schedule, self._unfused = [], {}, []
        self._planning, self._folding, self._start, self._total = 0.0, 0.0, 0.0, 0.0  # processor seconds
        depth, prefix = len(self.parts.blocks), self.parts.num_prefix
        self._views = [_View(layer, depth, prefix, part, strategy.is_proportional) for layer, part in enumerate(self.parts.blocks)]
        self._last: _Entry | None = None
        self._attach_all()

    def remove(self) -> None:
        """Take every hook off; the model is as it was. Reports and `plan` stay readable."""
        super().remove()
        while self._unfused:
            self._unfused.pop().fused_attn = True
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK]
            self.model.__dict__.pop("pool", None)

    @property
    def plan(self) -> ReductionPlan:
        """The reduction from the first layer's tokens to the last one's output, of the last forward."""
        self._require_forward()
        return self.plan_of(len(self._views))

    def plan_of(self, num_layers: int) -> ReductionPlan:
        """The reduction by the first layers of the last forward."""
        plans = [view.plan for view in self._views[:num_layers] if view.plan is not None]
        if not plans:
            return ReductionPlan.identity(self._batch_size, self._views[0].entry.num_tokens, self._device)
        total = plans[0]
        for step in plans[1:]:
            total = total.compose(step)
        return total

    @property
    def plans(self) -> list[ReductionPlan | None]:
        """The plan of each layer in the last forward, None where it reduced nothing."""
        self._require_forward()
        return [view.plan for view in self._views]

    @property
    def size(self) -> Tensor:
        """[B, N, 1] float32: how many original tokens each token that left the last layer stands for."""
        self._require_forward()
        size = self._last.size
        return torch.ones(self._batch_size, self._last.num_tokens, 1, device=self._device) if size is None else size

    def restore(self, tokens: Tensor, fill: float = 0.0) -> Tensor:
        """tokens: [B, N', ...] as `forward_features` returns them. Returns one row for every original token; dropped ones are `fill`."""
        return self.plan.restore(tokens, fill)

    def stats(self) -> ViTReport:
        """Token counts and multiply-adds of the last forward. Raises if the reduced blocks have not run."""
        self._require_forward()
        counts = (*[view.entry.num_tokens for view in self._views], self._last.num_tokens)
        full = (counts[0],) * len(counts)
        shares = [seconds / self._total if self.timed else None for seconds in (self._planning, self._folding)]
        cost = ViTCost.of(self.parts)
        return ViTReport(counts, cost.macs(counts, at_block_end=self.strategy.at_block_end), cost.macs(full, at_block_end=True), *shares)

    def _require_forward(self) -> None:
        if self._last is None:
            raise RuntimeError("no forward has run through the pruned blocks yet")

    def _attach(self) -> None:
        model = self.model
        model.__dict__[_MARK] = self
        if callable(getattr(model, "pool", None)):
            model.__dict__["pool"] = self._pool
        add = self._handles.append
        if self.parts.tower is not None:
            for pool in self.parts.pools:
                add(pool.register_forward_pre_hook(self._restore_input))
            if self._restores:
                add(self.parts.tower.register_forward_hook(self._restore_output))
        whole_maps = set(self.strategy.attention_layers(len(self._views)))
        for view in self._views:
            part = view.parts
            add(part.block.register_forward_pre_hook(self._hook(view, self._enter_block), with_kwargs=True))
            add(part.attention.register_forward_pre_hook(self._hook(view, self._enter_attention), with_kwargs=True))
            add(part.query.register_forward_hook(self._hook(view, self._see_query)))
            add(part.key.register_forward_hook(self._hook(view, self._see_key)))
            if view.layer in whole_maps and part.map_input is not None:
                # the method reads the whole map here: timm's written-out attention makes it once, a fused kernel and we would make it twice
                if part.attention.fused_attn:
                    part.attention.fused_attn = False
                    self._unfused.append(part.attention)
                add(part.map_input.register_forward_pre_hook(self._hook(view, self._see_probabilities)))
            if not self.strategy.at_block_end:
                add(part.norm.register_forward_pre_hook(self._hook(view, self._fold_branch)))
                add(part.branch.register_forward_hook(self._hook(view, self._set_branch_aside)))
            # first of its hooks: what transformers or others record of a block is what it returns
            add(part.block.register_forward_hook(self._hook(view, self._leave_block), prepend=True))

    @staticmethod
    def _hook(view: _View, method):
        return lambda *args: method(view, *args)

    # The hooks, in the order a block runs them.

    def _enter_block(self, view: _View, block: nn.Module, args: tuple, kwargs: dict):
        B, N, _ = args[0].shape
        masks = [kwargs.get(view.parts.mask), kwargs.get("is_causal") or None, *args[1:2]]
        if any(mask is not None for mask in masks):
            raise ValueError(
                f"token reduction does not support {view.parts.mask} or is_causal: a mask names tokens that may be merged by then"
            )
        if view.layer == 0:
            patches = N - view.num_prefix
            if patches not in self._schedule:
                protected = getattr(self.strategy, "num_protected_prefix", None)  # the others are merged, so they count as patches
                mergeable = patches if protected is None else N - min(protected, view.num_prefix)
                self._schedule[patches] = self.strategy.counts(view.num_layers, mergeable)
            self._batch_size, self._device = B, args[0].device
            view.entry = _Entry(N)
            if self.timed:
                self._planning, self._folding, self._start = 0.0, 0.0, time.process_time()
        if view.entry is None or view.entry.num_tokens != N:
            raise RuntimeError(f"layer {view.layer} got {N} tokens: the blocks must run in order, each on what the one before returned")
        view.num_patches = self._views[0].entry.num_tokens - view.num_prefix
        view.count = self._schedule[view.num_patches][view.layer]
        view.merged = view.branch = view.plan = None
        rope = kwargs.get(view.parts.rope)
        if rope is not None and view.entry.position is not None:
            position = view.entry.position[:, view.num_prefix :] - view.num_prefix
            rope = tuple(_rope_rows(table, position) for table in rope) if isinstance(rope, tuple) else _rope_rows(rope, position)
        view.rope = rope
        return (args, kwargs) if rope is None else (args, {**kwargs, view.parts.rope: rope})

    def _enter_attention(self, view: _View, attn: nn.Module, args: tuple, kwargs: dict):
        x = args[0] if args else kwargs["hidden_states"]
        if view.count:
            view.input = x
        if not self.strategy.is_proportional or view.entry.size is None:
            return None
        return args[:1], {**kwargs, view.parts.mask: log_size(view.entry.size, x.dtype)}

    def _see_query(self, view: _View, module: nn.Module, args: tuple, output: Tensor) -> None:
        if view.count:
            view.query = view.parts.heads(output)

    def _see_key(self, view: _View, module: nn.Module, args: tuple, output: Tensor) -> None:
        if view.count:
            view.key = view.parts.heads(output)

    def _see_probabilities(self, view: _View, module: nn.Module, args: tuple) -> None:
        if view.count:
            view.probabilities = args[0].float()

    def _fold_branch(self, view: _View, norm: nn.Module, args: tuple):
        if not view.count:
            return None
        view.merged = self._fold(view, args[0])
        return (view.merged,)

    def _set_branch_aside(self, view: _View, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not view.count:
            return None
        view.branch = output
        for module in view.parts.finish:
            view.branch = module(view.branch)
        # the block adds this to its unfolded tokens and the sum is thrown away: a number that broadcasts
        return output.new_zeros(1, 1, 1)

    def _leave_block(self, view: _View, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        result = None
        if view.count:
            result = self._fold(view, output) if self.strategy.at_block_end else view.merged + view.branch
        after = view.after if view.count else view.entry
        view.input = view.query = view.key = view.probabilities = view.merged = view.branch = view.after = None
        if view.layer + 1 < len(self._views):
            self._views[view.layer + 1].entry = after
            return result
        if self._views[0].entry.num_tokens == after.num_tokens and any(self._schedule[after.num_tokens - view.num_prefix]):
            raise RuntimeError("the schedule removes tokens but none was removed")
        self._last = after
        if self.timed:
            self._total = time.process_time() - self._start
        return result

    def _fold(self, view: _View, x: Tensor) -> Tensor:
        start = time.process_time() if self.timed else 0.0
        view.plan = self.strategy.plan(view, view.count)
        planned = time.process_time() if self.timed else 0.0
        merged, size = view.plan.merge(x, view.entry.size)
        position = None
        if view.rope is not None:
            before = view.entry.position
            position = view.plan.keep if before is None else view.plan.gather(before)
        view.after = _Entry(merged.shape[1], size, position)
        if self.timed:
            self._planning += planned - start
            self._folding += time.process_time() - planned
        return merged

    def _restore_input(self, module: nn.Module, args: tuple):
        return (self._whole(args[0]), *args[1:])

    def _restore_output(self, tower: nn.Module, args: tuple, output):
        output.last_hidden_state = self.plan.restore(output.last_hidden_state)
        if output.hidden_states is not None:
            states = enumerate(output.hidden_states)
            output.hidden_states = tuple(None if x is None else self.plan_of(layer).restore(x) for layer, x in states)
        return output

    def _whole(self, x: Tensor) -> Tensor:
        """The tokens that left the last layer, put back in place where they stand for more than themselves."""
        is_whole = self._last is not None and x.shape[1] == self._last.num_tokens and self._last.size is not None
        return self.plan.restore(x) if is_whole else x

    def _pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's pooling; where it looks at more than the prefix, on the tokens put back in place, which weighs each with its size."""
        pool = type(self.model).pool
        kind = pool_type or self.model.global_pool
        if kind not in ("", "token") or getattr(self.model, "attn_pool", None) is not None:
            x = self._whole(x)
        return pool(self.model, x) if pool_type is None else pool(self.model, x, pool_type)


def check_supported(model: nn.Module, parts: ViTParts, strategy: Strategy, *, restore: bool) -> None:
    """Raise ValueError, with the reason, where the parts of a model cannot be reduced in the way that is asked for."""
    name = type(model).__name__
    if _MARK in model.__dict__:
        raise ValueError(f"this {name} is already pruned: leave the first `with vistok.prune(...)` or call its remove()")
    if strategy.is_proportional:
        check_mask(parts)
    if parts.tower is None and restore:
        raise ValueError("restore is for models of transformers; with timm, `pruned.restore(model.forward_features(images))`")
    if parts.head_reads_patches and not strategy.is_merging:
        raise ValueError(f"the head of {name} averages all patches, so none may be dropped: merge them, for example with tome")


def prune_vit(model: nn.Module, method: "str | Strategy", *, restore: bool = False, timed: bool = False, **options) -> PrunedViT:
    """Reduce tokens in every forward of a vision transformer until the returned handle is removed.

    method: "tome", "pitome", "zero_tprune", "random", "uniform", "cls", or a strategy object. options: the strategy's fields, for example
    r=13, keep=98 or keep_ratio=0.5. restore: a tower of transformers returns every token again, each patch what it was merged into, dropped
    ones 0, so that whatever reads its grid goes on working. timed: measure the shares of planning and of folding (processor time).
    """
    return PrunedViT(model, create_strategy(method, **options), restore=restore, timed=timed)


def _mean_of_heads(x: Tensor) -> Tensor:
    """x: [B, H, N, d]. Returns [B, N, d]. In float32 halves of the heads are added: on a CPU quicker than a reduction over far strides."""
    if x.dtype != torch.float32:
        return x.mean(dim=1)
    number = x.shape[1]
    while x.shape[1] % 2 == 0:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return reduce(torch.add, x.unbind(1)) / number


def _rope_rows(rope: Tensor, position: Tensor) -> Tensor:
    """Rows of a rotary table [T, d], [H, T, d] or with a batch [B, 1|H, T, d], for the patches at position [B, T']: [B, 1|H, T', d]."""
    if rope.ndim == 4:
        index = position[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
        return rope.gather(2, index)
    if rope.ndim == 3:
        return rope[:, position].transpose(0, 1)
    B = position.shape[0]
    return gather_rows(rope.expand(B, -1, -1), position)[:, None]
