"""`vistok train drafter`: a frozen generator, its images' tokens, and a head that learns what it will say next."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vistok.commands.common import Folder, Model
from vistok.commands.train import TrainOptions, report_run

DrafterRecipe = Literal[
    "eagle-tiny", "eagle-emoji", "medusa-tiny", "medusa-emoji", "chimera-tiny", "chimera-emoji", "judge-tiny", "judge-emoji"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainDrafter:
    """Train a head that drafts the next tokens of a generator, or that judges drafts, for faster decoding.

    The generator stays as it is and reads every batch; nothing of what it says is stored. The images of --data are tokenized first, into
    OUT-tokens. OUT becomes a run folder as with `vistok train generator`. Exact rules stay exact however well or badly the head learned:
    its figures (acceptance_1, acceptance_2, ...) say how often an exact rule would keep the first, second, ... draft.

        vistok train drafter --target runs/first-gpt --recipe eagle-tiny --out runs/first-eagle              seconds, to see that it works
        vistok train drafter --target vistok/emoji-gpt-fsq2d --recipe eagle-emoji --data emoji --out runs/eagle     about 4 minutes
    """

    target: Model
    """The pipeline that is drafted for: a run folder of `vistok train generator`, vistok/emoji-gpt-fsq2d ..."""
    recipe: DrafterRecipe
    """Head and settings: eagle drafts feature by feature, medusa all drafts at once, chimera from the last three tokens; judge judges."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    tokens: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: tokenize --data)")] = None
    """A folder made by `vistok tokenize` with the pipeline's tokenizer."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's."""

    def run(self) -> int:
        from vistok.training.recipes.drafter import train_drafter

        if self.tokens is not None and self.training.data is not None:
            raise ValueError("give --data or --tokens, not both: a token folder holds its images' tokens already")
        folder = train_drafter(
            self.recipe, out=self.out, target=self.target, tokens=self.tokens, resume=self.resume, **self.training.overrides()
        )
        run = shlex.quote(str(folder))
        is_judge = self.recipe.startswith("judge")
        use = f"--drafter jacobi --rule judge --rule-options head={run}" if is_judge else f"--drafter {run}"
        return report_run(folder, f"vistok generate --model {shlex.quote(self.target)} {use} --num-images 16 --out samples")
