"""Token reduction inside timm vision transformers, by hooks on their own modules.

    k, q   = outputs of blk.attn.k_norm, q_norm (identities where unused): fused attention stays on
    A      = input of blk.attn.attn_drop, only in layers where the method reads the whole map: these run timm's written-out attention
    bias   = log size as attn_mask of blk.attn                        proportional attention
    x, s   = fold(x, s) in a pre-hook of blk.norm2                    between attention and feed-forward
    f      = output of blk.drop_path2, kept aside                     the feed-forward branch on the folded tokens
    out    = x + f in a hook of blk                                   so no forward of timm is copied or replaced
    rope   = the kept patches' rows of the rotary table
    pool   = timm's own pooling on the restored tokens: mean and attention pooling weigh a token with its size

State of a forward is kept by layer, so activation checkpointing recomputes the same. B batch, N tokens, P prefix tokens (class,
distillation, registers) in front, which are never reduced.
"""

import inspect
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.pruning.plan import ReductionPlan, gather_rows
from vistok.pruning.strategies import Strategy, create_strategy, log_size

_MARK = "_vistok_pruning"


@dataclass(frozen=True)
class ViTReport:
    """What the last forward did."""

    num_tokens: tuple[int, ...]
    """Tokens entering each layer, prefix included, and leaving the last."""
    macs: int
    """Multiply-adds of one image: stem, blocks at their true token counts, head. Matching and folding are not counted."""
    full_macs: int
    """The same without reduction."""
    overhead_share: float | None
    """Share of the forward's wall-clock spent on planning and folding; None unless attached with timed=True."""

    @property
    def macs_ratio(self) -> float:
        return self.macs / self.full_macs


@dataclass(frozen=True)
class _Entry:
    """The tokens as they enter a layer."""

    num_tokens: int
    size: Tensor | None = None  # [B, N, 1] float32; None: every token stands for itself
    position: Tensor | None = None  # [B, N] original index; None: all are in place


class _View:
    """One layer in one forward: what the hooks saw. Implements strategies.LayerView."""

    def __init__(self, layer: int, num_layers: int, num_prefix: int, attn: nn.Module, is_proportional: bool):
        self.layer, self.num_layers, self.num_prefix = layer, num_layers, num_prefix
        self.attn, self.is_proportional = attn, is_proportional
        self.entry: _Entry | None = None
        self.rope = self.input = self.query = self.key = self.probabilities = None
        self.count = 0
        self.merged = self.branch = self.plan = self.after = None

    def metric(self, name: str) -> Tensor:
        if name == "input":
            return self.input.detach()
        if name not in ("key", "query"):
            raise ValueError(f"metric={name!r} but it is one of key, query, input")
        return getattr(self, name).detach().mean(dim=1)

    def keys(self) -> Tensor:
        return self.key.detach()

    def attention(self, rows: int | None = None) -> Tensor:
        if self.probabilities is not None:
            return self.probabilities[:, :, :rows].detach()
        query, key = self._rotated(self.query.detach()), self._rotated(self.key.detach())
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query[:, :, :rows].float() @ key.float().transpose(-2, -1) * self.attn.scale
        if self.is_proportional and self.entry.size is not None:
            logits = logits + log_size(self.entry.size, torch.float32)
        return logits.softmax(dim=-1)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.rope is None:
            return x
        from timm.layers import apply_rot_embed_cat

        P, half = self.num_prefix, getattr(self.attn, "rotate_half", False)
        return torch.cat([x[:, :, :P], apply_rot_embed_cat(x[:, :, P:], self.rope, half=half)], dim=2)


