"""Visual-token pruning before the language model, for stock transformers vision-language models: shorter inputs, no hooks inside.

    encode the images -> select among the features the language model would see -> generate() gets
        input_ids, attention_mask   without the dropped placeholders, rows padded on the left again
        position_ids                of the unpruned prompt, gathered: what is left keeps its place
        mm_encoder_outputs          the kept features, so the images are encoded once
    -> the returned sequences carry the original prompt again

So any cache, attention kernel, batch and decoding mode of generate() works, and the result equals masking the dropped tokens as keys.
B prompts, L prompt tokens, K tokens of the longest prompt that is left, n visual tokens of an image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.pruning.methods import topk
from vistok.pruning.methods.diversity import dart, divprune
from vistok.pruning.plan import gather_rows
from vistok.rng import image_generators

Selector = Callable[[Tensor, int, list[int]], Tensor]
"""(features [I, n, D], keep, image numbers) -> [I, keep] indices, in any order."""

SUPPORTED = ("llava", "vipllava", "internvl", "qwen2_vl", "qwen2_5_vl", "mistral3", "idefics3", "smolvlm")
_PRIVATE = ("_prepare_position_ids_for_generation", "_prepare_multimodal_encoder_kwargs_for_generation")
_ID_NAMES = ("image_token_id", "image_token_index")
_MARK = "_vistok_pruning"


@dataclass(frozen=True)
class VLMReport:
    """What the last generate() did."""

    num_visual: tuple[int, ...]
    """Visual tokens of each image."""
    num_kept: tuple[int, ...]
    """Visual tokens of each image that reached the language model."""
    prompt_length: int
    """Tokens of the prompt, padding included, as it was given."""
    pruned_length: int
    """The same as the language model saw it: the length of every layer's cache after the prompt."""


def vlm_selector(method: "str | Selector", *, seed: int = 0) -> Selector:
    """A selector by name, or the function itself.

    divprune: spread out. dart: least like the tokens with the largest L1 norm. random, uniform: baselines.
    """
    selectors: dict[str, Selector] = {
        "divprune": lambda features, keep, images: divprune(features, keep),
        "dart": lambda features, keep, images: dart(features, features.float().abs().sum(dim=-1), keep),
        "uniform": lambda features, keep, images: topk.top_indices(
            topk.uniform_score(*features.shape[:2], keep, device=features.device), keep
        ),
        "random": lambda features, keep, images: topk.top_indices(
            topk.random_score(features.shape[1], generators=image_generators(seed, images, features.device), device=features.device), keep
        ),
    }
    if callable(method):
        return method
    if method not in selectors:
        raise ValueError(f"method {method!r} is not known before a language model; there are {', '.join(selectors)}, or give a function")
    return selectors[method]


