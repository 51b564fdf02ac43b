"""What token reduction costs and saves: one `Measurement` a setting, with a number for every image so that settings can be paired.

Vision transformers are matched by multiply-adds: `matched` finds the schedule of a method that comes nearest to a share of the unpruned
model's. Vision-language models are matched by visual tokens that are left. The lower-resolution baseline sees a smaller picture and does
nothing else. C classes, n images or questions.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vistok
from vistok.pruning.blocks import parts_of
from vistok.pruning.cost import ViTCost
from vistok.pruning.stages import LayerMethod, StageChoice, StageView
from vistok.pruning.strategies import Strategy, ZeroTPrune, create_strategy


@dataclass(frozen=True)
class Measurement:
    """One setting. right, agrees: [n] bool; divergence: [n] KL(unpruned || pruned) in nats; the rest are means of an image."""

    right: Tensor
    agrees: Tensor
    divergence: Tensor
    macs_ratio: float
    seconds: float
    tokens: float
    """Tokens that leave the last layer (vision transformer), or visual tokens in the cache of a layer (language model)."""
    cache_bytes: float | None = None
    prefill: float | None = None
    """Seconds of one prompt up to its first word, images included."""
    step: float | None = None
    """Seconds of one further word of one answer."""

    def row(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {
            "accuracy": float(self.right.float().mean()), "agreement": float(self.agrees.float().mean()),
            "kl": float(self.divergence.mean()), "macs_ratio": self.macs_ratio, "ms": 1000 * self.seconds, "tokens": self.tokens,
            "cache_bytes": self.cache_bytes, "prefill_ms": self.prefill and 1000 * self.prefill, "step_ms": self.step and 1000 * self.step,
        }  # fmt: skip


# -- vision transformers --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run_vit(
    model: nn.Module, images: Tensor, labels: Tensor, reference: Tensor | None, method: "str | Strategy | None", *, batch_size: int = 50
) -> tuple[Measurement, Tensor]:
    """Classify images [n, 3, H, W] with a method (None: unpruned). reference: the unpruned logits [n, C], None to take this run's own.

    Returns the measurement and this run's logits.
    """
    parts, start = [], time.process_time()
    if method is None:
        parts = [model(batch) for batch in images.split(batch_size)]
        seconds, ratio = time.process_time() - start, 1.0
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    else:
        with vistok.prune(model, method) as pruned:
            parts = [model(batch) for batch in images.split(batch_size)]
            seconds = time.process_time() - start
            ratio, tokens = pruned.stats().macs_ratio, pruned.stats().num_tokens[-1]
    logits = torch.cat(parts)
    return _measured(logits, labels, reference, macs_ratio=ratio, seconds=seconds / len(images), tokens=tokens), logits


def run_lower_resolution(
    model: nn.Module, images: Tensor, labels: Tensor, reference: Tensor, macs_ratio: float, *, batch_size: int = 50
) -> Measurement:
    """The baseline: the same model on pictures shrunk until its multiply-adds are as near to the share as whole patches allow."""
    grid, patch = model.patch_embed.grid_size[0], model.patch_embed.patch_size[0]
    prefix, depth = model.num_prefix_tokens, len(model.blocks)
    cost = ViTCost.of(parts_of(model))
    macs = {side: cost.macs((side**2 + prefix,) * (depth + 1), at_block_end=True) for side in range(1, grid + 1)}
    ratios = {side: value / macs[grid] for side, value in macs.items()}
    side = min(ratios, key=lambda side: abs(ratios[side] - macs_ratio))
    small = copy.deepcopy(model)
    small.set_input_size(img_size=side * patch)
    shrunk = F.interpolate(images, size=(side * patch,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
    start = time.process_time()
    with torch.inference_mode():
        logits = torch.cat([small(batch) for batch in shrunk.split(batch_size)])
    seconds = (time.process_time() - start) / len(images)
    return _measured(logits, labels, reference, macs_ratio=ratios[side], seconds=seconds, tokens=side**2 + prefix)


def matched(model: nn.Module, method: str, macs_ratio: float, **options) -> Strategy:
    """The method with the schedule whose multiply-adds come nearest to a share of the unpruned model's, from static counts alone.

    Zero-TPrune's published rates are raised to one power in all its pruning layers; the other methods remove r in each layer, at most half.
    Raises ValueError: the share is out of reach.
    """
    patches, depth, cost = model.patch_embed.num_patches, len(model.blocks), ViTCost.of(parts_of(model))
    full = cost.macs((patches + cost.num_prefix,) * (depth + 1), at_block_end=True)

    def ratio(strategy: Strategy) -> float:
        counts = [patches + cost.num_prefix]
        for removed in strategy.counts(depth, patches):
            counts.append(counts[-1] - removed)
        return cost.macs(counts, at_block_end=strategy.at_block_end) / full

    if method == "zero_tprune":
        published = ZeroTPrune(**options).rates_for(depth)
        powers = [step / 20 for step in range(0, 161, 2)]
        found = [ZeroTPrune(rates={layer: rate**power for layer, rate in published.items()}, **options) for power in powers]
    else:
        found = [create_strategy(method, r=r, **options) for r in range(patches // 2 + 1)]
    best = min(found, key=lambda strategy: abs(ratio(strategy) - macs_ratio))
    if abs(ratio(best) - macs_ratio) > 0.03:
        raise ValueError(f"{method} with {options} comes no nearer to {macs_ratio:.2f} of the multiply-adds than {ratio(best):.2f}")
    return best


def _measured(logits: Tensor, labels: Tensor, reference: Tensor | None, **facts) -> Measurement:
    reference = logits if reference is None else reference
    divergence = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(dim=-1)
    answers = logits.argmax(dim=-1)
    return Measurement(answers == labels, answers == reference.argmax(dim=-1), divergence.clamp(min=0), **facts)


# -- vision-language models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Questions about pictures: messages as a processor takes them, the right answers and the kinds."""

    images: Sequence
    texts: Sequence[str]
    answers: Sequence[str]
    kinds: Sequence[str]

    def without_pictures(self) -> "Asked":
        """The same questions about white pictures."""
        return replace(self, images=[Image.new("RGB", image.size, "white") for image in self.images])