class PrunedViT:
    """The hooks on one model. A context manager: leaving it, by an exception too, takes them off; so does `remove`."""

    def __init__(self, model: nn.Module, strategy: Strategy, *, timed: bool = False):
        check_supported(model, is_proportional=strategy.is_proportional)
        self.model, self.strategy, self.timed = model, strategy, timed
        self._handles, self._schedule, self._unfused = [], {}, []
        self._seconds, self._start, self._total = 0.0, 0.0, 0.0
        attentions = [block.attn for block in model.blocks]
        prefix = model.num_prefix_tokens
        self._views = [_View(layer, len(attentions), prefix, attn, strategy.is_proportional) for layer, attn in enumerate(attentions)]
        self._last: _Entry | None = None
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> "PrunedViT":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off; the model is as it was. Reports and `plan` stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._unfused:
            self._unfused.pop().fused_attn = True
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK]
            self.model.__dict__.pop("pool", None)

    @property
    def plan(self) -> ReductionPlan:
        """The reduction from the first layer's tokens to the last one's output, of the last forward."""
        self._require_forward()
        plans = [view.plan for view in self._views if view.plan is not None]
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
        share = self._seconds / self._total if self.timed else None
        return ViTReport(counts, _macs(self.model, counts, self.strategy.at_block_end), _macs(self.model, full, True), share)

    def _require_forward(self) -> None:
        if self._last is None:
            raise RuntimeError("no forward has run through the pruned blocks yet")

    def _attach(self) -> None:
        model = self.model
        model.__dict__[_MARK] = self
        if callable(getattr(model, "pool", None)):
            model.__dict__["pool"] = self._pool
        whole_maps = set(self.strategy.attention_layers(len(self._views)))
        for view, block in zip(self._views, model.blocks):
            add = self._handles.append
            if view.layer in whole_maps:
                # the method reads the whole map here: timm's written-out attention makes it once, a fused kernel and we would make it twice
                if block.attn.fused_attn:
                    block.attn.fused_attn = False
                    self._unfused.append(block.attn)
                add(block.attn.attn_drop.register_forward_pre_hook(self._hook(view, self._see_probabilities)))
            add(block.register_forward_pre_hook(self._hook(view, self._enter_block), with_kwargs=True))
            add(block.attn.register_forward_pre_hook(self._hook(view, self._enter_attention), with_kwargs=True))
            add(block.attn.q_norm.register_forward_hook(self._hook(view, self._see_query)))
            add(block.attn.k_norm.register_forward_hook(self._hook(view, self._see_key)))
            if not self.strategy.at_block_end:
                add(block.norm2.register_forward_pre_hook(self._hook(view, self._fold_branch)))
                add(block.drop_path2.register_forward_hook(self._hook(view, self._set_branch_aside)))
            add(block.register_forward_hook(self._hook(view, self._leave_block)))

    @staticmethod
    def _hook(view: _View, method):
        return lambda *args: method(view, *args)

    # The hooks, in the order a block runs them.

    def _enter_block(self, view: _View, block: nn.Module, args: tuple, kwargs: dict):
        B, N, _ = args[0].shape
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("token reduction does not support attn_mask or is_causal: a mask names tokens that may be merged by then")
        if view.layer == 0:
            patches = N - view.num_prefix
            if patches not in self._schedule:
                self._schedule[patches] = self.strategy.counts(view.num_layers, patches)
            self._batch_size, self._device = B, args[0].device
            view.entry = _Entry(N)
            if self.timed:
                self._seconds, self._start = 0.0, time.perf_counter()
        if view.entry is None or view.entry.num_tokens != N:
            raise RuntimeError(f"layer {view.layer} got {N} tokens: the blocks must run in order, each on what the one before returned")
        view.count = self._schedule[self._views[0].entry.num_tokens - view.num_prefix][view.layer]
        view.merged = view.branch = view.plan = None
        rope = kwargs.get("rope")
        if rope is not None and view.entry.position is not None:
            rope = _rope_rows(rope, view.entry.position[:, view.num_prefix :] - view.num_prefix)
        view.rope = rope
        return (args, kwargs) if rope is None else (args, {**kwargs, "rope": rope})

    def _enter_attention(self, view: _View, attn: nn.Module, args: tuple, kwargs: dict):
        if view.count:
            view.input = args[0]
        if not self.strategy.is_proportional or view.entry.size is None:
            return None
        return args, {**kwargs, "attn_mask": log_size(view.entry.size, args[0].dtype)}

    def _see_query(self, view: _View, module: nn.Module, args: tuple, output: Tensor) -> None:
        if view.count:
            view.query = output

    def _see_key(self, view: _View, module: nn.Module, args: tuple, output: Tensor) -> None:
        if view.count:
            view.key = output

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
            self._total = time.perf_counter() - self._start
        return result

    def _fold(self, view: _View, x: Tensor) -> Tensor:
        start = time.perf_counter() if self.timed else 0.0
        view.plan = self.strategy.plan(view, view.count)
        merged, size = view.plan.merge(x, view.entry.size)
        position = None
        if view.rope is not None:
            before = view.entry.position
            position = view.plan.keep if before is None else view.plan.gather(before)
        view.after = _Entry(merged.shape[1], size, position)
        if self.timed:
            self._seconds += time.perf_counter() - start
        return merged

    def _pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's pooling; where it looks at more than the prefix, on the tokens put back in place, which weighs each with its size."""
        pool = type(self.model).pool
        kind = pool_type or self.model.global_pool
        is_whole = self._last is not None and x.shape[1] == self._last.num_tokens and self._last.size is not None
        if is_whole and (kind not in ("", "token") or getattr(self.model, "attn_pool", None) is not None):
            x = self.plan.restore(x)
        return pool(self.model, x) if pool_type is None else pool(self.model, x, pool_type)


