"""Images to token folders: encode a data set once, so that generators train without pixels."""

import hashlib
import json
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from vistok.data.base import ImageDataset
from vistok.data.shards import TokenFolder, TokenPlan, TokenShards
from vistok.image import from_uint8
from vistok.tokens import VisualTokens

if TYPE_CHECKING:
    from vistok.protocols import ImageTokenizer


@torch.no_grad()
def tokenize_dataset(
    tokenizer: "ImageTokenizer",
    dataset: ImageDataset,
    folder: str | os.PathLike,
    *,
    num_tokens: int | None = None,
    flips: bool = True,
    deviations: bool = True,
    batch_size: int = 64,
    source: str = "",
    rank: int = 0,
    world_size: int = 1,
) -> TokenFolder | None:
    """Write the tokens of every image of a data set and open the result; complete shards of an earlier, interrupted call are kept.

    num_tokens: per image, all by default. flips: store the mirrored images' tokens too. deviations: of a VAE, store how far each value
    spreads too, so that training can draw from the posteriors as papers do; twice the space. rank, world_size: this process writes every
    world_size-th shard; the folder is opened (not None) once all shards are there.
    A continuous tokenizer's values are stored in half precision; a VAE's are the means of its posteriors. A tokenizer of posteriors has
    `encode_posterior`.
    Raises ValueError: an empty data set, or a folder begun by another tokenizer.
    """
    if not len(dataset):
        raise ValueError("there are no images to tokenize")
    has_deviations = deviations and tokenizer.codebook_size is None and hasattr(tokenizer, "encode_posterior")
    plan = TokenPlan(
        num_images=len(dataset),
        num_tokens=num_tokens or tokenizer.max_tokens,
        codebook_size=tokenizer.codebook_size,
        code_dim=tokenizer.code_dim if tokenizer.codebook_size is None else None,
        layout=tokenizer.layout,
        tokenizer_digest=tokenizer_digest(tokenizer),
        classes=tuple(dataset.classes),
        has_flips=flips,
        has_deviations=has_deviations,
        source=source,
    )
    writer = TokenShards(folder, plan)
    device = next(tokenizer.parameters()).device
    for shard in writer.missing[rank::world_size]:
        rows = plan.rows(shard)
        plain, mirrored = [], []
        label = f"tokenizing shard {shard + 1} of {plan.num_shards}"
        for start in tqdm(range(rows.start, rows.stop, batch_size), desc=label, disable=None):
            part = range(start, min(start + batch_size, rows.stop))
            images = from_uint8(torch.stack([dataset.read(row) for row in part])).to(device)
            plain.append(_encode(tokenizer, images, num_tokens, has_deviations))
            if flips:
                mirrored.append(_encode(tokenizer, images.flip(-1), num_tokens, has_deviations))
        (tokens, spread), (flipped, flipped_spread) = _joined(plain), _joined(mirrored)
        writer.write(
            shard,
            tokens,
            flipped=flipped,
            deviations=spread,
            flipped_deviations=flipped_spread,
            labels=[dataset.labels[row] for row in rows],
            captions=[dataset.captions[row] for row in rows],
            names=[dataset.names[row] for row in rows],
        )
    return TokenFolder(folder) if not writer.missing else None


def _encode(
    tokenizer: "ImageTokenizer", images: Tensor, num_tokens: int | None, has_deviations: bool
) -> tuple[VisualTokens, Tensor | None]:
    if not has_deviations:
        return tokenizer.encode(images, num_tokens=num_tokens).to("cpu"), None
    tokens, deviations = tokenizer.encode_posterior(images, num_tokens=num_tokens)
    return tokens.to("cpu"), deviations.cpu()


def _joined(parts: list[tuple[VisualTokens, Tensor | None]]) -> tuple[VisualTokens | None, Tensor | None]:
    """The batches of a shard as one."""
    if not parts:
        return None, None
    tokens, deviations = zip(*parts)
    return VisualTokens.stack(tokens), None if deviations[0] is None else torch.cat(deviations)


def tokenizer_digest(tokenizer) -> str:
    """Changes with the configuration and the weights of a tokenizer."""
    digest = hashlib.sha256(json.dumps(dict(tokenizer.config), sort_keys=True, default=str).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
