"""torch.compile takes a decoding step whole, and does not start again for every position."""

import pytest
import torch

import vistok
from vistok import rng
from vistok.decoding import generate


def counting(calls):
    """A backend that runs graphs as they are and counts them."""

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    return backend


def make(**overrides):
    torch._dynamo.reset()
    return vistok.create("gpt-tiny", **{"layout_shape": (5, 5), "num_classes": 3, **overrides}).eval()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"layout_kind": "sequence", "layout_shape": (25,)}, {"mixing": "pattention"}])
@torch.no_grad()
def test_a_step_compiles_to_one_graph_for_all_positions(overrides):
    model, calls = make(**overrides), []
    step = torch.compile(model, backend=counting(calls), fullgraph=True)
    condition, ids = model.make_condition(2, labels=[0, 1]), torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, cache = model(ids, condition), model.new_cache(2)
    rows = [step(ids[:, :0], condition, cache=cache)]
    for n in range(24):
        rows.append(step(ids[:, n : n + 1], cache=cache))
    torch.testing.assert_close(torch.cat(rows, 1), expected, atol=1e-5, rtol=0)
    assert len(calls) <= 4, f"{len(calls)} graphs"  # the prefix, the first step, the same with its position as a variable


@pytest.mark.slow
def test_a_compiled_generator_makes_the_same_tokens(monkeypatch):
    model = make()
    condition = model.make_condition(2, labels=[0, 2])
    expected, _ = generate(model, condition, generators=rng.image_generators(0, 2), guidance_scale=2.0)
    model.compile(fullgraph=True)
    made, _ = generate(model, condition, generators=rng.image_generators(0, 2), guidance_scale=2.0)
    assert torch.equal(made.ids, expected.ids)
