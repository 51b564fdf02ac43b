"""What differs between training a tokenizer, a generator, a drafter or a pruner; the loop knows nothing else.

A task is the module that is trained: its forward computes the loss. `task.model` is the model that comes out; further trained parts
(a discriminator, a projection head) are submodules beside it. Frozen parts (a VAE, a feature backbone) have `requires_grad` False and
stay out of checkpoints. Adversarial training needs no second optimizer: the generator's loss reads the discriminator through detached
parameters, the discriminator's loss reads detached images, and the sum of both is one loss.
"""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .config import TrainConfig, plain


class TrainingTask(nn.Module):
    """Base of all tasks. A task sets `self.model` and writes `forward`; the rest has defaults."""

    model: nn.Module
    dataset: Any = None
    """Set by the loop before `on_start`."""
    find_unused_parameters = False
    """True if some trained parameters get no gradient at some steps (a discriminator that starts later); matters with several processes."""

    def forward(self, batch, generators: Sequence[torch.Generator], step: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro batch and what to log.

        batch: `images` [B,3,H,W] in [-1,1], `labels`, `captions`, `indices`, `positions`.
        generators: one per image; every random draw comes from them, so results do not depend on batch, process or interruption.
        step: optimizer step, from 0.
        Returns the loss, a scalar and mean over the images, and logs without gradients: scalars are averaged over images, steps and
        processes; an integer [K] tensor is a histogram, summed, and logged as its `usage` and `perplexity`.
        """
        raise TypeError(f"{type(self).__name__} has no forward: a task computes its loss there")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the trained parameters; `weight_decay` and `lr` (peak) override the config's.

        The default decays matrices and convolutions, not vectors and codebooks: a code's length is where it lies, not how strong it is.
        """
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if p.ndim >= 2 and not name.endswith("codebook")]
        others = [p for name, p in trained if p.ndim < 2 or name.endswith("codebook")]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def on_start(self, dataset) -> None:
        """Called once, on the training device, before the first step: cache latents, count labels."""

    def make_loader(self, config: TrainConfig, start: int, rank: int, world_size: int):
        """Endless batches of `config.micro_batch_size` images over all processes, from the global sample number `start` on."""
        from vistok.data import BatchLoader

        return BatchLoader(
            self.dataset,
            batch_size=config.micro_batch_size,
            seed=config.seed,
            start=start,
            flip=config.flip,
            shift=config.shift,
            rank=rank,
            world_size=world_size,
            workers=config.workers,
        )

    def preview(self, step: int) -> dict[str, Image.Image | float]:
        """Pictures and numbers that show how far the model is, by name; called with the averaged weights, in eval mode."""
        return {}

    def save_pretrained(self, folder: Path) -> None:
        """Write the result of the run, a folder that `vistok.load` opens; called with the averaged weights."""
        self.model.save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """Plain data that goes into the run's config.json; a resumed run must describe itself equally."""
        config = getattr(self, "config", None)
        return {
            "name": type(self).__name__,
            "config": plain(config) if is_dataclass(config) else {},
            "model": type(self.model).__name__,
            "model_config": plain(getattr(self.model, "settings", {})),
        }

    def train(self, mode: bool = True) -> "TrainingTask":
        """Training mode for the trained parts; frozen ones stay in eval mode."""
        super().train(mode)
        for module in list(self.modules())[1:]:  # without itself: a task may be a frozen part of another
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self
