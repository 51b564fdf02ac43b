"""Recipes of image classifiers (any architecture of timm, RaftMLP and Strip-MLP among them) and of a small vision-language model."""

from collections.abc import Callable
from pathlib import Path

from vistok.training.config import TrainConfig
from vistok.training.recipes.registry import Recipe, Sources, recipe
from vistok.training.recipes.runs import configured, image_splits, run_recipe
from vistok.training.recipes.shared import tiny_config
from vistok.training.task import TrainingTask

VIT_EMOJI = dict(img_size=48, patch_size=4, embed_dim=64, depth=12, num_heads=4)
SIZED = ("vit_", "deit", "eva", "beit", "mixer", "raftmlp", "stripmlp")
"""Architectures of timm that are built for one image size."""
SCENES = dict(data="scenes", image_size=48, flip=False, betas=(0.9, 0.98), schedule="trapezoid", final_fraction=0.01)


def train_classifier(
    name: str, *, out: Path, architecture: str | None = None, teacher: str | None = None, resume: bool = False, **overrides
) -> Path:
    """Run a classifier recipe; overrides replace fields of its TrainConfig. Returns the run folder, its `model/` in timm's format.

    architecture: another model of timm in place of the recipe's, for example "raftmlp_s". teacher: a classifier with the same classes (run
    folder, bundled name or hub id in timm's format) whose logits are half of the loss.
    """
    chosen, config = configured(name, "classifier", out, overrides)
    dataset, held_out = image_splits(config)
    if not dataset.classes:
        raise ValueError(f"{config.data} has no classes: a classifier needs a folder for each class")
    sources = Sources(dataset=dataset, held_out=held_out, architecture=architecture, teacher=teacher, image_size=config.image_size)
    return run_recipe(name, chosen, sources, dataset, config, resume=resume)


def train_vlm(name: str, *, out: Path, resume: bool = False, **overrides) -> Path:
    """Run a recipe of a vision-language model on question scenes. Returns the run folder, its `model/` in the format of transformers."""
    from vistok.training.tasks.vlm import QuestionScenes

    chosen, config = configured(name, "vlm", out, overrides)
    if config.data != "questions":
        raise ValueError(f"data={config.data!r} but these recipes learn from the rendered question scenes: questions")
    return run_recipe(name, chosen, Sources(), QuestionScenes(), config, resume=resume)


@recipe
def vit_tiny() -> Recipe:
    """A two-layer ViT on rendered scenes; seconds on two CPU cores."""
    shape = dict(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return Recipe(
        "classifier", tiny_config(data="scenes", image_size=48, flip=False, max_steps=40), _classifier("vit_tiny_patch16_224", shape)
    )


@recipe
def vit_emoji() -> Recipe:
    """The bundled emoji-vit: 12 layers of 64, 145 tokens, 24 kinds of emoji on cluttered backgrounds; about 9 minutes on a CPU core."""
    config = TrainConfig(
        out=Path(), **SCENES, max_steps=900, batch_size=32, learning_rate=1.5e-3, weight_decay=0.05, warmup_steps=60, decay_fraction=0.5,
        ema_decay=0.99, save_every=300, preview_every=300, log_every=20,
    )  # fmt: skip
    return Recipe("classifier", config, _classifier("vit_tiny_patch16_224", VIT_EMOJI, token_weight=1.0))


@recipe
def raftmlp_tiny() -> Recipe:
    """RaftMLP-S for a few steps on 64 px emoji: it shows that the backbone trains."""
    return Recipe("classifier", tiny_config(image_size=64, max_steps=20), _classifier("raftmlp_s", dict(drop_path_rate=0.0)))


@recipe
def raftmlp_imagenet224() -> Recipe:
    """RaftMLP-S with the published optimizer (300 epochs, AdamW 2e-3, batch 2,048, label smoothing 0.1); without mixup and cutmix."""
    return Recipe("classifier", _imagenet(), _classifier("raftmlp_s", {}, label_smoothing=0.1))


@recipe
def stripmlp_imagenet224() -> Recipe:
    """Strip-MLP-T likewise."""
    return Recipe("classifier", _imagenet(), _classifier("stripmlp_t", {}, label_smoothing=0.1))


@recipe
def vlm_tiny() -> Recipe:
    """A few steps of a two-layer LLaVA on question scenes; seconds on two CPU cores."""
    shape = dict(tower_width=16, tower_depth=1, tower_heads=2, width=32, depth=2, num_heads=2, num_key_value_heads=1, hidden=64)
    return Recipe("vlm", tiny_config(data="questions", flip=False, max_steps=40), _vlm(shape))


@recipe
def vlm_emoji() -> Recipe:
    """The bundled emoji-vlm: a 3-layer CLIP tower and a 6-layer Llama on question scenes; about 8 minutes on a CPU core."""
    config = TrainConfig(
        out=Path(), data="questions", flip=False, max_steps=2200, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01,
        warmup_steps=50, schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, save_every=1100, preview_every=550,
        log_every=25,
    )  # fmt: skip
    return Recipe("vlm", config, _vlm({}))


def _imagenet() -> TrainConfig:
    return TrainConfig(
        out=Path(), data="imagenet/train", image_size=224, max_steps=187_500, batch_size=2048, learning_rate=2e-3, weight_decay=0.05,
        warmup_steps=3125, final_fraction=0.005, ema_decay=0.0, precision="bf16", workers=8, save_every=5000, preview_every=5000,
        process_timeout=600,
    )  # fmt: skip


def _classifier(architecture: str, options: dict, **weights) -> Callable[[Sources], TrainingTask]:
    def build(sources: Sources) -> TrainingTask:
        import timm

        import vistok
        import vistok.pruning.backbones  # noqa: F401  registers RaftMLP and Strip-MLP with timm
        from vistok.training.tasks.classifier import ClassifierTask, ClassifierTaskConfig

        name, own = (architecture, options) if sources.architecture is None else (sources.architecture, {})
        arguments = {**own, "num_classes": len(sources.dataset.classes)}
        if name.startswith(SIZED):
            arguments["img_size"] = sources.image_size
        teacher = None if sources.teacher is None else vistok.load(sources.teacher)
        config = ClassifierTaskConfig(**weights, teacher_weight=0.0 if teacher is None else 0.5)
        model = timm.create_model(name, **arguments)
        return ClassifierTask(model, config, architecture=name, options=arguments, teacher=teacher, held_out=sources.held_out)

    return build


def _vlm(shape: dict) -> Callable[[Sources], TrainingTask]:
    def build(sources: Sources) -> TrainingTask:
        from vistok.training.tasks.vlm import SceneVLMConfig, VLMTask, VLMTaskConfig, scene_processor, scene_vlm

        config = SceneVLMConfig(**shape)
        processor = scene_processor(config)
        return VLMTask(scene_vlm(config, processor), processor, VLMTaskConfig())

    return build
