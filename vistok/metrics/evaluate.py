"""The two evaluations, as functions that scripts, training previews and the demo share.

Reconstruction: encode once, then for every token count k keep the first k tokens, decode from the same noise, compare with the originals.
Generation: compare a set of samples with a set of real images, and look for near copies among the training images.
"""

import inspect
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vistok.metrics.codebook import CodebookUsage
from vistok.metrics.features import FeatureNet, feature_net, features_of
from vistok.metrics.frechet import frechet_between, kid, precision_recall
from vistok.metrics.memorisation import NEAR_COPY_PSNR, NearestImages, nearest_images
from vistok.metrics.protocol import Evaluation, EvaluationProtocol, machine, model_config
from vistok.metrics.reconstruction import as_saved, psnr, ssim
from vistok.metrics.retrieval import nearest_feature_is_right
from vistok.metrics.sources import ImageSource, batches, choose
from vistok.rng import image_generators
from vistok.tokens import TokenLayout, VisualTokens

_NOT_OPTIONS = ("tokens", "generators", "noise", "on_step", "text", "unclip")


def evaluate_reconstruction(
    tokenizer,
    dataset: ImageSource,
    *,
    num_tokens: Sequence[int] | None = None,
    features: str | FeatureNet = "conv",
    num_images: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    decode_options: dict | None = None,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    progress: bool = False,
) -> Evaluation:
    """Quality of a tokenizer at every token count.

    num_tokens: counts to measure; None: 1, 2, 4, ... up to all for a nested tokenizer, the one count of a fixed-length tokenizer, and
    for one that chooses how many tokens an image gets, those it chose (the row says their mean).
    features: for the Frechet and kernel distance and for retrieval (`nearest_is_right`, cosine).
    num_images: how many of the set, drawn by `seed`; None: all. decode_options: passed on to `tokenizer.decode`.
    Image i is decoded from the generator of (seed, i), the same at every count. Rows hold num_tokens, PSNR, SSIM, frechet,
    kid, nearest_is_right, and for ids the codebook's usage and perplexity over these images.
    """
    device = _device_of(tokenizer)
    net = feature_net(features, device=device) if isinstance(features, str) else features
    options = _effective_options(tokenizer, decode_options or {})  # a wrong option or count fails here, before the work
    if tokenizer.min_tokens != tokenizer.max_tokens:
        _counts(tokenizer, num_tokens, tokenizer.max_tokens)
    parts, reference, image_size = _encode(tokenizer, dataset, choose(dataset, num_images, seed), net, batch_size, progress)
    decode_options = with_image_size(tokenizer, decode_options or {}, image_size)
    options |= decode_options
    num_kept = len(reference)
    rows = []
    lengths = torch.cat([tokens.counts for _, tokens in parts])
    chosen_by_model = not num_tokens and bool((lengths != lengths[0]).any())
    for count in [None] if chosen_by_model else _counts(tokenizer, num_tokens, int(lengths.min())):
        started = time.perf_counter()
        scores, found, usage = _reconstruct(tokenizer, dataset, parts, count, net, seed, decode_options, progress)
        distance = kid(found, reference, num_subsets=kid_subsets, subset_size=kid_subset_size, seed=seed)
        row = {
            "num_tokens": float(lengths.double().mean()) if count is None else count,
            "psnr": float(scores[:, 0].mean()),
            "ssim": float(scores[:, 1].mean()),
        }
        row |= {"frechet": frechet_between(found, reference), "kid": distance.mean, "kid_std": distance.std}
        row["nearest_is_right"] = nearest_feature_is_right(found, reference)
        if usage is not None:
            row |= {"usage": usage.usage, "perplexity": usage.perplexity}
        rows.append(row | {"seconds": time.perf_counter() - started})
    options |= {"kid_subsets": distance.num_subsets, "kid_subset_size": distance.subset_size, "retrieval": "cosine, centred"}
    options |= {"batch_size": batch_size, "broken_images_left_out": min(num_images or len(dataset), len(dataset)) - num_kept}
    protocol = EvaluationProtocol(
        task="reconstruction",
        model_config=model_config(tokenizer),
        num_images=num_kept,
        num_available=len(dataset),
        image_size=image_size,
        features=net.name,
        feature_preprocess=net.preprocess,
        options=options,
        seed=seed,
        machine=machine(device),
    )
    return Evaluation(protocol, rows)


