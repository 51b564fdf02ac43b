"""Tokens of a generator that draws values out of noise, entity after entity (xAR): timed, and snapped to the codes of a tokenizer of ids.

    value -> the nearest code, after each entity        so that the next one sees codes, as in training

B images, N tokens, n slots so far, C channels, K codes.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vistok.decoding.generate import GenerationStats
from vistok.quantizers.lookup import nearest_codes
from vistok.tokens import VisualTokens


@torch.no_grad()
def generate_values(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator],
    codes: Tensor | None = None,
    num_tokens: int | None = None,
    sampling=None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images, one image a generator: values, or ids where there are codes.

    codes: [K, C] vectors of the tokenizer's codes (`code_table`); None for a continuous tokenizer.
    num_tokens, sampling, guidance_scale, prefix, on_step: see `XAR.sample`; num_tokens is its num_slots.
    Raises ValueError: as `XAR.sample`, or the model is in training mode.
    """
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")
    codes = None if codes is None else codes.to(model.device)
    began, passes = time.perf_counter(), 0

    def snap(values: Tensor) -> Tensor:
        return codes[nearest_codes(values, codes)]

    def count(module, arguments, output):
        nonlocal passes
        passes += 1

    counter = model.encoder_in.register_forward_hook(count)
    try:
        tokens = model.sample(
            condition,
            generators=generators,
            sampling=sampling,
            guidance_scale=guidance_scale,
            prefix=prefix,
            num_slots=num_tokens,
            snap=None if codes is None else snap,
            on_step=on_step,
        )
    finally:
        counter.remove()
    if codes is not None:
        tokens = VisualTokens.from_ids(nearest_codes(tokens.values, codes), tokens.layout)
    tokens.data.sum().item()  # wait for the device, so that seconds means something
    B, N = tokens.data.shape[:2]
    return tokens, GenerationStats(B, B * N, passes, time.perf_counter() - began)


def code_table(tokenizer) -> Tensor | None:
    """[K, C] float32 vectors of all codes of a tokenizer of ids; None for a continuous one."""
    if tokenizer.codebook_size is None:
        return None
    device = next(tokenizer.parameters()).device
    with torch.no_grad():
        return tokenizer.embed(torch.arange(tokenizer.codebook_size, device=device)).float()


def makes_values(generator) -> bool:
    """Whether a generator draws values rather than ids: it is an xAR."""
    return not hasattr(generator, "vocab_size")


def check_values(generator, tokenizer) -> None:
    """Raises ValueError: the tokenizer does not decode what a generator of values makes."""
    ours, theirs = generator.layout, tokenizer.layout
    is_beginning = ours.kind == theirs.kind == "sequence" and tokenizer.min_tokens <= ours.num_tokens <= theirs.num_tokens
    if generator.code_dim != tokenizer.code_dim or not (ours == theirs or is_beginning):
        raise ValueError(
            f"the generator makes {generator.code_dim} values a token of {ours} but the tokenizer has {tokenizer.code_dim} of {theirs}: "
            "they were not trained together"
        )


def entity_values(generator, tokenizer, tokens: VisualTokens, num_entities: int) -> Tensor:
    """Values [B, n, C] of the first entities of whole images' tokens: what `generate_values` takes as a prefix.

    Raises ValueError: the tokens are not all that the generator makes, there are not so many entities, or they are scales that the tokens
    do not hold.
    """
    order, codes = generator.order, code_table(tokenizer)
    if order.is_pyramid:
        raise ValueError("the tokens hold the finest scale alone, not the ones before it; keep what the callback is given instead")
    if not 1 <= num_entities <= order.num_entities:
        raise ValueError(f"{num_entities} entities are asked for; allowed: 1 to {order.num_entities}")
    values = tokens.values if codes is None else codes[tokens.ids.clamp(min=0).to(codes.device)]
    if values.shape[1:] != (generator.max_tokens, generator.code_dim) or int(tokens.counts.min()) < generator.max_tokens:
        shape = f"[{generator.max_tokens}, {generator.code_dim}]"
        raise ValueError(f"an image's tokens are {list(values.shape[1:])} and some may be missing; the generator makes {shape}")
    return order.pack(values)[:, : order.ends[num_entities - 1]]
