"""What a model makes of an image, as one vector: the tokens' code vectors, or what the model had before it quantized.

| source | what |
|---|---|
| `ids` | code vectors of the tokens (`embed`), or the values of continuous tokens |
| `features` | what goes into the quantizer (`VisualModel`s below name it), or a vision tower's patch features |

| pooling | what |
|---|---|
| `mean` | mean over the image's tokens |
| `flat` | all tokens side by side, places and all; tokens beyond an image's count are 0 |

B images, N tokens, D width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vistok.metrics.sources import ImageSource, batches

SOURCES, POOLINGS = ("ids", "features"), ("mean", "flat")
MAX_FLAT = 8192


def _grid(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, N, D]


# What each class has before its quantizer, [B, N, D]. One line a class; a class that is not here has no "features".
CONTINUOUS: dict[str, Callable[[object, Tensor], Tensor]] = {
    "FlexTok": lambda model, images: model.encoder(model.encode_latents(images), model.max_tokens),
    "FSQ2D": lambda model, images: _grid(model.encoder(images.to(model.dtype))),
    "KLVAE": lambda model, images: _grid(model.posterior(images)[0]),
    "LaVIT": lambda model, images: model.patches(images),
    "SEED": lambda model, images: model.causal_embeddings(images),
    "TiTok": lambda model, images: model.encode_registers(images),
    "TokenFlow": lambda model, images: _grid(model.features(images)),
    "VARVQVAE": lambda model, images: _grid(model.features(images)),
    "VQGAN": lambda model, images: model.vectors(images).flatten(1, 2),
    "VisionTower": lambda model, images: model.features(images),
}


def token_vectors(model, images: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Vectors [B, N, D] float32 and mask [B, N] bool of images [B, 3, H, W] in [-1, 1].

    Raises ValueError: the source is not known, or the model has none of it.
    """
    if source == "ids":
        if not hasattr(model, "encode"):
            raise ValueError(f"{type(model).__name__} makes no tokens; its features can be probed")
        tokens = model.encode(images)
        values = tokens.values if tokens.ids is None else model.embed(tokens.ids.clamp(min=0))
        return values.float(), tokens.mask
    if source != "features":
        raise ValueError(f"source={source!r} is not known; allowed: {', '.join(SOURCES)}")
    if type(model).__name__ not in CONTINUOUS:
        raise ValueError(f"{type(model).__name__} has no features before its tokens; those of {', '.join(sorted(CONTINUOUS))} are known")
    vectors = CONTINUOUS[type(model).__name__](model, images).float()
    return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


def pool(vectors: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[B, N, D] -> [B, D] ("mean") or [B, N D] ("flat"), over the tokens that are there."""
    present = vectors * mask[..., None]
    return present.sum(1) / mask.sum(1, keepdim=True).clamp(min=1) if pooling == "mean" else present.flatten(1)


@torch.inference_mode()
def represent(
    model, dataset: ImageSource, *, sources: Sequence[str] = SOURCES, batch_size: int = 64, progress: bool = False, title: str = "encode"
) -> tuple[dict[str, Tensor], list[int]]:
    """Every image of a set under every source and pooling: {"ids, mean": [n, D], ...} float32 on the CPU, and the images' numbers.

    A broken image is left out. Where all tokens side by side are wider than MAX_FLAT numbers, "flat" is left out.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parts: dict[str, list[Tensor]] = {}
    numbers: list[int] = []
    total = -(-len(dataset) // batch_size)
    stream = batches(dataset, range(len(dataset)), batch_size)
    for indices, images in tqdm(stream, total=total, desc=title, unit="batch", disable=not progress):
        numbers += indices
        for source in sources:
            vectors, mask = token_vectors(model, images.to(device), source)
            for pooling in POOLINGS:
                if pooling == "mean" or vectors[0].numel() <= MAX_FLAT:
                    parts.setdefault(f"{source}, {pooling}", []).append(pool(vectors, mask, pooling).cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}, numbers