@torch.inference_mode()
def run_vlm(
    model: nn.Module, asked: Asked, reference: "tuple[Tensor, list[str]] | None", method: str | None, *, batch_size: int = 50, **options
) -> tuple[Measurement, tuple[Tensor, list[str]]]:
    """Answer greedily with a method (None: unpruned) and its options.

    reference: (first-token logits [n, V], answers) of the unpruned model; None: this run's own.
    Returns the measurement and this run's own reference. seconds: of a whole answer, prefill included.
    """
    processor, new = model.processor, 1 + max(len(answer.split()) for answer in asked.answers)
    logits, said, seconds, report = [], [], 0.0, None
    handle = None if method is None else vistok.prune(model, method, **options)
    try:
        for start in range(0, len(asked.texts), batch_size):
            part = slice(start, start + batch_size)
            inputs = processor(images=list(asked.images[part]), text=list(asked.texts[part]), return_tensors="pt", padding=True)
            begin = time.process_time()
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True)
            seconds += time.process_time() - begin
            if start == 0:
                prefill, step = _phases(model, inputs, time.process_time() - begin, out.sequences.shape[1])
            logits.append(out.logits[0].float())
            said += processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        report = None if handle is None else handle.stats()
    finally:
        if handle is not None:
            handle.remove()
    said = [" ".join(text.split()) for text in said]
    first, own = torch.cat(logits), said
    before, texts = (first, own) if reference is None else reference
    divergence = F.kl_div(first.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(dim=-1)
    right = torch.tensor([text == answer for text, answer in zip(said, asked.answers, strict=True)])
    agrees = torch.tensor([text == other for text, other in zip(said, texts, strict=True)])
    lengths = prompt_lengths(model, inputs["input_ids"].shape[1], report)
    full = [inputs["input_ids"].shape[1]] * len(lengths)
    config = model.config.text_config
    width = config.num_key_value_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum(dim=1).max())
    measured = Measurement(
        right, agrees, divergence.clamp(min=0), macs_ratio=prefill_macs(config, lengths) / prefill_macs(config, full),
        seconds=seconds / len(asked.texts), tokens=visual - (sum(full) - sum(lengths)) / len(lengths),
        cache_bytes=sum(lengths) * 2 * width * 4, prefill=prefill, step=step,
    )  # fmt: skip
    return measured, (first, own)


def _phases(model: nn.Module, inputs, seconds: float, length: int) -> tuple[float, float | None]:
    """Seconds of one prompt and of one further word, from a batch that took `seconds` to come to `length` tokens."""
    batch, prompt = inputs["input_ids"].shape
    begin = time.process_time()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    prefill = time.process_time() - begin
    return prefill / batch, max(0.0, seconds - prefill) / (length - prompt - 1) / batch if length > prompt + 1 else None


