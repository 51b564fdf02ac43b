"""Train an image classifier: a recipe, a folder with a folder a class, a run folder; any architecture of timm, RaftMLP and Strip-MLP.

    python -m train.classifier --recipe vit-tiny --out runs/vit                                              seconds; shows that it works
    python -m train.classifier --recipe vit-emoji --out runs/emoji-vit                                       8 minutes on a CPU core
    torchrun --nproc-per-node 8 -m train.classifier --recipe raftmlp-imagenet224 --data PHOTOS --out runs/raftmlp

The same as `vistok train classifier`; recipes are functions in vistok/training/recipes/vision.py, to copy and change. --teacher
MODEL makes a trained classifier's logits half of the loss; --resume continues a run that was stopped or killed, bit for bit.
"""

import logging
import sys

import tyro

from vistok.commands.train_vision import TrainClassifier


def main(options: TrainClassifier) -> int:
    """Train and say where the result is."""
    return options.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(tyro.cli(TrainClassifier, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))))
