"""What training and sampling an xAR takes: parameters, FLOPs, memory and hours, counted from the real module without allocating it.

    python -m eval.cost --recipe xar-imagenet256                                                  eight A100s; seconds
    python -m eval.cost --recipe xar-imagenet256 --num-devices 64 --device-tflops 989 --utilisation 0.35       H100s

    FLOPs      of every matrix product of one training step (forward and backward) on the meta device, torch.utils.flop_counter
    state      20 bytes a parameter: float32 weights, gradients, two Adam moments, averaged weights; each device holds all of it
    activations   bytes that autograd keeps for the backward pass, of one image, in the recipe's precision
    hours      steps * batch * FLOPs an image / (devices * FLOP/s of one * utilisation)

The utilisation is an assumption, which is why it is an option; the rest is counted. Reading tokens is not counted, nor is making them.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vistok.generators import XAR, FlowSampling, XARConfig
from vistok.generators.condition import Condition
from vistok.generators.xar_sampling import time_index
from vistok.tokens import TokenLayout
from vistok.training.recipes import get_recipe

STATE_BYTES = 4 + 4 + 8 + 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count what a recipe of an xAR takes."""

    recipe: str = "xar-imagenet256"
    """An xar recipe."""
    grid: tuple[int, int] = (16, 16)
    """Tokens along each side: 16 x 16 for 256 px images and a VAE of reduction 16."""
    code_dim: int = 16
    """Channels of a token."""
    num_classes: int = 1000
    """Classes of the data."""
    order: str | None = None
    """The order; what suits the grid when not given (cell-8 for 16 x 16)."""
    context: str = "noisy"
    """noisy or clean."""
    captions: bool = False
    """Whether the data has captions and the recipe reads them."""
    batch_size: int | None = None
    """Images a step; the recipe's when not given."""
    max_steps: int | None = None
    """Steps; the recipe's when not given."""
    num_devices: int = 8
    """How many devices share a batch."""
    device_tflops: float = 312.0
    """Peak of one device in the recipe's precision, in 10^12 FLOP/s: 312 for an A100 in bf16, 989 for an H100."""
    device_memory: float = 80.0
    """Memory of one device, in 10^9 bytes."""
    utilisation: float = 0.4
    """Share of the peak that training reaches: an assumption."""
    num_steps: int = 40
    """Solver steps an entity when sampling."""
    final_steps: int | None = None
    """Solver steps of the last entity; as the first when not given."""
    out: Path | None = None
    """JSON file for the numbers."""

    def __post_init__(self):
        for name in ("num_devices", "device_tflops", "device_memory", "utilisation", "num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cost:
    """What one recipe takes. FLOPs count a multiplication and an addition as two."""

    parameters: int
    forward_flops: int
    """Of one image, all entities at once, as in training."""
    training_flops: int
    """Of one image: forward and backward."""
    sampling_flops: int
    """Of one guided image."""
    sampling_passes: int
    state_bytes: int
    """On each device, whatever the batch."""
    activation_bytes: int
    """Of one image."""
    micro_batch: int
    """Images that a device holds at once: the largest power of two that fits its memory; 0: not one."""
    gradient_accumulation: int
    """Parts that the batch is split into, so that each fits all devices."""
    total_flops: float
    """Of the whole training."""
    hours: float
    """Of all devices together working side by side."""
    device_hours: float


def main(config: Config) -> Cost:
    """Count, print, save."""
    cost = count(config)
    billion, trillion = 1e9, 1e12
    batch = config.batch_size or get_recipe(config.recipe).train.batch_size
    print(f"{config.recipe}: {cost.parameters / 1e6:.2f} M parameters, {config.grid[0]} x {config.grid[1]} tokens of {config.code_dim}")
    print(f"  forward        {cost.forward_flops / billion:,.1f} GFLOP an image")
    print(f"  training       {cost.training_flops / billion:,.1f} GFLOP an image, {cost.total_flops:.3g} FLOP in all")
    print(f"  sampling       {cost.sampling_flops / trillion:,.2f} TFLOP a guided image in {cost.sampling_passes} passes")
    print(f"  memory         {cost.state_bytes / billion:.2f} GB of state + {cost.activation_bytes / 1e6:.1f} MB an image on each device")
    print(f"  batch {batch:<8} {cost.micro_batch} images a device at once, --gradient-accumulation {cost.gradient_accumulation}")
    rate = f"{config.num_devices} devices of {config.device_tflops:g} TFLOP/s at {config.utilisation:.0%}"
    print(f"  time           {cost.hours:,.1f} hours on {rate}, {cost.device_hours:,.0f} device hours")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(
            json.dumps({"config": asdict(config) | {"out": None}, "cost": asdict(cost)}, indent=2) + "\n", encoding="utf-8"
        )
    return cost


def count(config: Config) -> Cost:
    """The numbers of a recipe. Raises ValueError: it is no xar recipe."""
    chosen = get_recipe(config.recipe, "generator")
    if not hasattr(chosen.build, "config"):
        raise ValueError(f"{config.recipe} is no xar recipe; what others take is not counted here")
    fields = dict(code_dim=config.code_dim, num_classes=config.num_classes)
    shape = chosen.build.config(TokenLayout("grid", config.grid), order=config.order, has_captions=config.captions, **fields)
    batch, steps = config.batch_size or chosen.train.batch_size, config.max_steps or chosen.train.max_steps
    with torch.device("meta"):
        model = XAR(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    forward, training = training_flops(model, config.context)
    sampling = FlowSampling(num_steps=config.num_steps, final_steps=config.final_steps)
    state, each = STATE_BYTES * parameters, activation_bytes(shape, config.context, chosen.train.precision)
    fitting = int((config.device_memory * 1e9 - state) // each)
    micro = 2 ** (fitting.bit_length() - 1) if fitting > 0 else 0
    micro = min(micro, -(-batch // config.num_devices))
    total = float(steps) * batch * training
    seconds = total / (config.num_devices * config.device_tflops * 1e12 * config.utilisation)
    return Cost(
        parameters=parameters,
        forward_flops=forward,
        training_flops=training,
        sampling_flops=sampling_flops(model, sampling),
        sampling_passes=sum(sampling.steps(entity, model.order.num_entities) for entity in range(model.order.num_entities)),
        state_bytes=state,
        activation_bytes=each,
        micro_batch=micro,
        gradient_accumulation=-(-batch // (micro * config.num_devices)) if micro else 0,
        total_flops=total,
        hours=seconds / 3600,
        device_hours=seconds / 3600 * config.num_devices,
    )


def _inputs(model: XAR, device: str) -> tuple[torch.Tensor, Condition, dict[str, torch.Tensor]]:
    """One image for the training pass: clean slots, its condition, noise and times."""
    settings, order = model.settings, model.order
    words = torch.zeros(1, settings.caption_tokens, 16, dtype=torch.int64, device=device) if settings.text == "hash" else None
    condition = Condition(labels=torch.zeros(1, dtype=torch.int64, device=device), words=words)
    slots = torch.zeros(1, order.num_slots, settings.code_dim, device=device)
    return slots, condition, {"noise": slots.clone(), "times": torch.zeros(1, order.num_entities, device=device)}


def training_flops(model: XAR, context: str = "noisy") -> tuple[int, int]:
    """FLOPs of one image's forward pass, and of forward and backward, of a model on the meta device."""
    slots, condition, draws = _inputs(model, "meta")
    # written out as matrix products: the counter does not know the fused kernels of every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.denoising_loss(slots, condition, context=context, **draws).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@torch.no_grad()
def sampling_flops(model: XAR, sampling: FlowSampling) -> int:
    """FLOPs of one image, guided in every entity but the first of several, of a model on the meta device; see `Sampler`."""
    order, P, E = model.order, model.prefix_length, model.order.num_entities
    steps = [sampling.steps(entity, E) for entity in range(E)]
    times = {0, *(t for number in steps for t in time_index(sampling.times(number)[:-1]).tolist())}
    with FlopCounterMode(display=False) as counter:
        labels = torch.zeros(2, dtype=torch.int64, device="meta")
        model.modulations(torch.zeros(2, len(times), dtype=torch.int64, device="meta"), labels)
        if model.captions is not None:
            condition = _inputs(model, "meta")[1]
            model.captions(condition.and_null(), 2)
    total = counter.get_total_flops()
    for entity, length in enumerate(order.lengths):
        is_guided = entity > 0 or E == 1
        begin, before = order.entity(entity).start, order.lengths[entity - 1] if entity else 0
        # the first step takes what is not in the cache yet with it: the caption, or the entity before
        first = _pass_flops(model, 2 if is_guided or P else 1, before + length, P + begin - before if entity else 0)
        total += first + (steps[entity] - 1) * _pass_flops(model, 2 if is_guided else 1, length, P + begin)
    return total


def _pass_flops(model: XAR, rows: int, num_slots: int, cached: int) -> int:
    """FLOPs of one cached pass over so many slots, with the caption in front where nothing is cached."""
    order, P, D = model.order, model.prefix_length, model.settings.width
    cache = model.new_cache(rows)
    cache.length = cached
    prefix = torch.zeros(rows, P, D, device="meta") if P and not cached else None
    first = max(cached - P, 0)
    groups = order.entities_within(first + num_slots) - order.entities_within(first) + (prefix is not None)
    modulations = [torch.zeros(rows, groups, 6, D, device="meta")] * len(model.blocks)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.run(torch.zeros(rows, num_slots, model.code_dim, device="meta"), modulations, prefix=prefix, cache=cache)
    return counter.get_total_flops()


def activation_bytes(shape: XARConfig, context: str = "noisy", precision: str = "no") -> int:
    """Bytes that the backward pass of one image keeps, weights not counted: the difference between two images and one."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return _kept_bytes(shape, 2, context, dtype) - _kept_bytes(shape, 1, context, dtype)


def _kept_bytes(shape: XARConfig, batch_size: int, context: str, dtype: torch.dtype | None) -> int:
    """Bytes of all storages that the backward pass keeps, weights among them, without allocating any."""
    held: list[torch.Tensor] = []  # as long as they are, no later storage gets the place of one of them
    with FakeTensorMode():
        model = XAR(shape)
        slots, condition, draws = _inputs(model, "cpu")
        slots, draws = (
            slots.repeat(batch_size, 1, 1),
            {name: value.repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in draws.items()},
        )
        condition = condition[torch.zeros(batch_size, dtype=torch.int64)]
        autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor), autocast:
            model.denoising_loss(slots, condition, context=context, **draws).mean()
        return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}.values())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
