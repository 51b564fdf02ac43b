"""Recipes of learned pruners, for vision-language models that answer questions about the rendered scenes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.loop import seeded_build, train
from vistok.training.recipes import Recipe, Sources, _tiny, get_recipe, recipe
from vistok.training.task import TrainingTask

PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32


def train_pruner(name: str, *, out: Path, target: str, target_share: float | None = None, resume: bool = False, **overrides) -> Path:
    """Run a pruner recipe for the vision-language model `target` (run folder, bundled name); overrides replace fields of its TrainConfig.

    target_share: mean share of visual tokens that stay, None: the recipe's. Returns the run folder. Raises ValueError: the model has no
    processor of `vistok train vlm`, whose words the questions are in.
    """
    import vistok
    from vistok.training.tasks.vlm import QuestionScenes

    chosen = get_recipe(name, "pruner")
    config = replace(chosen.train, out=Path(out), **overrides)
    if config.data != "questions":
        raise ValueError(f"data={config.data!r} but these recipes learn from the rendered question scenes: questions")
    model = vistok.load(target)
    if not hasattr(model, "processor") or "<image>" not in model.processor.tokenizer.get_vocab():
        raise ValueError(f"{target} is no model of `vistok train vlm`: a pruner learns from the questions that such a model answers")
    sources = Sources(target=(model, str(target), target_share))
    task = seeded_build(lambda: chosen.build(sources), config.seed)
    return train(task, QuestionScenes(), config, resume=resume, recipe_name=name)


@recipe
def atp_tiny() -> Recipe:
    """ATP's thresholds on any small model; seconds on two CPU cores."""
    return Recipe("pruner", _tiny(data="questions", flip=False, max_steps=30), _atp)


@recipe
def atp_emoji() -> Recipe:
    """ATP's thresholds on emoji-vlm, a quarter of the visual tokens left on average; about 5 minutes on a CPU core."""
    return Recipe("pruner", _emoji(), _atp)


@recipe
def delete_gate_tiny() -> Recipe:
    """Delete gates on any small model; seconds on two CPU cores."""
    return Recipe("pruner", _tiny(data="questions", flip=False, max_steps=30), _delete_gate)


@recipe
def delete_gate_emoji() -> Recipe:
    """Delete gates on emoji-vlm, a quarter of the visual tokens left on average; about 5 minutes on a CPU core."""
    return Recipe("pruner", _emoji(), _delete_gate)


def _emoji() -> TrainConfig:
    return TrainConfig(
        out=Path(), data="questions", flip=False, max_steps=400, batch_size=16, learning_rate=1e-2, betas=(0.9, 0.98), weight_decay=0.0,
        warmup_steps=20, ema_decay=0.98, save_every=200, preview_every=100, log_every=20,
    )  # fmt: skip


def _stage_layers(depth: int) -> tuple[int, ...]:
    """The paper's stages in a model of another depth."""
    layers = {max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS}
    return tuple(sorted(layer for layer in layers if layer < depth))


def _task(make: Callable) -> Callable[[Sources], TrainingTask]:
    def build(sources: Sources) -> TrainingTask:
        from vistok.pruning.families import text_model
        from vistok.training.tasks.pruner import PrunerTask, PrunerTaskConfig

        target, name, share = sources.target
        config = PrunerTaskConfig() if share is None else PrunerTaskConfig(target=share, floor=min(share, PrunerTaskConfig().floor))
        return PrunerTask(make(target, _stage_layers(len(text_model(target).layers))), target, config, target_name=name)

    return build


@_task
def _atp(target, layers: tuple[int, ...]):
    from vistok.pruning.learned import ATP, ATPConfig

    return ATP(ATPConfig(layers=layers, grid=math.isqrt(target.config.image_seq_length)))


@_task
def _delete_gate(target, layers: tuple[int, ...]):
    from vistok.pruning.learned import DeleteGate, DeleteGateConfig

    return DeleteGate(DeleteGateConfig(layers=layers, width=target.config.text_config.hidden_size))
