"""Visual-token pruning before the language model, for stock transformers vision-language models: shorter inputs, no hooks inside.

    encode the images -> select among the features the language model would see -> generate() gets
        input_ids, attention_mask   without the dropped placeholders, rows padded on the left again
        position_ids                of the unpruned prompt, gathered: what is left keeps its place
        mm_encoder_outputs          the kept features, so the images are encoded once
    -> the returned sequences carry the original prompt again

So any cache, attention kernel, batch and decoding mode of generate() works, and the result equals masking the dropped tokens as keys.
A cache that comes out remembers the prompt it was made from, so the conversation can go on with it.
B prompts, L prompt tokens, K tokens of the longest prompt that is left, n visual tokens of an image.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.pruning.families import attention_of, family_of, is_flash, kind_of, sliding_window, text_model, vision_layers, visual_mask
from vistok.pruning.features import VisualFeatures, merged_before_projector
from vistok.pruning.hooks import Hooked
from vistok.pruning.masks import pack_left, take
from vistok.pruning.methods import topk
from vistok.pruning.plan import gather_rows
from vistok.pruning.selectors import ImageViews, Selection, Selector, create_selector
from vistok.pruning.towers import TowerTap

_MARK = "_vistok_pruning"
_PROMPT = "_vistok_prompt"
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
_TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class VLMReport:
    """What the last generate() did."""

    num_visual: tuple[int, ...]
    """Visual tokens of each image (or video)."""
    num_kept: tuple[int, ...]
    """Visual tokens of each image that reached the language model, newlines included."""
    prompt_length: int
    """Tokens of the prompt, padding included, as it was given."""
    pruned_length: int
    """The same as the language model saw it: the length of every layer's cache after the prompt."""


@dataclass(frozen=True)
class _Prompt:
    """What a cache was made from."""

    length: int
    """L, tokens of the prompt as it was given."""
    inputs: dict
    """The rewritten input_ids, attention_mask, position_ids and token types, [..., K]."""


