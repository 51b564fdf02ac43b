"""What several recipes share: settings at three scales, codebooks that stay alive on small data, shapes fitted to the images.

A recipe says what differs from the scale it names: `emoji_config(max_steps=2400)`.
"""

from dataclasses import replace
from pathlib import Path

from vistok.training.config import TrainConfig

# k-means start, moving average, revival: with a codebook that learns by gradient (as published) 4 of 5 codes died in 13 steps on the emoji
LIVE_CODEBOOK = dict(codebook_update="ema", kmeans_iterations=10, revive_after=20)
# unit vectors, and a term for even use: registers that share one codebook otherwise settle on a code or two each
EVEN_CODEBOOK = dict(
    metric="cosine", update="ema", commitment_weight=0.25, kmeans_iterations=10, revive_after=20, entropy_weight=0.1,
    entropy_temperature=0.05,
)  # fmt: skip

VECTORS_A_CODE = 32  # in the data set: with fewer, k-means places codes on single vectors and held-out images leave them unused
MIN_CODES = 16


def tiny_config(**changes) -> TrainConfig:
    """Seconds on a CPU: everything runs, nothing is learned."""
    base = TrainConfig(
        out=Path(), data="emoji", batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), warmup_steps=10, ema_decay=0.95, save_every=20,
        preview_every=40, log_every=5,
    )  # fmt: skip
    return replace(base, **changes)


def emoji_config(**changes) -> TrainConfig:
    """A tokenizer of the bundled 64 px emoji, in minutes on a CPU."""
    base = TrainConfig(
        out=Path(), data="emoji", image_size=64, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=50,
        schedule="trapezoid", decay_fraction=0.4, final_fraction=0.02, ema_decay=0.99, shift=4, log_every=20,
    )  # fmt: skip
    return replace(base, **changes)


def emoji_generator_config(**changes) -> TrainConfig:
    """A generator of ids over the tokens of the bundled emoji, in minutes on a CPU."""
    base = TrainConfig(
        out=Path(), data="emoji", max_steps=1400, batch_size=16, learning_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.05,
        warmup_steps=50, ema_decay=0.99, save_every=200, preview_every=400,
    )  # fmt: skip
    return replace(base, **changes)


def imagenet_config(**changes) -> TrainConfig:
    """A folder of photos at 256 px, on GPUs."""
    base = TrainConfig(
        out=Path(), data="imagenet/train", image_size=256, learning_rate=1e-4, betas=(0.9, 0.95), ema_decay=0.9999, precision="bf16",
        compile=True, save_every=5000, preview_every=5000, process_timeout=600,
    )  # fmt: skip
    return replace(base, **changes)


def square(image_size: int | None) -> dict:
    """The config field for square images; nothing where the recipe's size stays."""
    return {} if image_size is None else {"image_size": (image_size, image_size)}


def require_all_tokens(tokens) -> None:
    """Raises ValueError: the token folder holds only the first tokens of its images."""
    held, needed = tokens.plan.num_tokens, tokens.layout.num_tokens
    if held != needed:
        raise ValueError(f"the token folder holds {held} of {needed} tokens; this generator needs all")


def require_tokenizer(tokenizer, kind: type, name: str) -> None:
    """Raises ValueError: the tokens of tokenizer `name` are not those of a `kind`."""
    if not isinstance(tokenizer, kind):
        raise ValueError(f"this generator needs the tokens of a {kind.__name__}; {name} is a {type(tokenizer).__name__}")


def fitted_codebook_size(most: int, num_tokens: int, num_images: int | None) -> int:
    """`most` codes, halved until the data set's tokens are VECTORS_A_CODE a code."""
    size = most
    while num_images is not None and size > MIN_CODES and num_images * num_tokens < size * VECTORS_A_CODE:
        size //= 2
    return size
