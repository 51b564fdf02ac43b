"""`vistok train pruner`: a frozen vision-language model, and what learns which of its visual tokens it can do without."""

import shlex
from dataclasses import dataclass
from typing import Literal

from vistok.commands.common import Folder, Model, optional
from vistok.commands.train import TrainOptions, report_run

PrunerRecipe = Literal["atp-tiny", "atp-emoji", "delete-gate-tiny", "delete-gate-emoji", "vit-gate-tiny", "vit-gate-emoji"]


@dataclass(frozen=True, kw_only=True)
class TrainPruner:
    """Train a pruner between the layers of a model that stays as it is: answers stay right while few visual tokens stay.

    OUT becomes a run folder as with `vistok train vlm`. Its model/ goes where a method's name goes:
    `vistok.prune(vlm, vistok.load("OUT"))`. The figures held_out_unpruned and held_out_pruned say what it costs, held_out_kept_0 ... what
    it saves. Gates of a vision transformer go in as `GatedTokens(gate=vistok.load("OUT"), keep_ratio=0.5)`.

        vistok train pruner --target runs/vlm --recipe atp-tiny --out runs/atp                      seconds, to see that it works
        vistok train pruner --target vistok/emoji-vlm --recipe atp-emoji --out runs/emoji-atp       some minutes
        vistok train pruner --target vistok/emoji-vit --recipe vit-gate-emoji --out runs/gate       some minutes
    """

    target: Model
    """A model of `vistok train vlm` (atp, delete-gate) or of `vistok train classifier` that is a vision transformer (vit-gate)."""
    recipe: PrunerRecipe
    """Pruner and settings: atp learns thresholds from attention, delete-gate and vit-gate from the states of the tokens."""
    out: Folder
    """Run folder; made if needed, never overwritten without --resume."""
    resume: bool = False
    """Continue the run in OUT from its newest complete checkpoint."""
    keep_ratio: optional(float, "SHARE", "default: 0.25, vit-gate: 0.5") = None
    """Share of the visual tokens that stay: the mean over the stages, of vit-gate behind the last gate."""
    training: TrainOptions = TrainOptions()
    """How to train; what is not given is the recipe's. --data stays what it is: the scenes."""

    def run(self) -> int:
        from vistok.training.recipes.pruner import train_pruner

        folder = train_pruner(
            self.recipe, out=self.out, target=self.target, target_share=self.keep_ratio, resume=self.resume, **self.training.overrides()
        )
        return report_run(folder, f"vistok info {shlex.quote(str(folder))}")
