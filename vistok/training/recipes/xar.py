"""Recipes of xAR: flow matching of the next entity, over any tokenizer's tokens in any order (`--order cell-4`, `--context clean`)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistok.tokens import TokenLayout
from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import imagenet_config, tiny_config
from vistok.training.task import TrainingTask

XAR_EMOJI = dict(
    width=144, encoder_depth=2, decoder_depth=2, num_heads=3, hidden=288, text="hash", caption_tokens=7, caption_buckets=1024,
    context_time=0.2,
)  # fmt: skip
XAR_EMOJI_16 = {**XAR_EMOJI, "width": 128, "decoder_depth": 1, "num_heads": 4, "hidden": 256}
_OPTIONS = frozenset({"values", "order", "context"})
STATISTICS_IMAGES = 10_000  # at most so many images measure mean and deviation of the channels


@recipe
def xar_tiny() -> Recipe:
    """A two-layer xAR over any tokenizer's tokens; seconds on two CPU cores."""
    shape = dict(width=64, encoder_depth=1, decoder_depth=1, num_heads=2, hidden=128, text="hash", caption_tokens=3, caption_buckets=256)
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), xar_task(shape, preview_steps=4), takes=_OPTIONS)


@recipe
def xar_mixed_tiny() -> Recipe:
    """xar-tiny on random, next and next-all prediction of entities; seconds on two CPU cores."""
    plain = xar_tiny()

    def build(sources):
        from vistok.training.tasks.objectives import MixedXARTask, MixedXARTaskConfig

        task = plain.build(sources)
        parts = dict(tokenizer=task.tokenizer, tokenizer_reference=task.tokenizer_reference, held_out=task.held_out)
        return MixedXARTask(task.model, MixedXARTaskConfig(**vars(task.config)), **parts)

    return replace(plain, build=build)


@recipe
def xar_emoji() -> Recipe:
    """Class and caption conditioned xAR, 4 layers of 144, 1.6 M parameters; 64 tokens an image take about 10 minutes on one CPU core."""
    return Recipe("generator", _xar_emoji_config(max_steps=1700, batch_size=32), xar_task(XAR_EMOJI), takes=_OPTIONS)


@recipe
def xar_emoji_16() -> Recipe:
    """Class and caption conditioned xAR, 3 layers of 128, 1.0 M parameters, over the first 16 tokens of emoji-flextok; about 3 minutes."""
    config = _xar_emoji_config(max_steps=900, batch_size=64)
    return Recipe("generator", config, xar_task(XAR_EMOJI_16), num_tokens=16, takes=_OPTIONS)


@recipe
def xar_imagenet256() -> Recipe:
    """xAR-B as published: 800 epochs of ImageNet's 16 x 16 x 16 latents at batch 2,048, learning rate 4e-4, dropout 0.1, in cells of 8 x 8.

    `python -m eval.cost --recipe xar-imagenet256` counts what it takes; weeks of one large GPU, so use eight. The paper's schedule is
    constant until epoch 600 and then a cosine; this one falls linearly from there.
    """
    config = imagenet_config(
        max_steps=500_000, batch_size=2048, learning_rate=4e-4, betas=(0.9, 0.96), weight_decay=0.02, warmup_steps=62_500,
        schedule="trapezoid", decay_fraction=0.25, workers=8,
    )  # fmt: skip
    shape = dict(width=768, encoder_depth=8, decoder_depth=8, num_heads=12, hidden=2048)
    return Recipe("generator", config, xar_task(shape, dropout=0.1, preview_steps=40), takes=_OPTIONS)


def _xar_emoji_config(**changes) -> TrainConfig:
    base = TrainConfig(
        out=Path(), data="emoji", learning_rate=1.5e-3, betas=(0.9, 0.96), weight_decay=0.02, warmup_steps=100, schedule="trapezoid",
        decay_fraction=0.4, final_fraction=0.02, ema_decay=0.995, save_every=200, preview_every=400, log_every=20,
    )  # fmt: skip
    return replace(base, **changes)


@dataclass(frozen=True)
class XARBuild:
    """A recipe's `build`. shape: fields of XARConfig that the tokens do not decide. task: fields of XARTaskConfig."""

    shape: dict[str, Any]
    task: dict[str, Any]

    def config(self, layout: TokenLayout, *, order: str | None = None, has_captions: bool = False, **fields):
        """XARConfig of the recipe's model over tokens of a layout; order: see `OrderConfig.parse`; fields: what else the tokens decide."""
        from vistok.generators import OrderConfig, XARConfig

        text = self.shape.get("text", "none") if has_captions else "none"
        return XARConfig(order=OrderConfig.parse(order, layout), **{**self.shape, "text": text, **fields})

    def __call__(self, sources: Sources) -> TrainingTask:
        from vistok.decoding.flow import code_table
        from vistok.generators import XAR
        from vistok.training.tasks.xar import XARTask, XARTaskConfig

        tokens, parts = sources.tokens, sources.generator_task_parts()
        layout = tokens.layout
        if tokens.plan.num_tokens < layout.num_tokens and layout.kind == "sequence":  # the first ones of an ordered tokenizer
            layout = TokenLayout("sequence", (tokens.plan.num_tokens,))
        mean, deviation = channel_statistics(tokens, code_table(parts["tokenizer"]))
        classes = tuple(tokens.classes)
        fields = dict(code_dim=len(mean), num_classes=len(classes), classes=classes, value_mean=mean, value_deviation=deviation)
        if sources.context == "clean":  # then it has seen no other in training
            fields["context_time"] = 0.0
        config = self.config(layout, order=sources.order, has_captions=any(tokens.captions), **fields)
        options = self.task | ({} if sources.context is None else {"context": sources.context})
        return XARTask(XAR(config), XARTaskConfig(**options), **parts)


def xar_task(shape: dict[str, Any], **task) -> XARBuild:
    """What builds an xAR of this shape, trained with these fields of XARTaskConfig."""
    return XARBuild(shape, task)


def channel_statistics(tokens, codes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of a token folder's values, or of its ids' vectors in codes [K, C].

    Values that have deviations of their own count as drawn with them: variance = variance of the means + mean of the variances.
    Raises ValueError: a channel is constant, or ids without codes.
    """
    import torch

    if tokens.ids is not None and codes is None:
        raise ValueError("the token folder holds ids but its tokenizer has no codes")
    rows = torch.linspace(0, len(tokens) - 1, min(len(tokens), STATISTICS_IMAGES)).long()
    found = tokens.read(rows)
    values = (found.values if found.ids is None else codes.cpu()[found.ids.clamp(min=0)])[found.mask].double()
    spread, variance = tokens.read_deviations(rows), values.var(0, correction=0)
    if spread is not None:
        variance = variance + spread[found.mask].double().square().mean(0)
    deviation = variance.sqrt()
    if not bool((deviation > 0).all()):
        raise ValueError(f"channel {int(deviation.argmin())} of the tokens is the same everywhere: nothing to learn there")
    return tuple(values.mean(0).tolist()), tuple(deviation.tolist())
