"""The understanding of a model as a table: probes and retrieval on its features, with what no model at all reaches beside them.

Baselines on every table: chance, the pixels (area average), random convolutions, and the same model with fresh weights: how much of a
number is owed to training can only be read against that last one.

m test images.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from vistok.data import ImageDataset
from vistok.metrics.captions import caption_encoder
from vistok.metrics.features import feature_net, features_of
from vistok.metrics.probe import (
    RECALL_AT,
    bootstrap_std,
    caption_groups,
    chance_recall,
    decompose,
    knn_probe,
    linear_probe,
    mapped_retrieval,
    recalls,
    retrieval_ranks,
)
from vistok.metrics.protocol import Evaluation, EvaluationProtocol, machine, model_config
from vistok.metrics.representations import SOURCES, represent
from vistok.metrics.sources import batches

BASELINES = ("pixels:16", "conv")


class Prober:
    """A data set's two splits, ready to score features: classes and captions of the images, and what chance reaches.

    captions: who turns captions into vectors (see captions.py). neighbours: k of the nearest-neighbour vote.
    Raises ValueError: neither classes nor captions, or a split too small to probe.
    """

    def __init__(self, train: ImageDataset, test: ImageDataset, *, captions: str = "hash", neighbours: int = 5, seed: int = 0):
        self.train, self.test, self.neighbours, self.seed = train, test, neighbours, seed
        self.classes = list(train.classes)
        known = {name: i for i, name in enumerate(self.classes)}
        test_classes = [known.get(name, -1) for name in test.classes]
        self.labels = torch.tensor(train.labels), torch.tensor([test_classes[label] if label >= 0 else -1 for label in test.labels])
        self.has_classes = len(self.classes) > 1 and bool((self.labels[1] >= 0).any())
        texts = list(train.captions), list(test.captions)
        self.has_captions = len(set(texts[0])) > 1 and len(set(texts[1])) > 1
        if not self.has_classes and not self.has_captions:
            raise ValueError("nothing to understand here: these images have neither two classes (folders) nor captions that differ")
        if self.has_captions:
            self.encoder = caption_encoder(captions)
            self.captions = self.encoder(texts[0]), self.encoder(texts[1])
        self.texts = texts
        self.groups = caption_groups(texts[1])
        # an emoji in two styles is one thing drawn twice, not two observations
        entries = getattr(test, "entries", None)
        self.things = caption_groups([entry["name"] for entry in entries]) if entries else torch.arange(len(test))

    def chance(self) -> dict:
        """What knowing nothing but the training set's commonest class, and a random order, reach on the test set."""
        row = {"features": "chance", "width": 0}
        if self.has_classes:
            labels = self.labels[0][self.labels[0] >= 0]
            commonest = labels.bincount(minlength=len(self.classes)).argmax()
            tested = self.labels[1][self.labels[1] >= 0]
            row |= dict.fromkeys(("linear", "knn"), float((tested == commonest).double().mean()))
        if self.has_captions:
            kept = self._captioned(list(range(len(self.test))), 1)
            row |= {f"{way}_r{k}": chance_recall(self.groups[kept], k) for way in ("i2t", "t2i") for k in RECALL_AT}
        return row

    def score(self, name: str, train: tuple[Tensor, list[int]], test: tuple[Tensor, list[int]]) -> dict:
        """One row of the table from features [n, D] of both splits and the numbers of their images."""
        (X, rows), (Z, places) = train, test
        if min(len(X), len(Z)) < 2:
            raise ValueError(f"a probe needs at least 2 images a split, got {len(X)} and {len(Z)}")
        row = {"features": name, "width": X.shape[1]}
        spectrum = functools.cache(lambda own: decompose(X[list(own)]))  # classes and captions mostly have the same images
        if self.has_classes:
            row |= self._classify(X, self.labels[0][rows], Z, self.labels[1][places], self.things[places], spectrum)
        if self.has_captions:
            kept, tested = self._captioned(rows, 0), self._captioned(places, 1)
            of_kept, of_tested = set(kept.tolist()), set(tested.tolist())
            inside = [i for i, number in enumerate(places) if number in of_tested]
            own = [i for i, number in enumerate(rows) if number in of_kept]
            ranks = mapped_retrieval(spectrum(tuple(own)), self.captions[0][kept], Z[inside], self.captions[1][tested], self.groups[tested])
            row |= self.recalls(ranks, self.things[tested])
        return row

    def recalls(self, ranks: dict[str, Tensor], things: Tensor) -> dict:
        """R@k of both directions and the bootstrap deviation of the mean of both R@5."""
        both = ((ranks["i2t"] < 5).double() + (ranks["t2i"] < 5).double()) / 2
        return {**recalls(ranks), "r5_std": bootstrap_std(both, groups=things, seed=self.seed)}

    def _classify(self, X: Tensor, labels: Tensor, Z: Tensor, test_labels: Tensor, things: Tensor, spectrum: Callable) -> dict:
        own, tested = labels >= 0, test_labels >= 0
        sets = X[own], labels[own], Z[tested], test_labels[tested]
        fit = spectrum(tuple(own.nonzero()[:, 0].tolist()))
        right, fitted = linear_probe(fit, *sets[1:], num_classes=len(self.classes))
        near = knn_probe(*sets, num_classes=len(self.classes), neighbours=min(self.neighbours, int(own.sum())))
        row = {"loo_error": fitted.error}
        for name, found in (("linear", right), ("knn", near)):
            row |= {name: float(found.double().mean()), f"{name}_std": bootstrap_std(found, groups=things[tested], seed=self.seed)}
        return row

    def _captioned(self, rows: list[int], split: int) -> Tensor:
        return torch.tensor([row for row in rows if self.texts[split][row].strip()], dtype=torch.int64)