class PrunedVLM(Hooked):
    """Pruning of one model's `generate`; leaving it gives the model's own back."""

    def __init__(
        self, model: nn.Module, selector: Selector, *, keep: int | None = None, keep_ratio: float | None = None, positions: str = "keep"
    ):
        if positions not in ("keep", "compact"):
            raise ValueError(f'positions={positions!r} but it is "keep" (the unpruned prompt\'s) or "compact" (counted anew)')
        if not (selector.is_adaptive and keep is None and keep_ratio is None):
            topk.count_to_keep(1, None if keep is None else 1, keep_ratio)
        self.family = family_of(model)
        if _MARK in model.__dict__:
            raise ValueError(f"this {kind_of(model)} is already pruned: leave the first `with vistok.prune(...)` or call its remove()")
        self.model, self.selector, self.keep, self.keep_ratio, self.positions = model, selector, keep, keep_ratio, positions
        self.layers = _tower_layers(model, selector) if selector.layers else ()
        if self.layers:
            TowerTap(model, self.layers)  # refuses a family whose tower is not mapped
        self._report: VLMReport | None = None
        self._dropped: Tensor | None = None
        self._is_generating = False
        self._handles = [
            model.register_forward_pre_hook(self._refuse_plain_forward, with_kwargs=True),
            text_model(model).register_forward_pre_hook(self._keep_one_sequence, with_kwargs=True),
            *[layer.register_forward_pre_hook(self._hide_gaps, with_kwargs=True) for layer in text_model(model).layers if is_flash(model)],
        ]
        model.__dict__[_MARK] = self
        model.__dict__["generate"] = self._generate

    def remove(self) -> None:
        """Give the model its own `generate` back. The report stays readable."""
        super().remove()
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK], self.model.__dict__["generate"]

    def stats(self) -> VLMReport:
        """Token counts of the last generate()."""
        if self._report is None:
            raise RuntimeError("no generate() with images has run through the pruned model yet")
        return self._report

    def drops(self) -> list[tuple[int, Tensor]]:
        """[(0, [B, L] bool)]: the prompt tokens that no layer of the last generate() saw. Raises ValueError for a method that merges."""
        if self.selector.merges:
            raise ValueError("this method merges tokens: what it does is not the same as masking some of them")
        if self._dropped is None:
            raise RuntimeError("no generate() with images has run through the pruned model yet")
        return [(0, self._dropped)]

    @torch.no_grad()
    def rewrite(self, **inputs) -> tuple[dict, Tensor]:
        """The processor's inputs for generate() without the tokens that pruning drops.

        Returns (inputs, rows): rows [B, K] int64 says which prompt token each one left is, -1 for padding on the left.
        """
        model, ids, mask = self.model, inputs["input_ids"], inputs["attention_mask"]
        self._check_window(int(mask.sum(dim=1).max()))
        is_visual = visual_mask(model, ids)
        positions = model._prepare_position_ids_for_generation(ids, {name: value for name, value in inputs.items() if name != "input_ids"})
        tap = TowerTap(model, self.layers) if self.layers else nullcontext()
        with tap, merged_before_projector(model, self.selector) as before:
            encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
        visual = VisualFeatures(model, encoded.pop("mm_encoder_outputs"), inputs, before.projected)
        if visual.num_tokens != int(is_visual.sum()):
            raise ValueError(f"the images give {visual.num_tokens} features but the prompts have {int(is_visual.sum())} image tokens")
        tower = tap.views(visual.num_patches, inputs) if self.layers else None
        words = self._words(ids, mask.bool() & ~is_visual, is_visual, visual) if self.selector.reads_text else None
        chosen = self._select(visual, tower, words)
        stays = mask.bool()
        stays[is_visual] = visual.kept_in_prompt_order(chosen, ids, is_visual)
        self._dropped = mask.bool() & ~stays
        rows = pack_left(stays)
        for name in ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw"):
            encoded.pop(name, None)
        encoded["input_ids"] = take(ids, rows, model.generation_config.pad_token_id or 0)
        encoded["attention_mask"] = (rows >= 0).to(mask.dtype)
        encoded["position_ids"] = take(positions, rows, 0) if self.positions == "keep" else _compact(positions, rows)
        encoded |= {name: take(encoded[name], rows, 0) for name in _TYPES if encoded.get(name) is not None}
        encoded["mm_encoder_outputs"] = visual.reduced(chosen, before)
        self._report = VLMReport(visual.counts, tuple(visual.num_left(chosen)), ids.shape[1], rows.shape[1])
        return encoded, rows

    def _check_window(self, length: int) -> None:
        window = sliding_window(self.model)
        if self.positions == "keep" and window is not None and length > window:
            raise ValueError(
                f"a prompt of {length} tokens is longer than the sliding window of {window}: its layers measure distance in the tokens "
                'that are left, so pruning before them cannot be exact; prune inside the model ("fastv"), or take positions="compact"'
            )

    def _words(self, ids: Tensor, is_text: Tensor, is_visual: Tensor, visual: VisualFeatures) -> list[Tensor]:
        """[T, D] for each image: the embedded text of the prompt it is in."""
        generation = self.model.generation_config
        special = [x for x in (generation.bos_token_id, generation.pad_token_id) if isinstance(x, int)]
        is_text = is_text & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
        embed = self.model.get_input_embeddings()
        return [embed(ids[row, is_text[row]]) for row in visual.prompt_of_each(ids, is_visual)]

    def _select(self, visual: VisualFeatures, tower, words: list[Tensor] | None) -> list[Selection]:
        """What stays of every image; images of one size are selected together."""
        chosen: list[Selection] = [Selection(torch.empty(0))] * len(visual.features)
        for images in visual.groups(one_by_one=self.selector.is_per_image):
            features = torch.stack([visual.features[image] for image in images])
            n = features.shape[1]
            keep = 0
            if self.keep is not None or self.keep_ratio is not None:
                keep = topk.count_to_keep(n, None if self.keep is None else min(self.keep, n), self.keep_ratio)
            if keep == n:  # nothing to choose, and merging with nobody is not always the identity
                result = Selection(torch.arange(n, device=features.device).expand(len(images), n))
            else:
                frames = visual.num_frames(images[0])
                if self.selector.for_video and frames == 1:
                    raise ValueError("this method is for videos and the inputs hold images")
                group_words = [words[image] for image in images] if words is not None else ()
                views = ImageViews(features, images, frames, visual.grid(images[0]), group_words, tower)
                result = self.selector.select(views, keep)
                result = Selection(result) if isinstance(result, Tensor) else result
            expected = (len(images), keep)
            if result.indices.ndim != 2 or not (self.selector.is_adaptive or result.indices.shape == expected):
                raise ValueError(f"the selector gave indices of shape {tuple(result.indices.shape)}, expected {expected}")
            order = result.indices.argsort(dim=-1)
            merged = None if result.features is None else gather_rows(result.features, order)
            for row, image in enumerate(images):
                chosen[image] = Selection(result.indices[row][order[row]], None if merged is None else merged[row])
        return chosen

    def _generate(self, input_ids: Tensor | None = None, **options):
        """transformers' generate on the rewritten inputs."""
        if input_ids is not None:
            options["input_ids"] = input_ids
        if options.get("inputs_embeds") is not None:
            raise ValueError("pruning reads the placeholders in input_ids: inputs_embeds are not supported")
        if "max_length" in options:
            raise ValueError("max_length counts the prompt, which pruning shortens: give max_new_tokens")
        generate = type(self.model).generate
        cache = options.get("past_key_values")
        prompt = getattr(cache, _PROMPT, None)
        has_pixels = any(options.get(name) is not None for name in _PIXELS)
        if cache is not None and prompt is None and cache.get_seq_length() > 0:
            raise ValueError("this cache was not made by a pruned generate(): start the conversation inside `with vistok.prune(...)`")
        if prompt is None and not has_pixels:
            return generate(self.model, **options)
        if prompt is not None and has_pixels:
            raise ValueError("the images of the first turn are pruned: ask about new ones in a new conversation")
        inputs = {name: options.pop(name) for name in list(options) if isinstance(options[name], Tensor)}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        original = inputs["input_ids"]
        if prompt is None:
            new, rows = self.rewrite(**inputs)
            self._check_beams(new["mm_encoder_outputs"], options)
            names = ("input_ids", "attention_mask", "position_ids", *_TYPES)
            prompt = _Prompt(original.shape[1], {name: new[name] for name in names if new.get(name) is not None})
        else:
            new = _continued(prompt, inputs)
        start = new["input_ids"].shape[1]
        self._is_generating = True
        try:
            result = generate(self.model, **new, **options)
        finally:
            self._is_generating = False
        sequences = result if isinstance(result, Tensor) else result.sequences
        given = original.repeat_interleave(sequences.shape[0] // original.shape[0], dim=0)
        sequences = torch.cat([given, sequences[:, start:]], dim=1)
        cache = cache if isinstance(result, Tensor) else getattr(result, "past_key_values", cache)
        if cache is not None and sequences.shape[0] == original.shape[0]:
            setattr(cache, _PROMPT, prompt)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    def _check_beams(self, outputs: dict, options: dict) -> None:
        config = options.get("generation_config") or self.model.generation_config
        copies = max((options.get(name) or getattr(config, name) or 1) for name in ("num_beams", "num_return_sequences"))
        pooled = [output.pooler_output for output in outputs.values()]
        is_ragged = any(isinstance(x, Tensor) and len(x) == 1 < len(self._report.num_kept) for x in pooled)
        if copies > 1 and is_ragged:
            raise ValueError(
                f"{kind_of(self.model)} keeps images as one tensor, so with beams or several samples every image must keep as many tokens; "
                f"these keep {self._report.num_kept}"
            )

    def _refuse_plain_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(kwargs.get(name) is not None for name in _PIXELS) and not self._is_generating:
            raise RuntimeError("pruning before the language model acts in generate(); this is a plain forward, which it would not shorten")

    def _keep_one_sequence(self, text: nn.Module, args: tuple, kwargs: dict):
        """Without a mask and a cache transformers reads a gap in the positions as the border between two packed sequences."""
        if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None or kwargs.get("inputs_embeds") is None:
            return None
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)}

    def _hide_gaps(self, layer: nn.Module, args: tuple, kwargs: dict):
        """So does FlashAttention in every layer; the rotary tables already hold the positions."""
        return args, {**kwargs, "position_ids": None}