class PrunedVLM:
    """Pruning of one model's `generate`. A context manager; leaving it, by an exception too, or `remove` gives the model's own back."""

    def __init__(self, model: nn.Module, selector: Selector, *, keep: int | None = None, keep_ratio: float | None = None):
        topk.count_to_keep(1, None if keep is None else 1, keep_ratio)
        check_supported(model)
        self.model, self.selector, self.keep, self.keep_ratio = model, selector, keep, keep_ratio
        self._report: VLMReport | None = None
        self._is_generating = False
        self._guard = model.register_forward_pre_hook(self._refuse_plain_forward, with_kwargs=True)
        model.__dict__[_MARK] = self
        model.__dict__["generate"] = self._generate

    def __enter__(self) -> "PrunedVLM":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model its own `generate` back. The report stays readable."""
        self._guard.remove()
        if self.model.__dict__.get(_MARK) is self:
            del self.model.__dict__[_MARK], self.model.__dict__["generate"]

    def stats(self) -> VLMReport:
        """Token counts of the last generate()."""
        if self._report is None:
            raise RuntimeError("no generate() with images has run through the pruned model yet")
        return self._report

    @torch.no_grad()
    def rewrite(self, **inputs) -> tuple[dict, Tensor]:
        """The processor's inputs for generate() without the tokens that pruning drops.

        Returns (inputs, rows): rows [B, K] int64 says which prompt token each one left is, -1 for padding on the left.
        """
        model, ids, mask = self.model, inputs["input_ids"], inputs["attention_mask"]
        is_visual = ids == next(getattr(model.config, name) for name in _ID_NAMES if hasattr(model.config, name))
        positions = model._prepare_position_ids_for_generation(ids, {name: value for name, value in inputs.items() if name != "input_ids"})
        encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
        outputs = encoded.pop("mm_encoder_outputs")
        if set(outputs) != {"image"}:
            raise ValueError(f"the inputs hold {sorted(outputs)}; only images can be pruned before the language model")
        output = copy.copy(outputs["image"])
        is_tensor = isinstance(output.pooler_output, Tensor)
        features = [x.reshape(-1, x.shape[-1]) for x in output.pooler_output]
        if sum(len(x) for x in features) != int(is_visual.sum()):
            raise ValueError(
                f"the images give {sum(len(x) for x in features)} features but the prompts have {int(is_visual.sum())} image tokens"
            )
        chosen = self._select(features)
        is_kept = torch.cat([topk.mask_of(index[None], len(x))[0] for x, index in zip(features, chosen)])
        stays = mask.bool()
        stays[is_visual] &= is_kept
        rows = _pack_left(stays)
        for name in ("input_ids", "attention_mask", "image_grid_thw"):
            encoded.pop(name, None)
        encoded["input_ids"] = _take(ids, rows, model.generation_config.pad_token_id or 0)
        encoded["attention_mask"] = (rows >= 0).to(mask.dtype)
        encoded["position_ids"] = _take(positions, rows, 0)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in encoded:
                encoded[name] = _take(encoded[name], rows, 0)
        kept = [x[index] for x, index in zip(features, chosen)]
        if is_tensor:  # such models index the features as [images, n, D]; unequal counts go in as one long image
            output.pooler_output = torch.stack(kept) if len({len(x) for x in kept}) == 1 else torch.cat(kept)[None]
        else:
            output.pooler_output = kept
        encoded["mm_encoder_outputs"] = {"image": output}
        self._report = VLMReport(tuple(map(len, features)), tuple(map(len, kept)), ids.shape[1], rows.shape[1])
        return encoded, rows

    def _select(self, features: list[Tensor]) -> list[Tensor]:
        """Sorted indices to keep of every image; images of one size are selected together."""
        chosen: list[Tensor] = [torch.empty(0)] * len(features)
        for n in sorted({len(x) for x in features}):
            images = [image for image, x in enumerate(features) if len(x) == n]
            keep = topk.count_to_keep(n, None if self.keep is None else min(self.keep, n), self.keep_ratio)
            indices = self.selector(torch.stack([features[image] for image in images]), keep, images)
            if indices.shape != (len(images), keep):
                raise ValueError(f"the selector gave indices of shape {tuple(indices.shape)}, expected {(len(images), keep)}")
            for image, index in zip(images, indices.sort(dim=-1).values):
                chosen[image] = index
        return chosen

    def _generate(self, input_ids: Tensor | None = None, **options):
        """transformers' generate on the rewritten inputs."""
        if input_ids is not None:
            options["input_ids"] = input_ids
        if options.get("past_key_values") is not None or options.get("inputs_embeds") is not None:
            raise ValueError("pruning before the language model starts a conversation: past_key_values and inputs_embeds are not supported")
        if "max_length" in options:
            raise ValueError("max_length counts the prompt, which pruning shortens: give max_new_tokens")
        generate = type(self.model).generate
        if options.get("pixel_values") is None:
            return generate(self.model, **options)
        inputs = {name: options.pop(name) for name in list(options) if isinstance(options[name], Tensor)}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        new, rows = self.rewrite(**inputs)
        self._is_generating = True
        try:
            result = generate(self.model, **new, **options)
        finally:
            self._is_generating = False
        sequences = result if isinstance(result, Tensor) else result.sequences
        prompt = inputs["input_ids"].repeat_interleave(sequences.shape[0] // rows.shape[0], dim=0)
        sequences = torch.cat([prompt, sequences[:, rows.shape[1] :]], dim=1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    def _refuse_plain_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("pixel_values") is not None and not self._is_generating:
            raise RuntimeError("pruning before the language model acts in generate(); this is a plain forward, which it would not shorten")


def check_supported(model: nn.Module) -> None:
    """Raise ValueError, with the reason, unless visual tokens of the model may be dropped before its language model."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in SUPPORTED:
        raise ValueError(f"{kind} is not supported: pruning before the language model knows {', '.join(SUPPORTED)}")
    if _MARK in model.__dict__:
        raise ValueError(f"this {kind} is already pruned: leave the first `with vistok.prune(...)` or call its remove()")
    missing = [name for name in _PRIVATE if not hasattr(model, name)]
    if missing:
        raise ValueError(f"this transformers has no {' and '.join(missing)}: pip install -U vistok[vlm]")


def prune_vlm(
    model: nn.Module, method: "str | Selector", *, keep: int | None = None, keep_ratio: float | None = None, seed: int = 0
) -> PrunedVLM:
    """Drop visual tokens before the language model in every generate() with images until the returned handle is removed.

    method: "divprune", "dart", "random", "uniform", or a selector. keep or keep_ratio: tokens of each image that stay. seed: of "random".
    """
    return PrunedVLM(model, vlm_selector(method, seed=seed), keep=keep, keep_ratio=keep_ratio)


def _pack_left(stays: Tensor) -> Tensor:
    """stays: [B, L] bool. Returns [B, K] int64: indices of True in order, -1 on the left of shorter rows."""
    index = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    return torch.where(stays, index, -1).sort(dim=-1).values[:, -int(stays.sum(dim=-1).max()) :]


def _take(x: Tensor, rows: Tensor, fill: int) -> Tensor:
    """x: [..., B or 1, L] at rows [B, K], `fill` where a row is -1: [..., B, K]."""
    B, K = rows.shape
    x = x.expand(*x.shape[:-2], B, x.shape[-1])
    taken = gather_rows(x.reshape(-1, B, x.shape[-1]).permute(1, 2, 0), rows.clamp(min=0))  # [B, K, leading]
    return taken.permute(2, 0, 1).reshape(*x.shape[:-2], B, K).masked_fill(rows < 0, fill)