def _encode(tokenizer, dataset: ImageSource, chosen: list[int], net: FeatureNet, batch_size: int, progress: bool):
    """All tokens of the chosen images, batch by batch with their indices; their features [N, D]; the image size."""
    parts: list[tuple[list[int], VisualTokens]] = []
    features, image_size = [], (0, 0)
    total = -(-len(chosen) // batch_size)
    for indices, images in tqdm(batches(dataset, chosen, batch_size), total=total, desc="encode", unit="batch", disable=not progress):
        with torch.inference_mode():
            parts.append((indices, tokenizer.encode(images.to(_device_of(tokenizer))).to("cpu")))
        features.append(features_of(net, images))
        image_size = tuple(images.shape[-2:])
    if sum(len(indices) for indices, _ in parts) < 2:
        raise ValueError(f"an evaluation needs at least 2 readable images, this set has {sum(len(indices) for indices, _ in parts)}")
    return parts, torch.cat(features), image_size


def _reconstruct(
    tokenizer, dataset: ImageSource, parts: list, count: int | None, net: FeatureNet, seed: int, decode_options: dict, progress: bool
):
    """Decode the first `count` tokens of every image, None for all: (PSNR, SSIM) [N, 2], features [N, D], codebook usage or None."""
    device, usage = _device_of(tokenizer), CodebookUsage(tokenizer.codebook_size) if tokenizer.codebook_size else None
    scores, found = [], []
    for indices, tokens in tqdm(parts, desc="decode" if count is None else f"{count} tokens", unit="batch", disable=not progress):
        (_, originals), *_ = batches(dataset, indices, len(indices))
        tokens = tokens if count is None else tokens.truncate(count)
        if usage is not None:
            usage.update(tokens.ids)
        with torch.inference_mode():
            decoded = tokenizer.decode(tokens.to(device), generators=image_generators(seed, indices, device), **decode_options)
        decoded = as_saved(decoded.cpu())
        scores.append(torch.stack([psnr(decoded, originals), ssim(decoded, originals)], dim=1))
        found.append(features_of(net, decoded))
    return torch.cat(scores), torch.cat(found), usage


def default_token_counts(min_tokens: int, max_tokens: int, layout: TokenLayout | None = None) -> list[int]:
    """Powers of two inside the range, and both of its ends; of a layout of scales, the counts at which a scale ends."""
    whole = None if layout is None else layout.whole_counts(min_tokens, max_tokens)
    if whole is not None:
        return whole
    powers = [2**i for i in range(max_tokens.bit_length())]
    return sorted({min_tokens, max_tokens, *(power for power in powers if min_tokens <= power <= max_tokens)})


def evaluate_generation(
    samples: ImageSource,
    reference: ImageSource,
    *,
    training: ImageSource | None = None,
    features: str | FeatureNet = "conv",
    num_reference: int | None = None,
    neighbours: int = 3,
    near_copy_psnr: float = NEAR_COPY_PSNR,
    batch_size: int = 64,
    seed: int = 0,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Evaluation:
    """How samples compare with real images: Frechet and kernel distance, precision and recall, and near copies of training images.

    samples, reference, training: of one image size; without `training` near copies are not looked for. num_reference: None is all.
    near_copy_psnr: a sample whose nearest training image (or its mirror image) is above this many decibels is a near copy. The same share
    for the reference images stands beside it: it is what real, unseen images reach.
    Returns one row; `nearest` in it lists each sample's nearest training image.
    """
    net = feature_net(features, device=device) if isinstance(features, str) else features
    chosen = choose(reference, num_reference, seed)
    sample_images, sample_features = _read(samples, list(range(len(samples))), net, batch_size, "samples", progress)
    real_images, real_features = _read(reference, chosen, net, batch_size, "reference", progress)
    if sample_images.shape[1:] != real_images.shape[1:]:
        sizes = f"{tuple(sample_images.shape[-2:])} but real images {tuple(real_images.shape[-2:])}"
        raise ValueError(f"samples are {sizes}: open both at one size")
    distance = kid(sample_features, real_features, num_subsets=kid_subsets, subset_size=kid_subset_size, seed=seed)
    quality = precision_recall(sample_features, real_features, k=neighbours)
    row = {
        "num_samples": len(sample_images),
        "frechet": frechet_between(sample_features, real_features),
        "kid": distance.mean,
        "kid_std": distance.std,
    }
    row |= {"precision": quality.precision, "recall": quality.recall}
    if training is not None:
        both = find_near_copies(torch.cat([sample_images, real_images]), training, batch_size=batch_size, device=device, progress=progress)
        of_samples, of_real = _rows(both, slice(0, len(sample_images))), _rows(both, slice(len(sample_images), None))
        row |= {"near_copies": of_samples.share_above(near_copy_psnr), "near_copies_of_reference": of_real.share_above(near_copy_psnr)}
        row["nearest_psnr"] = float(of_samples.psnr.mean())
        pairs = zip(of_samples.index.tolist(), of_samples.psnr.tolist(), of_samples.mirrored.tolist(), strict=True)
        row["nearest"] = [{"training_image": index, "psnr": round(value, 2), "mirrored": mirrored} for index, value, mirrored in pairs]
    options = {"neighbours": neighbours, "near_copy_psnr": near_copy_psnr, "training_images": 0 if training is None else len(training)}
    options |= {"kid_subsets": distance.num_subsets, "kid_subset_size": distance.subset_size}
    protocol = EvaluationProtocol(
        task="generation",
        num_images=len(real_images),
        num_available=len(reference),
        image_size=tuple(real_images.shape[-2:]),
        features=net.name,
        feature_preprocess=net.preprocess,
        options=options | {"broken_images_left_out": len(chosen) - len(real_images)},
        seed=seed,
        machine=machine(device),
    )
    return Evaluation(protocol, [row])


def find_near_copies(
    samples: Tensor, training: ImageSource, *, batch_size: int = 64, device: torch.device | str = "cpu", progress: bool = False
) -> NearestImages:
    """The nearest image of a training set, mirrored or not, for each of the samples [N, 3, H, W] in [-1, 1]; see `nearest_images`.

    `index` counts the images of the set; a broken one is left out.
    """
    places: list[int] = []

    def stream():
        total = -(-len(training) // batch_size)
        for indices, images in tqdm(
            batches(training, range(len(training)), batch_size), total=total, desc="near copies", unit="batch", disable=not progress
        ):
            places.extend(indices)
            yield images

    nearest = nearest_images(as_saved(samples).to(device), stream())
    return NearestImages(nearest.psnr, torch.tensor(places)[nearest.index], nearest.mirrored)


def _read(source: ImageSource, indices: list[int], net: FeatureNet, batch_size: int, title: str, progress: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and their features [N, D], both on the CPU."""
    images, features = [], []
    total = -(-len(indices) // batch_size)
    for _, batch in tqdm(batches(source, indices, batch_size), total=total, desc=title, unit="batch", disable=not progress):
        images.append(batch)
        features.append(features_of(net, batch))
    if not images:
        raise ValueError(f"there are no images among the {title}")
    return torch.cat(images), torch.cat(features)


def _rows(nearest: NearestImages, rows: slice) -> NearestImages:
    return NearestImages(nearest.psnr[rows], nearest.index[rows], nearest.mirrored[rows])


def _counts(tokenizer, num_tokens: Sequence[int] | None, encoded: int) -> list[int]:
    """The counts to evaluate; `encoded` is what a full encoding of these images has."""
    if tokenizer.min_tokens == tokenizer.max_tokens:  # a fixed-length tokenizer; how many tokens can depend on the image size
        if num_tokens and set(num_tokens) != {encoded}:
            raise ValueError(f"num_tokens={list(num_tokens)} but this tokenizer always makes {encoded} tokens of such an image")
        return [encoded]
    counts = sorted(set(num_tokens)) if num_tokens else default_token_counts(tokenizer.min_tokens, encoded, tokenizer.layout)
    if counts[0] < tokenizer.min_tokens or counts[-1] > encoded:
        wrong = counts[0] if counts[0] < tokenizer.min_tokens else counts[-1]
        raise ValueError(f"num_tokens={wrong} but this tokenizer makes {tokenizer.min_tokens} to {encoded} tokens of such an image")
    return counts


def with_image_size(tokenizer, decode_options: dict, image_size: tuple[int, int]) -> dict:
    """The options for `tokenizer.decode`, with the size of the images where the model decodes any size and has to be told which."""
    return {"image_size": image_size, **decode_options} if "image_size" in _options_of_decode(tokenizer) else decode_options


def trained_image_size(model) -> tuple[int, int]:
    """(height, width) in pixels of the images a model was made for, from its settings.

    Raises ValueError: a model of any size, which has to be told one.
    """
    size = getattr(getattr(model, "settings", None), "image_size", None)  # computed in some classes, so not in every config
    if size is None:
        raise ValueError(f"{type(model).__name__} does not say at which size it was trained: give the image size (--image-size)")
    return (size, size) if isinstance(size, int) else tuple(size)


def _effective_options(tokenizer, given: dict) -> dict:
    """Every option of `decode` with the value it will have: the protocol records defaults too.

    An option that is None by default has its value in the config, as `decode_steps` for `num_steps`.
    """
    known = _options_of_decode(tokenizer)
    unknown = sorted(set(given) - set(known))
    if unknown:
        allowed = ", ".join(known) or "none"
        raise ValueError(f"decode of {type(tokenizer).__name__} has no option {unknown[0]!r}; its options: {allowed}")
    config = model_config(tokenizer)
    defaults = {name: config.get(f"decode_{name.removeprefix('num_')}") if value is None else value for name, value in known.items()}
    return defaults | given


def _options_of_decode(tokenizer) -> dict:
    """Options of `decode` and their defaults; FlexTok's hands its options on to `decode_to_latents`, SEED's to a pipeline not used here."""
    parameters = dict(inspect.signature(tokenizer.decode).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and hasattr(tokenizer, "decode_to_latents"):
        parameters |= inspect.signature(tokenizer.decode_to_latents).parameters
    return {name: p.default for name, p in parameters.items() if name not in _NOT_OPTIONS and p.kind is p.KEYWORD_ONLY}


def _device_of(tokenizer) -> torch.device:
    parameter = next(tokenizer.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
