"""Train an image classifier of timm: cross-entropy, a teacher's logits where there is one, a class for every patch where the data has it.

    loss = (1 - a) CE(logits, label) + a KL(teacher || logits) + w CE(patch logits, class of what covers the patch)

The patch term is that of LV-ViT (Jiang et al. 2021, "All Tokens Matter", arXiv 2104.10858): it makes a vision transformer learn from few
images. Its head is left behind after training.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vistok.data.base import ImageDataset
from vistok.data.loader import BatchLoader
from vistok.training.task import TrainingTask


@dataclass(frozen=True, kw_only=True)
class ClassifierTaskConfig:
    """Weights of the losses."""

    token_weight: float = 0.0
    """w: of the class of every patch; needs data with `token_labels`."""
    teacher_weight: float = 0.0
    """a: of the teacher's logits."""
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("teacher_weight", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} but it is in [0, 1]")


class ClassifierTask(TrainingTask):
    """model: an image classifier made by timm's create_model(architecture, **options), so that its folder can be opened by timm.

    teacher: another one with the same classes, frozen; None: none. held_out: images that the previews measure accuracy on.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ClassifierTaskConfig,
        *,
        architecture: str,
        options: dict,
        teacher: nn.Module | None = None,
        held_out: ImageDataset | None = None,
    ):
        super().__init__()
        if (teacher is None) != (config.teacher_weight == 0):
            raise ValueError(f"teacher_weight={config.teacher_weight} but there is {'no' if teacher is None else 'a'} teacher")
        self.model, self.config, self.architecture, self.options = model, config, architecture, dict(options)
        self.held_out = held_out
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.head = nn.Linear(model.num_features, model.num_classes + 1) if config.token_weight else None
        if self.head is not None and getattr(model, "patch_embed", None) is None:
            raise ValueError(f"token_weight={config.token_weight} needs a vision transformer, not a {type(model).__name__}")

    def describe(self) -> dict:
        return {**super().describe(), "architecture": self.architecture, "options": self.options}

    def on_start(self, dataset) -> None:
        if len(dataset.classes) != self.model.num_classes:
            raise ValueError(f"the model has {self.model.num_classes} classes but the data has {len(dataset.classes)}")
        if self.head is not None and not hasattr(dataset, "token_labels"):
            raise ValueError(f"token_weight={self.config.token_weight} but the data does not know what covers each patch")

    def forward(self, batch, generators, step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and `accuracy` of the batch. Images without a class (label -1) count in no loss. No random draws."""
        features = self.model.forward_features(batch.images)
        logits = self.model.forward_head(features)
        loss = F.cross_entropy(logits, batch.labels, ignore_index=-1, label_smoothing=self.config.label_smoothing)
        logs = {"accuracy": (logits.argmax(dim=-1) == batch.labels).float().mean()}
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(batch.images).log_softmax(dim=-1)
            taught = F.kl_div(logits.log_softmax(dim=-1), target, log_target=True, reduction="batchmean")
            loss = (1 - self.config.teacher_weight) * loss + self.config.teacher_weight * taught
            logs["teacher"] = taught.detach()
        if self.head is not None:
            grid = self.model.patch_embed.grid_size[0]
            target = self.dataset.token_labels(batch.indices, grid).to(logits.device)
            patches = self.head(features[:, self.model.num_prefix_tokens :])
            token_loss = F.cross_entropy(patches.flatten(0, 1), target.flatten())
            loss, logs["token"] = loss + self.config.token_weight * token_loss, token_loss.detach()
        return loss, logs

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """Accuracy on the held-out split, where the data has one."""
        if self.held_out is None:
            return {}
        size = min(128, len(self.held_out))
        batches = iter(BatchLoader(self.held_out, batch_size=size, seed=0, flip=False))
        device, right, seen = next(self.model.parameters()).device, 0, 0
        for _ in range(min(4, len(self.held_out) // size)):
            batch = next(batches).to(device)
            right += int((self.model(batch.images).argmax(dim=-1) == batch.labels).sum())
            seen += len(batch)
        return {"held_out_accuracy": right / seen}

    def save_pretrained(self, folder: Path) -> None:
        """A folder in timm's format, weights in float16: `timm.create_model("local-dir:FOLDER")` opens it."""
        save_timm(self.model, folder, architecture=self.architecture, options=self.options, classes=self.dataset.classes)


def save_timm(model: nn.Module, folder: Path, *, architecture: str, options: dict, classes: list[str]) -> None:
    """Write config.json and model.safetensors (float16) as timm's hub format has them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": classes,
        "model_args": options,
        "pretrained_cfg": {
            "input_size": [3, *_input_size(options)], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0,
            "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": model.num_classes,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def _input_size(options: dict) -> list[int]:
    size = options.get("img_size", 224)
    return [size, size] if isinstance(size, int) else list(size)
