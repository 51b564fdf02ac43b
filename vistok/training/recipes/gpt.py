"""Recipes of the GPT beyond plain next-token training: mixed objectives."""

from vistok.training.recipes import GPT_EMOJI, Recipe, _gpt, _gpt_emoji_config, _tiny, recipe

TINY = dict(width=64, depth=2, num_heads=2)


@recipe
def gpt_mixed_tiny() -> Recipe:
    """gpt-tiny on random, next and next-all prediction, a third each; seconds on two CPU cores."""
    return Recipe("generator", _tiny(image_size=32, max_steps=60), _gpt({**TINY, "has_query": True}, _mixed()))


@recipe
def gpt_mixed_emoji() -> Recipe:
    """gpt-emoji with random and next-all prediction beside the next token; about 12 minutes on two CPU cores for 64 tokens an image."""
    return Recipe("generator", _gpt_emoji_config(), _gpt({**GPT_EMOJI, "has_query": True}, _mixed(random=0.5, next_all=0.5)))


def _mixed(**weights):
    def make(model, **parts):
        from vistok.generators.objectives import ObjectiveWeights
        from vistok.training.tasks.objectives import MixedTask, MixedTaskConfig

        return MixedTask(model, MixedTaskConfig(weights=ObjectiveWeights(**weights)), **parts)

    return make
