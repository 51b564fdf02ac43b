"""Recipes of the GPT beyond plain next-token training: mixed objectives (of xAR too), own contexts, layers that grow."""

from dataclasses import replace

from vistok.training.recipes import GPT_EMOJI, GPT_TAKES, Recipe, _gpt, _gpt_emoji_config, _tiny, recipe

TINY = dict(width=64, depth=2, num_heads=2)


@recipe
def gpt_mixed_tiny() -> Recipe:
    """gpt-tiny on random, next and next-all prediction, a third each; seconds on two CPU cores."""
    return Recipe("generator", _tiny(image_size=32, max_steps=60), _gpt({**TINY, "has_query": True}, _mixed()), takes=GPT_TAKES)


@recipe
def gpt_mixed_emoji() -> Recipe:
    """gpt-emoji with random and next-all prediction beside the next token; about 12 minutes on two CPU cores for 64 tokens an image."""
    build = _gpt({**GPT_EMOJI, "has_query": True}, _mixed(random=0.5, next_all=0.5))
    return Recipe("generator", _gpt_emoji_config(), build, takes=GPT_TAKES)


@recipe
def xar_mixed_tiny() -> Recipe:
    """xar-tiny on random, next and next-all prediction of entities; seconds on two CPU cores."""
    from vistok.training.recipes.xar import xar_tiny

    plain = xar_tiny()

    def build(sources):
        from vistok.training.tasks.objectives import MixedXARTask, MixedXARTaskConfig

        task = plain.build(sources)
        parts = dict(tokenizer=task.tokenizer, tokenizer_reference=task.tokenizer_reference, held_out=task.held_out)
        return MixedXARTask(task.model, MixedXARTaskConfig(**vars(task.config)), **parts)

    return replace(plain, build=build)


@recipe
def gpt_exposure_tiny() -> Recipe:
    """gpt-tiny that reads its own tokens too: a third of its inputs and one whole image in ten; seconds on two CPU cores."""
    build = _gpt(TINY, _exposed(correction_share=0.1, full_step=30))
    return Recipe("generator", _tiny(image_size=32, max_steps=60), build, takes=GPT_TAKES)


@recipe
def gpt_exposure_emoji() -> Recipe:
    """gpt-emoji whose last 400 of 1,400 steps mix in its own tokens, up to 30 %; about twice the time of gpt-emoji."""
    build = _gpt(GPT_EMOJI, _exposed(start_step=1000, full_step=1300, token_dropout=0.05))
    return Recipe("generator", _gpt_emoji_config(), build, takes=GPT_TAKES)


@recipe
def gpt_pattention_tiny() -> Recipe:
    """gpt-tiny of parameter tokens, which `--start RUN --grow N` adds to; seconds on two CPU cores."""
    shape = {**TINY, "mixing": "pattention", "parameter_tokens": 32, "mlp_parameter_tokens": 64}
    return Recipe("generator", _tiny(image_size=32, max_steps=60), _gpt(shape), takes=GPT_TAKES)


@recipe
def gpt_pattention_emoji() -> Recipe:
    """gpt-emoji of parameter tokens, 96 a layer and 384 a feed-forward layer; start small, then `--start RUN --grow 64`."""
    shape = {**GPT_EMOJI, "mixing": "pattention", "parameter_tokens": 96, "mlp_parameter_tokens": 384}
    return Recipe("generator", _gpt_emoji_config(), _gpt(shape, token_dropout=0.05), takes=GPT_TAKES)


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
