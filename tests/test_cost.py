"""What eval.cost counts, against formulas and against real runs of small models."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vistok
from eval.cost import Config, activation_bytes, count, sampling_flops, training_flops
from vistok.generators import FlowSampling, OrderConfig
from vistok.rng import image_generators

ORDERS = {
    "cell": OrderConfig(kind="cell", layout_shape=(4, 4), size=2),
    "scale": OrderConfig(kind="scale", layout_shape=(4, 4), scales=((1, 1), (2, 2), (4, 4))),
    "image": OrderConfig(kind="image", layout_shape=(4, 4)),
}
CAPTIONS = dict(text="hash", caption_tokens=3, caption_buckets=64)


def build(device="meta", **fields):
    with torch.device(device):
        return vistok.create("xar-tiny", **fields).eval()


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_the_flops_of_training_are_those_of_the_formula(context):
    model = build(order=ORDERS["cell"])
    D, C, H, S, E, L = 32, 4, 64, 16, 4, 2
    T, G = (S, E) if context == "noisy" else (2 * S - 4, 2 * E - 1)  # positions, and vectors that modulate them
    block = T * (4 * D * D + 3 * D * H) + 2 * T * T * D + G * 6 * D * D
    forward = 2 * (L * block + T * (2 * C * D + D * D) + G * (256 * D + D * D))
    counted = training_flops(model, context)
    assert counted[0] == forward
    assert 2.7 * forward < counted[1] <= 3 * forward  # the first layers have no gradient of their input


@pytest.mark.parametrize("fields", [{}, CAPTIONS])
@pytest.mark.parametrize("name", ORDERS)
def test_the_flops_of_sampling_are_those_of_a_real_run(name, fields):
    sampling = FlowSampling(num_steps=4, final_steps=2)
    model = build("cpu", order=ORDERS[name], **fields)
    condition = model.make_condition(1, labels=[3])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.sample(condition, generators=image_generators(0, 1), sampling=sampling, guidance_scale=2.0)
    assert sampling_flops(build(order=ORDERS[name], **fields), sampling) == counter.get_total_flops()


@pytest.mark.slow
def test_activation_bytes_are_those_of_a_real_forward_pass():
    model = build("cpu", order=ORDERS["cell"]).train()

    def kept(B):
        held, slots = [], torch.randn(B, 16, 4)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
            model.denoising_loss(slots, model.make_condition(B, labels=[0] * B), noise=slots, times=torch.rand(B, 4)).mean()
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    assert activation_bytes(model.settings) == pytest.approx(kept(2) - kept(1), rel=0.02)
    assert activation_bytes(model.settings, precision="bf16") < activation_bytes(model.settings)


@pytest.mark.slow
def test_hours_memory_and_batches_follow_from_what_is_counted():
    options = dict(recipe="xar-tiny", grid=(4, 4), code_dim=4, num_classes=9, max_steps=1000, batch_size=64, num_steps=3)
    cost = count(Config(**options, num_devices=2, device_tflops=1.0, utilisation=0.5))
    assert cost.hours == pytest.approx(1000 * 64 * cost.training_flops / (2 * 0.5e12) / 3600)
    assert cost.micro_batch == 32 and cost.gradient_accumulation == 1 and cost.state_bytes == 20 * cost.parameters
    tight = (cost.state_bytes + 5 * cost.activation_bytes) / 1e9
    small = count(Config(**options, num_devices=2, device_memory=tight))
    assert small.micro_batch == 4 and small.gradient_accumulation == 8
    assert count(Config(**options, device_memory=1e-6)).micro_batch == 0
    with pytest.raises(ValueError, match="no xar recipe"):
        count(Config(recipe="gpt-tiny"))
    with pytest.raises(ValueError, match="utilisation"):
        Config(utilisation=0.0)