def prune_vlm(
    model: nn.Module,
    method: "str | Selector",
    *,
    keep: int | None = None,
    keep_ratio: float | None = None,
    seed: int = 0,
    positions: str = "keep",
) -> PrunedVLM:
    """Drop or merge visual tokens before the language model in every generate() with images until the returned handle is removed.

    method: a name in `vistok.pruning.selectors`, a `Selector`, or a function of `ImageViews`. keep or keep_ratio: tokens of each image that
    stay. seed: of "random". positions: "keep" (the default: equal to masking what is dropped) or "compact" (positions counted anew, as the
    original code of VisionZip and PruMerge does). Raises ValueError, with the reason, where the model's tokens may not be dropped.
    """
    return PrunedVLM(model, create_selector(method, seed=seed), keep=keep, keep_ratio=keep_ratio, positions=positions)


def _tower_layers(model: nn.Module, selector: Selector) -> tuple[int, ...]:
    """The layers a selector reads; in a tower with windows the nearest before them that sees the whole image."""
    layers = vision_layers(model)
    wanted = sorted(set(selector.layers(len(layers))))
    whole = getattr(getattr(model.base_model, "visual", None), "fullatt_block_indexes", None)
    if whole is not None:
        wanted = sorted({max((block for block in whole if block <= layer), default=min(whole)) for layer in wanted})
    missing = [layer for layer in wanted if attention_of(layers[layer]) is None]
    if missing:
        raise ValueError(f"layers {missing} of the vision tower have no attention to read")
    return tuple(wanted)


def _continued(prompt: _Prompt, inputs: dict) -> dict:
    """The inputs of a later turn with the pruned prompt in place of the one it began with."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = mask[:, prompt.length :]
    before = prompt.inputs["position_ids"]
    last = before[..., -1:]
    if ids.shape[1] <= prompt.length:
        raise ValueError(f"the conversation is at {prompt.length} tokens and more; input_ids must hold all of it, got {ids.shape[1]}")
    new = {name: value for name, value in inputs.items() if name != "position_ids"}
    for name in ("input_ids", "attention_mask", *_TYPES):
        if name in inputs and name in prompt.inputs:
            new[name] = torch.cat([prompt.inputs[name], inputs[name][:, prompt.length :]], dim=1)
    new["position_ids"] = torch.cat([before, last + more.cumsum(dim=-1)], dim=-1)
    return new


def _compact(positions: Tensor, rows: Tensor) -> Tensor:
    if positions.ndim != 2:
        raise ValueError('positions="compact" counts tokens in a line, this family places visual tokens in rows and columns')
    return ((rows >= 0).long().cumsum(dim=-1) - 1).clamp(min=0)
