"""Pruning for the families whose visual tokens are not placeholders that a common decoder reads: Mllama, BLIP-2 and InstructBLIP.

    Mllama          the language model looks at the tiles of an image by cross-attention: fewer tokens of each tile become keys there; the
                    class token of a tile always stays. A tile is masked as a whole, so masks of later steps are cut by number.
    BLIP-2,         their own `generate` embeds the prompt and hands it on: rows of it leave before `language_model.generate`, and the
    InstructBLIP    others keep their positions. Only decoder language models: T5's positions are distances between what is left.

B prompts, T tiles of a prompt, N tokens of a tile, K of them kept, D width.
"""

import torch
from torch import Tensor, nn

from vistok.pruning.families import QUERY_FORMER, kind_of
from vistok.pruning.masks import gather_tokens, pack_left, take
from vistok.pruning.methods import topk
from vistok.pruning.plan import gather_rows
from vistok.pruning.selectors import ImageViews, Selection, Selector, create_selector
from vistok.pruning.vlm import VLMReport

_MARK = "_vistok_pruning"
_KEPT = "_vistok_cross_kept"


class _PrunedKeys:
    """What the two have in common: a selector of features, a report, and a model that gets its own back."""

    def __init__(self, model: nn.Module, selector: Selector, *, keep: int | None, keep_ratio: float | None):
        topk.count_to_keep(1, None if keep is None else 1, keep_ratio)
        if selector.layers or selector.reads_text or selector.merges or selector.for_video:
            raise ValueError(f"only methods that select by features act in {kind_of(model)}: divprune, dart, random, uniform, or your own")
        if _MARK in model.__dict__:
            raise ValueError(f"this {kind_of(model)} is already pruned: leave the first `with vistok.prune(...)` or call its remove()")
        self.model, self.selector, self.keep, self.keep_ratio = model, selector, keep, keep_ratio
        self._report: VLMReport | None = None
        model.__dict__[_MARK] = self

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model its own back. The report stays readable."""
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK]

    def stats(self) -> VLMReport:
        """Token counts of the last run with images."""
        if self._report is None:
            raise RuntimeError("no images have run through the pruned model yet")
        return self._report

    def _select(self, features: Tensor) -> Tensor:
        """features: [I, n, D]. Returns [I, K] sorted indices."""
        n = features.shape[1]
        keep = topk.count_to_keep(n, None if self.keep is None else min(self.keep, n), self.keep_ratio)
        with torch.no_grad():
            result = self.selector.select(ImageViews(features, range(len(features))), keep)
        indices = result.indices if isinstance(result, Selection) else result
        if indices.shape != (len(features), keep):
            raise ValueError(f"the selector gave indices of shape {tuple(indices.shape)}, expected {(len(features), keep)}")
        return indices.sort(dim=-1).values


class PrunedCrossAttention(_PrunedKeys):
    """Mllama with fewer keys in its cross-attention, in `generate` and in plain forwards."""

    def __init__(self, model: nn.Module, selector: Selector, *, keep: int | None = None, keep_ratio: float | None = None):
        super().__init__(model, selector, keep=keep, keep_ratio=keep_ratio)
        self._hook = model.base_model.language_model.register_forward_pre_hook(self._enter_text, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        super().remove()

    def _enter_text(self, text: nn.Module, args: tuple, kwargs: dict):
        states, mask, cache = (kwargs.get(name) for name in ("cross_attention_states", "cross_attention_mask", "past_key_values"))
        kept = getattr(cache, _KEPT, None)
        N = self.model.base_model.vision_model.num_patches
        if states is not None:
            tiles = states.reshape(-1, N, states.shape[-1])
            indices = self._select(tiles[:, 1:]) + 1
            indices = torch.cat([indices.new_zeros(len(indices), 1), indices], dim=1)
            kept = indices.shape[1]
            kwargs = {**kwargs, "cross_attention_states": gather_rows(tiles, indices)}
            length = mask.shape[2] if mask is not None else 0
            self._report = VLMReport((N,) * len(tiles), (kept,) * len(tiles), length, length)
            if cache is not None:
                setattr(cache, _KEPT, kept)
        if kept is not None and mask is not None:
            kwargs = {**kwargs, "cross_attention_mask": mask.unflatten(-1, (-1, N))[..., :kept].flatten(-2)}
        return args, kwargs


class PrunedQueryFormer(_PrunedKeys):
    """BLIP-2 or InstructBLIP whose language model gets fewer query tokens in `generate`."""

    def __init__(self, model: nn.Module, selector: Selector, *, keep: int | None = None, keep_ratio: float | None = None):
        if model.language_model.config.is_encoder_decoder:
            raise ValueError(
                f"{kind_of(model)} with {type(model.language_model).__name__}: an encoder with relative positions measures distance in the "
                "tokens that are left, so none can leave exactly"
            )
        super().__init__(model, selector, keep=keep, keep_ratio=keep_ratio)
        model.language_model.__dict__["generate"] = self._generate

    def remove(self) -> None:
        if self.model.__dict__.get(_MARK) is self:
            self.model.language_model.__dict__.pop("generate", None)
        super().remove()

    def rewrite(self, input_ids: Tensor, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[dict, Tensor]:
        """The language model's inputs without the query tokens that leave, and rows [B, K]: which token each is, -1 for padding."""
        is_visual = input_ids == self.model.config.image_token_id
        B, D = len(input_ids), inputs_embeds.shape[-1]
        indices = self._select(inputs_embeds[is_visual].view(B, -1, D))
        n = int(is_visual[0].sum())
        stays = attention_mask.bool()
        stays[is_visual] = topk.mask_of(indices, n).flatten()
        rows = pack_left(stays)
        positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        self._report = VLMReport((n,) * B, (indices.shape[1],) * B, input_ids.shape[1], rows.shape[1])
        new = {
            "input_ids": take(input_ids, rows, self.model.language_model.generation_config.pad_token_id or 0),
            "inputs_embeds": gather_tokens(inputs_embeds, rows), "attention_mask": (rows >= 0).to(attention_mask.dtype),
            "position_ids": take(positions, rows),
        }  # fmt: skip
        return new, rows

    def _generate(self, *, input_ids: Tensor, inputs_embeds: Tensor, attention_mask: Tensor, **options):
        """The language model's generate on fewer rows."""
        if "max_length" in options:
            raise ValueError("max_length counts the prompt, which pruning shortens: give max_new_tokens")
        new, rows = self.rewrite(input_ids, inputs_embeds, attention_mask)
        result = type(self.model.language_model).generate(self.model.language_model, **new, **options)
        sequences = result if isinstance(result, Tensor) else result.sequences
        given = input_ids.repeat_interleave(sequences.shape[0] // len(input_ids), dim=0)
        sequences = torch.cat([given, sequences[:, rows.shape[1] :]], dim=1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result


def prune_cross(
    model: nn.Module, method: "str | Selector", *, keep: int | None = None, keep_ratio: float | None = None, seed: int = 0
) -> PrunedCrossAttention | PrunedQueryFormer:
    """Prune the visual tokens of Mllama, BLIP-2 or InstructBLIP until the returned handle is removed.

    method: divprune, dart, random, uniform, or a selector of features. keep or keep_ratio: tokens of each tile, or query tokens, that stay.
    """
    kind = PrunedQueryFormer if kind_of(model) in QUERY_FORMER else PrunedCrossAttention
    return kind(model, create_selector(method, seed=seed), keep=keep, keep_ratio=keep_ratio)
