"""What a pipeline asks of a generator, whatever its kind: how tokens are drawn, how an earlier call's go on, what unfinished ones show.

B images, N tokens, n tokens or slots so far, C channels, K codes.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from vistok.decoding.flow import code_table, entity_values, generate_values, makes_values
from vistok.decoding.generate import generate, step_sizes
from vistok.decoding.multi_pass import PUBLISHED, generate_multi_pass, narrowing
from vistok.decoding.parallel import generate_parallel
from vistok.decoding.sampling import SamplingConfig
from vistok.generators.xar_sampling import FlowSampling
from vistok.quantizers.lookup import nearest_codes
from vistok.tokens import VisualTokens


def plain_draw(generator, tokenizer, sampling: SamplingConfig, steps: dict, prefix: Tensor | None, total: int) -> Callable:
    """What draws the tokens of a batch without drafts: a function of its rows and of what all generators take.

    sampling: of a generator of ids. steps: num_steps, final_steps and solver, fields of FlowSampling, None where not given; a generator
    that fills masks and one that looks again (TokenFlowT2I) take num_steps too, as its passes. prefix: of all `total` images.
    Raises ValueError: one of them is of another kind of generator, or of another number of images.
    """
    steps = {name: value for name, value in steps.items() if value is not None}
    if prefix is not None and len(prefix) != total:
        raise ValueError(f"prefix is of {len(prefix)} images, but {total} are asked for")
    if makes_values(generator):
        if sampling != SamplingConfig():
            raise ValueError(
                "temperature, top_k, top_p, min_p and typical_p choose among ids; this generator draws values: "
                "num_steps, solver, guidance_scale"
            )
        run, how = generate_values, dict(codes=code_table(tokenizer), sampling=FlowSampling(**steps))
    else:
        run, how = _draw_ids(generator, sampling, **steps)

    def draw(rows: slice, condition, **options):
        known = None if prefix is None else prefix[rows].to(generator.device)
        tokens, cost = run(generator, condition, prefix=known, **how, **options)
        return replace(tokens, layout=tokenizer.layout) if makes_values(generator) else tokens, cost

    return draw


def _draw_ids(generator, sampling: SamplingConfig, num_steps: int | None = None, **of_values) -> tuple[Callable, dict]:
    """The decoding loop of a generator of ids, and its options."""
    if of_values:
        raise ValueError(f"{next(iter(of_values))} is of generators of values (xAR); this one draws ids")
    if hasattr(generator, "look_again"):
        passes = narrowing(sampling, len(PUBLISHED) if num_steps is None else num_steps, generator.vocab_size)
        return generate_multi_pass, dict(passes=passes)
    if num_steps is None:
        return generate, dict(sampling=sampling)
    if not hasattr(generator, "mask_id"):
        raise ValueError(f"num_steps={num_steps}, but the steps of a {type(generator).__name__} are its tokens or scales")

    def fill(*args, num_tokens: int | None, **options):
        generator.step_sizes(generator.max_tokens if num_tokens is None else num_tokens)  # a part of an image is refused
        return generate_parallel(*args, **options)

    return fill, dict(sampling=sampling, num_steps=num_steps)


def partial_tokens(generator, tokenizer, data: Tensor) -> VisualTokens:
    """Tokens to decode of what a generator has made so far.

    data: of xAR, values [B, n, C] of the first entities: where nothing is known yet, the mean of all tokens. Of others, ids [B, n]: as far
    as the tokenizer decodes beginnings (FlexTok; VAR and TokenFlow by whole scales) the beginning; elsewhere every unknown token is the
    code nearest to the mean of all codes.
    Raises ValueError: n ends inside an entity.
    """
    codes = code_table(tokenizer)
    if not makes_values(generator):
        return _partial_ids(tokenizer, data, codes, getattr(generator, "mask_id", -1))
    order, values = generator.order, generator.normalise(data.to(generator.device))
    if order.is_sequential and tokenizer.min_tokens < tokenizer.max_tokens:  # ordered tokens, of which any beginning is a picture
        shown = values
    else:
        shown = order.partial(values)
    values = generator.denormalise(shown)
    if codes is None:
        return VisualTokens.from_values(values, tokenizer.layout)
    return VisualTokens.from_ids(nearest_codes(values, codes.to(values.device)), tokenizer.layout)


def _partial_ids(tokenizer, ids: Tensor, codes: Tensor, unknown: int) -> VisualTokens:
    if tokenizer.layout.kind == "scales":
        ends = list(accumulate(h * w for h, w in tokenizer.layout.shape))
        whole = max((end for end in ends if end <= ids.shape[1]), default=0)
        ids = ids[:, :whole] if whole >= tokenizer.min_tokens else ids
    ids = ids.to(codes.device)
    if ids.shape[1] < tokenizer.min_tokens or bool((ids == unknown).any()):
        middle = nearest_codes(codes.mean(0, keepdim=True), codes)
        full = middle.expand(len(ids), tokenizer.max_tokens).clone()
        full[:, : ids.shape[1]] = torch.where(ids == unknown, middle, ids)
        ids = full
    return VisualTokens.from_ids(ids, tokenizer.layout)


def first_entities(generator, tokenizer, tokens: VisualTokens, num_entities: int) -> Tensor:
    """Of whole images' tokens the first entities, as `prefix` takes them: ids [B, n], or values [B, n, C] of an xAR.

    Raises ValueError: there are not so many, none is left to make, or see `entity_values`.
    """
    if makes_values(generator):
        return entity_values(generator, tokenizer, tokens, num_entities)
    fills_masks = hasattr(generator, "mask_id")  # in any order, so its entities are its tokens
    sizes = (1,) * generator.max_tokens if fills_masks else step_sizes(generator, generator.max_tokens)
    if not 0 <= num_entities < len(sizes):
        raise ValueError(f"{num_entities} entities are to be kept, but an image is made in {len(sizes)} steps, and one must be left")
    return tokens.ids[:, : sum(sizes[:num_entities])]
