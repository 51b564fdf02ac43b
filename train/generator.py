"""Train a generator on a tokenizer's tokens: a recipe, a tokenizer, a source of images or a token folder, a run folder.

    python -m train.generator --recipe gpt-tiny --tokenizer runs/first --out runs/first-gpt
    python -m train.generator --recipe gpt-emoji --tokenizer vistok/emoji-fsq2d --data emoji --out runs/gpt

The first takes seconds on two CPU cores, the second 4 minutes; its samples look like emoji of the class that was asked for.

The same as `vistok train generator`; the recipes are in vistok/training/recipes, one function each, to copy and change. --resume
continues a run that was stopped or killed, bit for bit.
"""

import logging
import sys

import tyro

from vistok.commands.train import TrainGenerator


def main(options: TrainGenerator) -> int:
    """Train and say where the result is."""
    return options.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(tyro.cli(TrainGenerator, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))))