def check_supported(model: nn.Module, *, is_proportional: bool) -> None:
    """Raise ValueError, with the reason, unless every block of the model is one whose tokens may be reduced."""
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(model).__name__
    if not isinstance(model, (VisionTransformer, Eva)):
        raise ValueError(
            f"{name} is not supported: token reduction knows timm's VisionTransformer (ViT, DeiT, CLIP, DINOv2, SigLIP) and Eva"
        )
    if _MARK in model.__dict__:
        raise ValueError(f"this {name} is already pruned: leave the first `with vistok.prune(...)` or call its remove()")
    for index, block in enumerate(model.blocks):
        if type(block) not in (Block, EvaBlock):
            kind = f"{type(block).__module__.rsplit('.', 1)[-1]}.{type(block).__name__}"
            raise ValueError(
                f"block {index} of this {name} is a {kind}; supported are pre-norm blocks: vision_transformer.Block, eva.EvaBlock"
            )
        missing = [part for part in ("q_norm", "k_norm", "attn_drop") if not isinstance(getattr(block.attn, part, None), nn.Module)]
        if missing:
            raise ValueError(f"the attention of block {index}, {type(block.attn).__name__}, has no {' and '.join(missing)} to read from")
        if is_proportional and "attn_mask" not in inspect.signature(block.attn.forward).parameters:
            raise ValueError(f"{type(block.attn).__name__} takes no attn_mask; update timm, or turn is_proportional off")


def prune_vit(model: nn.Module, method: "str | Strategy", *, timed: bool = False, **options) -> PrunedViT:
    """Reduce tokens in every forward of a timm vision transformer until the returned handle is removed.

    method: "tome", "pitome", "zero_tprune", "random", "uniform", "cls", or a strategy object. options: the strategy's fields, for example
    r=13, keep=98 or keep_ratio=0.5. timed: measure the share of planning and folding (wall clock).
    """
    return PrunedViT(model, create_strategy(method, **options), timed=timed)


def _rope_rows(rope: Tensor, position: Tensor) -> Tensor:
    """Rows of a rotary table [T, d], [H, T, d] or with a batch [B, 1|H, T, d], for the patches at position [B, T']: [B, 1|H, T', d]."""
    if rope.ndim == 4:
        index = position[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
        return rope.gather(2, index)
    if rope.ndim == 3:
        return rope[:, position].transpose(0, 1)
    B = position.shape[0]
    return gather_rows(rope.expand(B, -1, -1), position)[:, None]


def _macs(model: nn.Module, counts: tuple[int, ...], at_block_end: bool) -> int:
    """Multiply-adds of one image with counts[l] tokens in layer l's attention; its feed-forward sees them reduced unless at_block_end."""

    def weights(module: nn.Module, kind: type[nn.Module]) -> int:
        return sum(part.weight.numel() for part in module.modules() if isinstance(part, kind))

    total = weights(model.patch_embed, nn.Conv2d) * (counts[0] - model.num_prefix_tokens)
    for block, before, after in zip(model.blocks, counts, counts[1:]):
        width = block.attn.proj.in_features
        total += weights(block.attn, nn.Linear) * before + 2 * width * before**2
        total += weights(block.mlp, nn.Linear) * (before if at_block_end else after)
    return total + weights(model.head, nn.Linear)