def prompt_lengths(model: nn.Module, length: int, report) -> list[int]:
    """Tokens of the longest prompt in each layer of the language model."""
    depth = model.config.text_config.num_hidden_layers
    if report is None:
        return [length] * depth
    if hasattr(report, "tokens_per_layer"):
        return list(report.tokens_per_layer)
    return [report.pruned_length] * depth


def prefill_macs(config, lengths: Sequence[int]) -> int:
    """Multiply-adds of a Llama-like language model on a prompt with lengths[l] tokens in layer l; embeddings and head left out."""
    d, hidden = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    weights = 2 * d * head * (config.num_attention_heads + config.num_key_value_heads) + 3 * d * hidden
    return sum(n * weights + 2 * n * n * head * config.num_attention_heads for n in lengths)


@torch.inference_mode()
def stage_shares(model: nn.Module, asked: Asked, pruner, *, batch_size: int = 50) -> tuple[float, ...]:
    """Share of all visual tokens that a learned pruner leaves after each of its stages."""
    kept, total = torch.zeros(len(pruner.settings.layers)), 0
    with vistok.prune(model, pruner) as pruned:
        for start in range(0, len(asked.texts), batch_size):
            part = slice(start, start + batch_size)
            model(**model.processor(images=list(asked.images[part]), text=list(asked.texts[part]), return_tensors="pt", padding=True))
            kept += torch.tensor(pruned.stats().num_kept).sum(dim=1)
            total += sum(pruned.stats().num_visual)
    return tuple((kept / total).tolist())


def every_second(model: nn.Module) -> LayerMethod:
    """The baseline that knows these scenes: every second row and column of the picture stays, a quarter of its tokens."""
    side = math.isqrt(model.config.image_seq_length)

    def choose(view: StageView, counts: list[int]) -> StageChoice:
        return StageChoice(view.is_visual & (view.ordinal // side % 2 == 0) & (view.ordinal % 2 == 0))

    return LayerMethod(choose)


INSIDE = {
    "fastv": lambda share: {"layer": 2, "keep_ratio": share},
    "sparsevlm": lambda share: {"layer": 2, "keep_ratio": share},
    "sparsevlm+": lambda share: {"layer": 2, "keep_ratio": share},
    "vscan_llm": lambda share: {"layer": 3, "keep_ratio": share},
    "pyramiddrop": lambda share: {"layers": (2, 3, 4), "keep_ratios": (share ** (1 / 3), share ** (2 / 3), share)},
}
"""Methods between the layers of a language model of 6, and their options when `share` of the visual tokens is left at the end."""


def scene_questions(model: nn.Module, count: int) -> Asked:
    """Questions about held-out scenes, as many of each kind, one a scene, in the model's own chat format."""
    from vistok.data.scenes import KINDS, TEST, question_scene
    from vistok.image import from_uint8, to_pil

    scenes = [question_scene(number, split=TEST, num_questions=1, kinds=(KINDS[number % len(KINDS)],)) for number in range(count)]
    questions = [scene.questions[0] for scene in scenes]
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}] for question in questions]
    return Asked(
        to_pil(from_uint8(torch.stack([scene.image for scene in scenes]))),
        [model.processor.apply_chat_template(message, add_generation_prompt=True) for message in messages],
        [question.answer for question in questions],
        [question.kind for question in questions],
    )


def run_small_picture(model: nn.Module, asked: Asked, reference: tuple[Tensor, list[str]], keep_ratio: float) -> Measurement:
    """The baseline: pictures shrunk to about that share of the visual tokens, the positions of the (CLIP) tower resized."""
    small = copy.deepcopy(model)
    config, embeddings = small.config.vision_config, small.model.vision_tower.embeddings
    old = config.image_size // config.patch_size
    side = max(1, round(old * keep_ratio**0.5))
    table = embeddings.position_embedding.weight
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True).flatten(2)[0].T
    embeddings.position_embedding = nn.Embedding.from_pretrained(torch.cat([table[:1], grid]))
    embeddings.position_ids = torch.arange(side**2 + 1)[None]
    embeddings.image_size = config.image_size = side * config.patch_size
    embeddings.num_patches = small.config.image_seq_length = side**2
    small.processor = copy.deepcopy(model.processor)
    small.processor.image_processor.size = {"height": embeddings.image_size, "width": embeddings.image_size}
    measured, _ = run_vlm(small, asked, reference, None)
    whole = prefill_macs(model.config.text_config, prompt_lengths(model, model.config.image_seq_length + 6, None))
    part = prefill_macs(model.config.text_config, prompt_lengths(model, side**2 + 6, None))
    return replace(measured, macs_ratio=part / whole)
