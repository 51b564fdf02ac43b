"""The speculative loop on real, tiny generators: greedy equality, laws, independence of rows, cache, overshoot."""

import copy

import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.decoding.accept import make_rule
from vistok.decoding.drafters import make_drafter
from vistok.decoding.speculative import speculate

GREEDY = SamplingConfig(temperature=0)


def sharpened(model, factor=20.0):
    """Fresh weights have flat laws, which any drafter would fail at; larger logits make some drafts right and some wrong."""
    with torch.no_grad():
        model.head.weight.mul_(factor)
    return model.eval()


def make(kind="grid", **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "rar":
            model = vistok.create("rar-tiny", codebook_size=12, num_classes=3, **overrides)
            for block in model.blocks:  # the identity, as initialised, would not notice a broken cache
                torch.nn.init.normal_(block.modulation.weight, std=0.05)
            return sharpened(model)
        shape = dict(layout_kind="sequence", layout_shape=(12,)) if kind == "sequence" else dict(layout_shape=(4, 4))
        return sharpened(vistok.create("gpt-tiny", **{**shape, "codebook_size": 12, "num_classes": 3, **overrides}))


DRAFTERS = {
    "copy": dict(length=3),
    "copy left": dict(length=5, source="left"),
    "recycling": dict(length=3),
    "recycling wide": dict(length=2, width=3),
    "jacobi": dict(length=4),
    "jacobi left": dict(length=3, fill="left"),
    "skip": dict(length=3),
    "model": dict(length=3),
    "model tree": dict(shape="tree", length=3, width=2),
    "model beams": dict(shape="beams", length=3, width=3),
    "model best": dict(shape="best", length=3, width=3, num_tokens=7),
}


def drafter_for(case, model):
    options = dict(DRAFTERS[case])
    if case.startswith("model"):
        options["model"] = blurred(model)
    return make_drafter(case.split()[0], model, **options)


def blurred(model):
    """Another model that agrees with this one often, not always."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        other.head.weight.add_(torch.randn_like(other.head.weight) * 0.2 * other.head.weight.std())
    return other


def condition(model, batch):
    return model.make_condition(batch, labels=[b % 3 for b in range(batch)])


@pytest.mark.parametrize("kind", ["grid", "sequence", "rar"])
@pytest.mark.parametrize("case", DRAFTERS)
def test_greedy_tokens_are_those_of_the_plain_loop(kind, case):
    model = make(kind)
    for batch in (1, 4):
        for scale in (1.0, 2.5):
            options = dict(sampling=GREEDY, guidance_scale=scale)
            expected, plain = generate(model, condition(model, batch), generators=rng.image_generators(0, batch), **options)
            got, stats = speculate(model, condition(model, batch), drafter=drafter_for(case, model), rule=make_rule("standard"),
                                   generators=rng.image_generators(0, batch), **options)  # fmt: skip
            assert torch.equal(got.ids, expected.ids)
            assert stats.target_passes <= plain.target_passes
