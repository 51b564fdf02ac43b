"""What is measured of each trained tokenizer: size, reconstruction, understanding, codebook, predictability.

Everything is measured on held-out images; what is learned for it (probe, map to captions, GPT) is learned on the training images.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from eval.claims.likelihood import measure_likelihood
from vistok.data import ImageDataset
from vistok.metrics import CodebookUsage, as_saved, feature_net, features_of, frechet_between, psnr
from vistok.metrics.representations import pool
from vistok.metrics.sources import batches
from vistok.metrics.understanding import Prober
from vistok.rng import image_generators

BATCH = 64


@torch.inference_mode()
def tokens_of(model, dataset: ImageDataset, *, num_tokens: int | None = None) -> Tensor:
    """ids [n, N] of every image, -1 in the padding."""
    rows = [
        model.encode(images.to(model.device), num_tokens=num_tokens).ids.cpu() for _, images in batches(dataset, range(len(dataset)), BATCH)
    ]
    return torch.cat(rows)


@torch.inference_mode()
def reconstruct(model, dataset: ImageDataset, ids: Tensor) -> tuple[Tensor, float]:
    """PSNR [n] of each image decoded from its ids [n, N], and the Frechet distance of the set on random convolution features."""
    from vistok.tokens import VisualTokens

    net, scores, found, wanted = feature_net("conv"), [], [], []
    for numbers, originals in batches(dataset, range(len(dataset)), BATCH):
        rows = ids[numbers]
        tokens = VisualTokens.from_ids(rows.clamp(min=0), model.layout, (rows >= 0).sum(1)).to(model.device)
        decoded = as_saved(model.decode(tokens, generators=image_generators(0, numbers, model.device)).float().cpu())
        scores.append(psnr(decoded, originals))
        found.append(features_of(net, decoded))
        wanted.append(features_of(net, originals))
    return torch.cat(scores), frechet_between(torch.cat(found), torch.cat(wanted))


def understanding(model, prober: Prober, ids: tuple[Tensor, Tensor]) -> dict:
    """Probe and retrieval rows of the tokens' code vectors, mean and side by side; `pooling` is the one that tells the classes of the
    training set best (leave-one-out), and its numbers are the row's."""
    features: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for part in ids:
            vectors = torch.cat([model.embed(rows.clamp(min=0).to(model.device)).float().cpu() for rows in part.split(BATCH)])
            for pooling in ("mean", "flat"):
                features.setdefault(pooling, []).append(pool(vectors, part >= 0, pooling))
    numbers = [list(range(len(part))) for part in ids]
    rows = {name: prober.score(name, (train, numbers[0]), (test, numbers[1])) for name, (train, test) in features.items()}
    best = min(rows, key=lambda name: rows[name].get("loo_error", rows[name]["width"]))
    return {**rows[best], "pooling": best, "rows": rows}


def measure(
    model,
    train: ImageDataset,
    test: ImageDataset,
    prober: Prober,
    *,
    num_tokens: int | None = None,
    gpt_seconds: float,
    seed: int,
    counts: tuple[int, ...] = (),
    clock: Callable[[], float] = time.process_time,
) -> dict:
    """All numbers of one trained tokenizer, as plain data.

    num_tokens: how many each image gets; None: as many as the model chooses. counts: fixed lengths to measure beside its own choice.
    """
    model = model.eval()
    ids = tokens_of(model, train, num_tokens=num_tokens), tokens_of(model, test, num_tokens=num_tokens)
    lengths = (ids[1] >= 0).sum(1).double()
    length_bits = math.log2(model.max_tokens) if lengths.std(unbiased=False) else 0.0  # how many tokens there are is told too
    bits = math.log2(model.codebook_size)
    scores, frechet = reconstruct(model, test, ids[1])
    usage = CodebookUsage(model.codebook_size)
    for part in ids:
        usage.update(part)
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": float(lengths.mean()),
        "bits_per_image": float(lengths.mean()) * bits + length_bits,
        "psnr": float(scores.mean()),
        "psnr_of_images": [round(value, 3) for value in scores.tolist()],
        "frechet": frechet,
        "usage": usage.usage,
        "perplexity": usage.perplexity,
        "understanding": understanding(model, prober, ids),
    }
    told = measure_likelihood(*ids, codebook_size=model.codebook_size, seconds=gpt_seconds, seed=seed, clock=clock)
    found["likelihood"] = {
        "bits_per_token": told.bits_per_token,
        "bits_per_image": told.bits_per_image + length_bits,
        "unigram_bits": told.unigram,
        "told": told.told,
        "told_std": told.told_std(),
        "steps": told.steps,
    }
    found["fixed"] = {str(count): _fixed(model, test, count) for count in counts}
    return found


def _fixed(model, test: ImageDataset, count: int) -> dict:
    """PSNR when every image gets exactly so many tokens."""
    scores, _ = reconstruct(model, test, tokens_of(model, test, num_tokens=count))
    return {"psnr": float(scores.mean())}


@torch.inference_mode()
def seed_text_retrieval(task, test: ImageDataset) -> dict:
    """Recall of a SEED in the text space it was trained in (last weights): its last register against the captions its text branch reads."""
    from vistok.metrics.probe import caption_groups, recalls, retrieval_ranks

    model, images, texts = task.model.eval(), [], []
    for numbers, batch in batches(test, range(len(test)), BATCH):
        captions = [test.captions[number] for number in numbers]
        images.append(model.image_direction(model.causal_embeddings(batch.to(model.device))).cpu())
        states = model.text_states(task.captions(task._condition(captions), len(captions)))
        texts.append(model.text_direction(states).cpu())
    return recalls(retrieval_ranks(torch.cat(images), torch.cat(texts), caption_groups(list(test.captions))))
