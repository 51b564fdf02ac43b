"""`vistok train classifier` and `vistok train vlm`: models of timm and transformers from a recipe, in a run folder like any other."""

import shlex
from dataclasses import dataclass
from typing import Literal

from vistok.commands.common import Folder, optional
from vistok.commands.train import RECIPES_OWN, TrainOptions, report_run

ClassifierRecipe = Literal["vit-tiny", "vit-emoji", "raftmlp-tiny", "raftmlp-imagenet224", "stripmlp-imagenet224"]
VLMRecipe = Literal["vlm-tiny", "vlm-emoji"]


@dataclass(frozen=True, kw_only=True)
class TrainClassifier:
    """Train an image classifier: any architecture of timm, RaftMLP and Strip-MLP, with or without a teacher.

    OUT becomes a run folder as with `vistok train tokenizer`; its model/ is in timm's format: `timm.create_model("local-dir:OUT/model")`.

        vistok train classifier --recipe vit-tiny --out runs/vit                                          seconds, to see that it works
        vistok train classifier --recipe vit-tiny --architecture raftmlp_s --data PHOTOS --out runs/raft  any model of timm, own photos
        vistok train classifier --recipe vit-emoji --out runs/emoji-vit                                   the bundled vistok/emoji-vit
    """

    recipe: ClassifierRecipe
    """Model, losses and settings; *-emoji learns from rendered scenes, the others from a folder with a folder for each class."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    architecture: optional(str, "NAME", RECIPES_OWN) = None
    """A model of timm (or raftmlp_s, stripmlp_t ...) in place of the recipe's, with its own settings."""
    teacher: optional(str, "MODEL", "default: none") = None
    """A classifier with the same classes to learn from: run folder, bundled name or hub id."""
    image_size: optional(int, "PIXELS", RECIPES_OWN) = None
    """Images are resized and cropped to this square, and the model is built for it."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's."""

    def run(self) -> int:
        from vistok.training.recipes.vision import train_classifier

        given = self.training.overrides() | ({} if self.image_size is None else {"image_size": self.image_size})
        folder = train_classifier(
            self.recipe, out=self.out, architecture=self.architecture, teacher=self.teacher, resume=self.resume, **given
        )
        return report_run(folder, f"vistok prune IMAGE --model {shlex.quote(str(folder))} --out overlay.png")


@dataclass(frozen=True, kw_only=True)
class TrainVLM:
    """Train a small LLaVA on rendered scenes and questions about them: places, neighbours, counts, and words to read.

    OUT becomes a run folder as with `vistok train tokenizer`; its model/ opens with transformers, processor and all.

        vistok train vlm --recipe vlm-tiny --out runs/vlm            seconds, to see that it works
        vistok train vlm --recipe vlm-emoji --out runs/emoji-vlm     the bundled vistok/emoji-vlm
    """

    recipe: VLMRecipe
    """Model and settings."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's. --data stays what it is: the scenes."""

    def run(self) -> int:
        from vistok.training.recipes.vision import train_vlm

        folder = train_vlm(self.recipe, out=self.out, resume=self.resume, **self.training.overrides())
        return report_run(folder, f"vistok prune IMAGE --model {shlex.quote(str(folder))} --out overlay.png")
