"""Recipes of the GPT: plain next-token training, LlamaGen's scale, mixed objectives, own contexts, layers that grow."""

from collections.abc import Callable

import torch

from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.shared import emoji_generator_config, imagenet_config, tiny_config
from vistok.training.task import TrainingTask

GPT_TAKES = frozenset({"start", "grow"})
TINY = dict(width=64, depth=2, num_heads=2)
GPT_EMOJI = dict(width=160, depth=4, num_heads=5, hidden=448, text="hash", caption_buckets=1024)


@recipe
def gpt_tiny() -> Recipe:
    """A two-layer GPT over any tokenizer's tokens; seconds on two CPU cores."""
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _gpt(TINY), takes=GPT_TAKES)


@recipe
def gpt_emoji() -> Recipe:
    """Class and caption conditioned GPT, 4 layers of 160, 1.8 M parameters; about 4 minutes on two CPU cores for 64 tokens an image."""
    return Recipe("generator", emoji_generator_config(), _gpt(GPT_EMOJI, token_dropout=0.05), takes=GPT_TAKES)


@recipe
def gpt_emoji_16() -> Recipe:
    """gpt-emoji over the first 16 tokens of each image: what the bundled emoji-gpt is."""
    config = emoji_generator_config(max_steps=2000, batch_size=32)
    return Recipe("generator", config, _gpt(GPT_EMOJI, token_dropout=0.05), num_tokens=16, takes=GPT_TAKES)


@recipe
def gpt_mixed_tiny() -> Recipe:
    """gpt-tiny on random, next and next-all prediction, a third each; seconds on two CPU cores."""
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _gpt({**TINY, "has_query": True}, _mixed()), takes=GPT_TAKES)


@recipe
def gpt_mixed_emoji() -> Recipe:
    """gpt-emoji with random and next-all prediction beside the next token; about 12 minutes on two CPU cores for 64 tokens an image."""
    build = _gpt({**GPT_EMOJI, "has_query": True}, _mixed(random=0.5, next_all=0.5))
    return Recipe("generator", emoji_generator_config(), build, takes=GPT_TAKES)


@recipe
def gpt_exposure_tiny() -> Recipe:
    """gpt-tiny that reads its own tokens too: a third of its inputs and one whole image in ten; seconds on two CPU cores."""
    build = _gpt(TINY, _exposed(correction_share=0.1, full_step=30))
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), build, takes=GPT_TAKES)


@recipe
def gpt_exposure_emoji() -> Recipe:
    """gpt-emoji whose last 400 of 1,400 steps mix in its own tokens, up to 30 %; about twice the time of gpt-emoji."""
    build = _gpt(GPT_EMOJI, _exposed(start_step=1000, full_step=1300, token_dropout=0.05))
    return Recipe("generator", emoji_generator_config(), build, takes=GPT_TAKES)


@recipe
def gpt_pattention_tiny() -> Recipe:
    """gpt-tiny of parameter tokens, which `--start RUN --grow N` adds to; seconds on two CPU cores."""
    shape = {**TINY, "mixing": "pattention", "parameter_tokens": 32, "mlp_parameter_tokens": 64}
    return Recipe("generator", tiny_config(image_size=32, max_steps=60), _gpt(shape), takes=GPT_TAKES)


@recipe
def gpt_pattention_emoji() -> Recipe:
    """gpt-emoji of parameter tokens, 96 a layer and 384 a feed-forward layer; start small, then `--start RUN --grow 64`."""
    shape = {**GPT_EMOJI, "mixing": "pattention", "parameter_tokens": 96, "mlp_parameter_tokens": 384}
    return Recipe("generator", emoji_generator_config(), _gpt(shape, token_dropout=0.05), takes=GPT_TAKES)


@recipe
def gpt_imagenet256() -> Recipe:
    """LlamaGen-B: 300 epochs of ImageNet's 256 tokens an image (vqgan-imagenet256, or a converted VQ-16), batches of 256; days on GPUs."""
    config = imagenet_config(
        max_steps=1_500_000, batch_size=256, weight_decay=0.05, warmup_steps=0, schedule="constant", preview_every=20_000
    )
    shape = dict(width=768, depth=12, num_heads=12, condition_attention="uniform")
    return Recipe("generator", config, _gpt(shape, condition_dropout=0.1, dropout=0.1))


def _gpt(shape: dict, make_task: Callable[..., TrainingTask] | None = None, **task):
    """make_task: called with the model and the parts of a GeneratorTask; None: a plain one, configured by `task`."""

    def build(sources: Sources) -> TrainingTask:
        from vistok.generators import GPT, GPTConfig
        from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig

        tokens = sources.tokens
        has_captions = any(tokens.captions)
        config = GPTConfig(
            codebook_size=tokens.codebook_size,
            layout_kind=tokens.layout.kind,
            layout_shape=tokens.layout.shape,
            max_tokens=tokens.plan.num_tokens,
            num_classes=len(tokens.classes),
            classes=tuple(tokens.classes),
            **{**shape, "text": shape.get("text", "none") if has_captions else "none"},
        )
        parts = sources.generator_task_parts()
        model = GPT(config) if sources.start is None else _started(sources)
        if make_task is not None:
            return make_task(model, **parts)
        return GeneratorTask(model, GeneratorTaskConfig(**task), **parts)

    return build


def _started(sources: Sources) -> torch.nn.Module:
    """The GPT that a run starts from, grown where that is asked for. Whether it fits the tokens is the task's to check.

    Raises ValueError: it is no GPT, or cannot grow.
    """
    import vistok
    from vistok.generators import GPT

    model = vistok.load(sources.start)
    model = getattr(model, "generator", model)
    if not isinstance(model, GPT):
        raise ValueError(f"{sources.start} is a {type(model).__name__}, not a GPT")
    if sources.grow is not None:
        model.grow(sources.grow)
    return model.train()


def _exposed(**task):
    def make(model, **parts):
        from vistok.training.tasks.exposure import ExposureTask, ExposureTaskConfig

        return ExposureTask(model, ExposureTaskConfig(**task), **parts)

    return make


def _mixed(**weights):
    def make(model, **parts):
        from vistok.generators.objectives import ObjectiveWeights
        from vistok.training.tasks.objectives import MixedTask, MixedTaskConfig

        return MixedTask(model, MixedTaskConfig(weights=ObjectiveWeights(**weights)), **parts)

    return make
