"""Train a tokenizer: a recipe, a source of images, a run folder.

    python -m train.tokenizer --recipe fsq2d-tiny --data emoji --out runs/first       10 seconds on two CPU cores; shows that it works
    python -m train.tokenizer --recipe fsq2d-emoji --data emoji --out runs/fsq2d      4 minutes there; about 22 dB on held-out emoji
    torchrun --nproc-per-node 8 -m train.tokenizer --recipe flextok-imagenet256 --vae VAE --data PHOTOS --out runs/flextok

The same as `vistok train tokenizer`; the recipes are in vistok/training/recipes, one function each, to copy and change. --resume
continues a run that was stopped or killed, bit for bit.
"""

import logging
import sys

import tyro

from vistok.commands.train import TrainTokenizer


def main(options: TrainTokenizer) -> int:
    """Train and say where the result is."""
    return options.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(tyro.cli(TrainTokenizer, description=__doc__, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))))