def evaluate_probe(
    model,
    train: ImageDataset,
    test: ImageDataset,
    *,
    sources: Sequence[str] = SOURCES,
    captions: str = "hash",
    baselines: Sequence[str] = BASELINES,
    num_untrained: int = 1,
    neighbours: int = 5,
    text_tokenizer: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Probe a tokenizer or a vision tower on a data set; the rows are described in docs/evaluation.md.

    sources: what to probe (representations.py). baselines: feature nets beside it. num_untrained: copies of the model with fresh weights,
    of seeds seed, seed + 1, ... text_tokenizer: for a SEED of an official stage-I checkpoint, the folder of its text tokenizer.
    """
    prober = Prober(train, test, captions=captions, neighbours=neighbours, seed=seed)
    options = dict(batch_size=batch_size, progress=progress)
    rows = [prober.chance()]
    for spec in tqdm(baselines, desc="baselines", disable=not progress):
        net = feature_net(spec)
        rows.append(prober.score(net.name, _features(net, train, batch_size), _features(net, test, batch_size)))
    for number in range(num_untrained):
        rows += _rows(prober, fresh_copy(model, seed + number), f"untrained {number}: ", sources, options)
    rows += _rows(prober, model, "", sources, options)
    space = text_space(model, text_tokenizer)
    if space is not None and prober.has_captions:
        rows.append(_direct(prober, space, test, batch_size, model.device))
    device = model.device
    protocol = EvaluationProtocol(
        task="probe",
        model_config=model_config(model),
        num_images=len(test),
        num_available=len(test),
        image_size=test.image_size,
        features=", ".join(sources),
        feature_preprocess="centred and scaled by the training set for the linear probe and the map to captions; centred for knn",
        options={
            "training_images": len(train),
            "classes": len(prober.classes) if prober.has_classes else 0,
            "captions": prober.encoder.name if prober.has_captions else "none",
            "linear": "ridge, strength by leave-one-out error on the training set",
            "neighbours": neighbours,
            "std": "bootstrap over test images, all drawings of one thing together",
        },
        seed=seed,
        machine=machine(device),
    )
    return Evaluation(protocol, rows)


def fresh_copy(model, seed: int):
    """The same model with untrained weights of this seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return type(model)(model.settings).to(model.device).eval()


def _rows(prober: Prober, model, prefix: str, sources: Sequence[str], options: dict) -> list[dict]:
    train, rows = represent(model, prober.train, sources=sources, title=f"{prefix}train", **options)
    test, places = represent(model, prober.test, sources=sources, title=f"{prefix}test", **options)
    return [prober.score(prefix + name, (train[name], rows), (test[name], places)) for name in train]


def _features(net, dataset: ImageDataset, batch_size: int) -> tuple[Tensor, list[int]]:
    numbers, parts = [], []
    for indices, images in batches(dataset, range(len(dataset)), batch_size):
        numbers += indices
        parts.append(features_of(net, images))
    return torch.cat(parts), numbers


# -- a text space of the model's own ------------------------------------------------------------------------------------------------------


def text_space(model, text_tokenizer: str | None = None):
    """(images [B, 3, H, W] -> [B, e], captions -> [B, e]) where a model compares both itself; None where it does not.

    A model offers it as `image_directions` and `caption_directions`; a SEED whose text branch has its own word table (an official stage-I
    checkpoint) reads captions through the tokenizer that the table belongs to, given as a folder or hub id.
    """
    if hasattr(model, "image_directions") and hasattr(model, "caption_directions"):
        return model.image_directions, model.caption_directions
    words = getattr(getattr(model, "text", None), "words", None)
    if words is None or text_tokenizer is None:
        return None
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(text_tokenizer, trust_remote_code=False, padding_side="right")

    def captions(texts: Sequence[str]) -> Tensor:
        lengths = dict(padding=True, truncation=True, max_length=min(32, model.settings.text.max_words))  # SEED reads 32 words
        batch = reader(list(texts), return_tensors="pt", **lengths).to(model.device)
        return model.text_direction(model.text_states(model.text.embed(batch["input_ids"]), batch["attention_mask"].bool()))

    return lambda images: model.image_direction(model.causal_embeddings(images)), captions


@torch.inference_mode()
def _direct(prober: Prober, space, test: ImageDataset, batch_size: int, device: torch.device) -> dict:
    of_images, of_captions = space
    numbers, parts = [], []
    for indices, images in batches(test, range(len(test)), batch_size):
        numbers += indices
        parts.append(of_images(images.to(device)).float().cpu())
    kept = prober._captioned(numbers, 1)
    where = {number: i for i, number in enumerate(numbers)}
    images = F.normalize(torch.cat(parts), dim=1)[[where[number] for number in kept.tolist()]]
    texts = [prober.texts[1][number] for number in kept.tolist()]
    captions = torch.cat([of_captions(texts[i : i + batch_size]).float().cpu() for i in range(0, len(texts), batch_size)])
    ranks = retrieval_ranks(images, captions, prober.groups[kept])
    return {"features": "its own text space", "width": images.shape[1], **prober.recalls(ranks, prober.things[kept])}
