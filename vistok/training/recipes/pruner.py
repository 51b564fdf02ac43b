"""Recipes of learned pruners: for vision-language models that answer questions about the rendered scenes, and for image classifiers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.runs import configured, image_splits, run_recipe
from vistok.training.recipes.shared import tiny_config
from vistok.training.task import TrainingTask

PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32


def train_pruner(name: str, *, out: Path, target: str, target_share: float | None = None, resume: bool = False, **overrides) -> Path:
    """Run a pruner recipe for the frozen model `target` (run folder, bundled name); overrides replace fields of its TrainConfig.

    target_share: share of visual tokens that stay, None: the recipe's. Returns the run folder. Raises ValueError: the target is not of
    `vistok train vlm` (atp, delete-gate), in whose words the questions are, or no vision transformer of timm (vit-gate).
    """
    import vistok

    chosen, config = configured(name, "pruner", out, overrides)
    model = vistok.load(target)
    dataset, held_out = _question_data(target, model, config) if chosen.train.data == "questions" else _image_data(target, model, config)
    sources = Sources(target=(model, str(target), target_share), held_out=held_out)
    return run_recipe(name, chosen, sources, dataset, config, resume=resume)


def _question_data(target: str, model, config: TrainConfig) -> tuple:
    from vistok.data.scenes import vocabulary
    from vistok.training.tasks.vlm import IMAGE, QuestionScenes

    if config.data != "questions":
        raise ValueError(f"data={config.data!r} but these recipes learn from the rendered question scenes: questions")
    words = model.processor.tokenizer.get_vocab() if hasattr(model, "processor") else {}
    missing = [word for word in (IMAGE, *vocabulary()) if word not in words]
    if missing:
        raise ValueError(
            f"{target} is no model of `vistok train vlm`: a pruner learns from questions in its words, and it does not know {missing[0]!r}"
        )
    return QuestionScenes(num_questions=1), None  # as prompts are in use: what the words attend to depends on how many they ask for


def _image_data(target: str, model, config: TrainConfig) -> tuple:
    from vistok.pruning.blocks import parts_of

    parts_of(model)  # refuses what is no vision transformer
    size = getattr(model.patch_embed, "img_size", (config.image_size,))[0]
    if size != config.image_size:
        raise ValueError(f"image_size={config.image_size} but {target} reads {size} pixels")
    return image_splits(config)


@recipe
def atp_tiny() -> Recipe:
    """ATP's thresholds on any small model; seconds on two CPU cores."""
    return Recipe("pruner", tiny_config(data="questions", flip=False, max_steps=30), _task(_atp))


@recipe
def atp_emoji() -> Recipe:
    """ATP's thresholds on emoji-vlm, a quarter of the visual tokens left on average; two minutes on a CPU core."""
    return Recipe("pruner", replace(_emoji(), max_steps=200), _task(_atp))


@recipe
def delete_gate_tiny() -> Recipe:
    """A delete gate on any small model; seconds on two CPU cores."""
    return Recipe("pruner", tiny_config(data="questions", flip=False, max_steps=30), _task(_delete_gate))


@recipe
def delete_gate_emoji() -> Recipe:
    """MrT5's one gate, after a quarter of the layers of emoji-vlm, a quarter of the visual tokens left; a minute on a CPU core."""
    return Recipe("pruner", replace(_emoji(), max_steps=200), _task(_delete_gate, anneal_steps=120, budget_weight=0.05, late_weight=0.0))


@recipe
def vit_gate_tiny() -> Recipe:
    """Delete gates on a classifier of `vistok train classifier --recipe vit-tiny`; seconds on two CPU cores."""
    return Recipe("pruner", tiny_config(data="scenes", image_size=48, flip=False, max_steps=30), _vit_gate)


@recipe
def vit_gate_emoji() -> Recipe:
    """Delete gates on emoji-vit, half of the patches left behind the last; two minutes on a CPU core."""
    return Recipe("pruner", replace(_emoji(), data="scenes", image_size=48, batch_size=32, max_steps=100), _vit_gate)


def _emoji() -> TrainConfig:
    return TrainConfig(
        out=Path(), data="questions", flip=False, max_steps=300, batch_size=16, learning_rate=1e-2, betas=(0.9, 0.98), weight_decay=0.0,
        warmup_steps=20, ema_decay=0.98, save_every=100, preview_every=100, log_every=20,
    )  # fmt: skip


def _stage_layers(depth: int) -> tuple[int, ...]:
    """The paper's stages in a model of another depth."""
    layers = {max(1, round(layer * depth / PAPER_DEPTH)) for layer in PAPER_LAYERS}
    return tuple(sorted(layer for layer in layers if layer < depth))


def _task(make: Callable, **budget) -> Callable[[Sources], TrainingTask]:
    def build(sources: Sources) -> TrainingTask:
        from vistok.training.tasks.pruner import PrunerTask, PrunerTaskConfig

        target, name, share = sources.target
        config = PrunerTaskConfig(**budget)
        if share is not None:
            config = replace(config, target=share, floor=min(share, config.floor))
        return PrunerTask(make(target), target, config, target_name=name)

    return build


def _atp(target):
    from vistok.pruning.families import text_model
    from vistok.pruning.learned import ATP, ATPConfig

    layers = _stage_layers(len(text_model(target).layers))
    return ATP(ATPConfig(layers=layers, grid=math.isqrt(target.config.image_seq_length)))


def _delete_gate(target):
    from vistok.pruning.families import text_model
    from vistok.pruning.learned import DeleteGate, DeleteGateConfig

    depth = len(text_model(target).layers)
    return DeleteGate(DeleteGateConfig(layers=(max(1, round(depth / 4)),), width=target.config.text_config.hidden_size))


def _vit_gate(sources: Sources) -> TrainingTask:
    from vistok.pruning.learned import DeleteGate, DeleteGateConfig
    from vistok.training.tasks.pruner import GateTask, GateTaskConfig

    target, name, share = sources.target
    depth = len(target.blocks)
    layers = tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))
    config = GateTaskConfig() if share is None else GateTaskConfig(target=share)
    model = DeleteGate(DeleteGateConfig(layers=layers, width=target.embed_dim))
    return GateTask(model, target, config, target_name=name, held_out=sources.held_out)
