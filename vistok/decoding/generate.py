"""The plain decoding loop: one step at a time, one pass of the model each. A step is one token, or a scale where the model says so.

    guided = unconditional + s (conditional - unconditional)        s = 1: no guidance, and no unconditional rows are computed

B images, N tokens, K codebook size.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.sampling import SamplingConfig, draw
from vistok.layers.packed import packed_linears
from vistok.tokens import VisualTokens

WORTH_PACKING = 16  # passes


@dataclass(frozen=True)
class GenerationStats:
    """What a generation cost. Stats of several batches add up.

    target_passes: passes of the model, a doubled batch counts once. seconds: wall time of the loop, without decoding to pixels.
    decode_seconds: wall time of decoding tokens to pixels, where that was done too.
    """

    num_images: int
    num_tokens: int
    """Tokens made, over all images."""
    target_passes: int
    seconds: float
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(self.seconds, 1e-9)

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        return GenerationStats(
            self.num_images + other.num_images,
            self.num_tokens + other.num_tokens,
            self.target_passes + other.target_passes,
            self.seconds + other.seconds,
            self.decode_seconds + other.decode_seconds,
        )


def guidance_until(scale: float, num_steps: int) -> Callable[[int], float]:
    """A guidance schedule: `scale` for the first `num_steps` tokens, none after. LlamaGen's cfg_interval c is num_steps = c + 2."""
    return lambda step: scale if step < num_steps else 1.0


def step_sizes(model, num_tokens: int) -> tuple[int, ...]:
    """Tokens of each decoding step: what the model's own `step_sizes` says, else one a step."""
    return model.step_sizes(num_tokens) if hasattr(model, "step_sizes") else (1,) * num_tokens


def guidance_schedule(model, scale: float) -> Callable[[int], float]:
    """Guidance of each step where a number is given: what the model's own `guidance_schedule` says, else that number throughout."""
    return model.guidance_schedule(scale) if hasattr(model, "guidance_schedule") else lambda step: scale


@torch.no_grad()
def generate(
    model,
    condition,
    *,
    generators: Sequence[torch.Generator] | None = None,
    uniforms: Tensor | None = None,
    num_tokens: int | None = None,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, GenerationStats]:
    """Tokens of B images, one image a generator, or a row of uniforms.

    condition: of the B images (`model.make_condition`). num_tokens: k, all by default; fewer are a prefix of what more would be.
    guidance_scale: s, or a function of the step; a model with a schedule of its own (VAR) rises to a number that is given. The
    unconditional rows are dropped behind the last step with s other than 1.
    prefix: [B, n] ids of each image's first tokens, kept as they are; the same generators go on from them as an unbroken run would. Read in
    one pass where a step is a token, and step by step elsewhere. Of a generator that fills masks: see `generate_parallel`.
    on_step: called with the step and all ids so far, [B, step + 1] where a step is a token, after each step that is run.
    uniforms: [B, num_tokens or more] on [0, 1), instead of generators: token n is drawn by uniform n (`decoding.sampling.sample`).
    On a CPU the model's linear layers are packed for as long as this takes (`layers.packed`); logits differ by rounding.
    Every generator is advanced by `model.max_tokens` uniforms whatever num_tokens is; image i depends on its own alone.
    Raises ValueError: num_tokens or the prefix is out of range or ends inside a step, the model is in training mode, or generators and
    uniforms are both given or both not.
    """
    if hasattr(model, "mask_id"):
        from vistok.decoding.parallel import generate_parallel  # that module builds on this one

        model.step_sizes(model.max_tokens if num_tokens is None else num_tokens)  # a part of an image is refused
        if generators is None:
            raise ValueError("a generator that fills masks draws from generators, not from uniforms")
        how = dict(sampling=sampling, guidance_scale=guidance_scale, prefix=prefix, on_step=on_step)
        return generate_parallel(model, condition, generators=generators, **how)
    if (generators is None) == (uniforms is None):
        raise ValueError("give generators or uniforms, one of both")
    B, N = len(uniforms if generators is None else generators), model.max_tokens if num_tokens is None else num_tokens
    if isinstance(N, bool) or not isinstance(N, int) or not 1 <= N <= model.max_tokens:
        raise ValueError(f"num_tokens={num_tokens!r} but this generator makes 1 to {model.max_tokens} tokens")
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")
    sampling = sampling or SamplingConfig()
    sizes = step_sizes(model, N)
    if not callable(guidance_scale):
        guidance_scale = guidance_schedule(model, guidance_scale)
    scales = [float(guidance_scale(step)) for step in range(len(sizes))]
    guided_steps = max((n + 1 for n, scale in enumerate(scales) if scale != 1), default=0)

    began = time.perf_counter()
    if generators is not None:
        uniforms = rng.rand((model.max_tokens,), generators, device=model.device, dtype=torch.float64)
    elif uniforms.shape[1] < N:
        raise ValueError(f"uniforms hold {uniforms.shape[1]} draws an image, but {N} tokens are asked for")
    uniforms = uniforms.to(model.device)
    ids = torch.empty(B, N, dtype=torch.int64, device=model.device)
    known = 0 if prefix is None else take_prefix(prefix, ids, sizes, model.vocab_size)
    # a prefix of single tokens is read at once: the first pass is that of the step behind it
    done = first = known if max(sizes) == 1 else 0
    rows = 2 * B if guided_steps > first else B
    cache = model.new_cache(rows, N)
    new, start = ids[:, :done].repeat(rows // B, 1), condition.and_null() if rows > B else condition
    # packing pays for itself after about ten passes
    with packed_linears(model, rows * max(sizes)) if len(sizes) - first >= WORTH_PACKING else nullcontext():
        for step, size, scale in list(zip(range(len(sizes)), sizes, scales))[first:]:
            if rows > B and step == guided_steps:
                rows, new = B, new[:B]
                cache.keep_rows(B)
            logits = model(new, start, cache=cache)[:, -size:].float()  # [rows, size, K]
            if rows > B:
                conditional, unconditional = logits.chunk(2)
                logits = conditional if scale == 1 else unconditional + scale * (conditional - unconditional)
            made = slice(done, done + size)
            if done >= known:
                ids[:, made] = draw(logits, sampling, uniforms[:, made])
            new, start, done = ids[:, made].repeat(rows // B, 1), None, done + size
            if on_step is not None:
                on_step(step, ids[:, :done])
    ids.sum().item()  # wait for the device, so that seconds means something
    stats = GenerationStats(B, B * (N - known), len(sizes) - first, time.perf_counter() - began)
    return VisualTokens.from_ids(ids, model.layout), stats


def take_prefix(prefix: Tensor, ids: Tensor, sizes: Sequence[int], vocab_size: int) -> int:
    """Write a prefix [B, n] into ids [B, N]; n. Raises ValueError: it is no prefix of these images."""
    (B, N), ends = ids.shape, list(accumulate(sizes))
    if prefix.ndim != 2 or len(prefix) != B or prefix.is_floating_point():
        raise ValueError(f"the prefix must hold ids [{B}, n], got {prefix.dtype} of shape {tuple(prefix.shape)}")
    n = prefix.shape[1]
    if n not in (0, *ends[:-1]):
        raise ValueError(f"a prefix of {n} tokens ends inside a step, or leaves none to make of {N}; allowed: 0, {str(ends[:-1])[1:-1]}")
    if n and not 0 <= int(prefix.min()) <= int(prefix.max()) < vocab_size:
        raise ValueError(f"the prefix holds ids from {int(prefix.min())} to {int(prefix.max())}; allowed: 0 to {vocab_size - 1}")
    ids[:, :n] = prefix
    return n
