"""Linear layers laid out for decoding: packed ones compute what plain ones do, int8 ones what their rounded weights do."""

import os
import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.layers import native
from vistok.layers.norms import RMSNorm
from vistok.layers.packed import MAX_ROWS, Int8Linear, packed_linears, to_int8


@pytest.fixture(autouse=True, params=["own product", "torch's"])
def product(request, monkeypatch):
    """Everything here holds with our product and with what stands in for it where it cannot be built."""
    if request.param == "torch's":
        monkeypatch.setattr(native, "enabled", False)
        if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
            pytest.skip("this torch has no int8 kernels for this processor")
    elif not native.is_available():
        pytest.skip("no compiler here")
    return request.param


def make(**overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(width=256, depth=2, num_heads=4, hidden=512, codebook_size=300, layout_shape=(5, 5), num_classes=3)
        model = vistok.create("gpt-tiny", **{**shape, **overrides}).eval()
        nn.init.normal_(model.head.weight, std=0.2)  # logits far enough apart that rounding decides nothing
        return model


def forwards(model):
    return [part for part in model.modules() if "forward" in vars(part)]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, MAX_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_the_plain_product_for_any_number_of_rows(rows, bias):
    torch.manual_seed(rows)
    layer = nn.Linear(200, 300, bias=bias)
    for shape in [(rows, 1), (7, 3), (1,), (0, 2)]:
        x = torch.randn(*shape, 200)
        with packed_linears(layer, rows):
            assert "forward" in vars(layer)
            out = layer(x)
        assert out.shape == (*shape, 300) and torch.allclose(out, layer(x), atol=1e-5)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    "guidance, overrides", [(1.0, {}), (3.0, {}), (lambda step: 2.0 if step < 9 else 1.0, {}), (3.0, {"mixing": "pattention", "hidden": 0})]
)
def test_generation_with_packed_layers_gives_the_tokens_and_logits_of_plain_ones(guidance, overrides, monkeypatch):
    model = make(**overrides)
    condition, seen, counted = model.make_condition(1, labels=[1]), [], []
    hook = model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    options = dict(guidance_scale=guidance, sampling=SamplingConfig(top_k=50))
    count = lambda *_: counted.append(len(forwards(model)))  # noqa: E731
    fast, _ = generate(model, condition, generators=rng.image_generators(0, 1), on_step=count, **options)
    monkeypatch.setattr(import_module("vistok.decoding.generate"), "WORTH_PACKING", 1000)
    plain, _ = generate(model, condition, generators=rng.image_generators(0, 1), **options)
    hook.remove()
    assert set(counted) == {11 if overrides else 9} and not forwards(model)  # four or five layers a block, and the head
    assert torch.equal(fast.ids, plain.ids)
    half = len(seen) // 2
    assert max(float((a - b).abs().max()) for a, b in zip(seen[:half], seen[half:])) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_autocast_works_in_packed_layers_too(rows):
    model = make()
    condition, ids = model.make_condition(rows), torch.zeros(rows, 3, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids, condition)
        with packed_linears(model, rows):
            assert torch.allclose(model(ids, condition).float(), expected.float(), atol=0.1)


def test_weights_that_change_between_two_calls_are_read_anew():
    model = make()
    condition, greedy = model.make_condition(1), dict(uniforms=torch.zeros(1, 25), sampling=SamplingConfig(temperature=0))
    first, _ = generate(model, condition, **greedy)
    model.head.weight.data.copy_(model.head.weight.data.roll(1, 0))
    second, _ = generate(model, condition, **greedy)
    assert (second.ids[0, 0] - first.ids[0, 0]) % 300 == 1


@torch.no_grad()
def test_layers_are_given_back_after_an_error_and_from_another_thread():
    model, x = make(), torch.randn(2, 256)
    with pytest.raises(RuntimeError, match="shapes|size|dim"), packed_linears(model, 1):
        model.head(torch.randn(2, 255))
    assert not forwards(model)
    expected, results = model.head(x), []

    def work():
        with torch.no_grad():
            for _ in range(20):
                with packed_linears(model, 2):
                    results.append(model.head(x))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not forwards(model) and len(results) == 60
    assert all(torch.allclose(result, expected, atol=1e-5) for result in results)


def test_what_would_not_gain_is_left_alone():
    model = make()
    for rows in (2, MAX_ROWS + 1):
        with packed_linears(model, rows):  # gradients are on
            assert not forwards(model)
    with torch.no_grad():
        for other in (make().to(torch.bfloat16), vistok.create("gpt-tiny", width=32, num_heads=2, hidden=32).eval()):
            with packed_linears(other, 2):
                assert not forwards(other)
        with packed_linears(model, MAX_ROWS + 1):
            assert not forwards(model)


# int8


def rounded(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_an_int8_layer_computes_the_product_with_its_rounded_weights(bias):
    torch.manual_seed(0)
    plain = nn.Linear(200, 300, bias=bias)
    layer, x = Int8Linear(plain.weight, plain.bias), torch.randn(2, 3, 200) * torch.tensor([[1e-4], [1.0], [1e4]])
    expected = F.linear(x, rounded(plain.weight), plain.bias)
    largest = x.abs().amax(-1, keepdim=True)
    # 14 bits of the largest input: an error of 1 / 15,876 of it at most for each input, of either sign
    assert ((layer(x) - expected).abs() < 5e-3 * largest).all()
    assert ((layer(x) - expected).abs().mean() / expected.abs().mean()) < 1e-3
    assert torch.equal(layer(torch.zeros(2, 200)), torch.zeros(2, 300) if plain.bias is None else plain.bias.expand(2, -1))


@torch.no_grad()
def test_a_row_of_an_int8_layer_does_not_depend_on_the_others_at_all():
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(300, 200)), torch.randn(5, 200) * torch.tensor([[1], [100], [3], [0.01], [1]])
    together = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], together[i]) for i in range(5))
    assert torch.equal(layer(x[:2, None])[:, 0], together[:2])


@pytest.mark.parametrize("overrides", [{}, {"mixing": "pattention", "hidden": 0}])
def test_an_int8_generator_makes_nearly_the_same_law_and_refuses_to_be_saved(overrides, tmp_path):
    model, plain = to_int8(make(**overrides)), make(**overrides)
    assert sum(isinstance(part, Int8Linear) for part in model.modules()) == (21 if overrides else 9)
    condition, ids = plain.make_condition(2, labels=[0, 2]), torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, exact = model(ids, condition), plain(ids, condition)
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    assert 0 < kl.mean() < 2e-3 and (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9
    tokens, _ = generate(model, condition, generators=rng.image_generators(0, 2), guidance_scale=2.0)
    alone, _ = generate(model, condition[1:], generators=rng.image_generators(0, [1]), guidance_scale=2.0)
    assert torch.equal(alone.ids[0], tokens.ids[1])
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float32"):
        to_int8(make().to(torch.bfloat16))


@torch.no_grad()
def test_our_product_is_the_same_to_the_bit_for_any_number_of_rows_and_threads(product):
    if product == "torch's":
        pytest.skip("says so of none but ours")
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    for O, K in [(300, 512), (257, 1023), (3, 40), (1, 7)]:  # noqa: E741
        x, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(17, K), (O, K), (O,)])
        quantized, scale = torch.randint(-127, 128, (O, K), generator=generator, dtype=torch.int8), torch.rand(O, generator=generator)
        for options in (dict(weight=weight, bias=bias), dict(weight=quantized, scale=scale)):
            together = native.linear_rows(x, **options)
            exact = x.double() @ options["weight"].double().T
            exact = exact * scale if "scale" in options else exact + bias
            assert torch.allclose(together.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
            for rows in range(1, 9):
                assert torch.equal(native.linear_rows(x[:rows], **options), together[:rows])
            try:
                torch.set_num_threads(3)
                assert torch.equal(native.linear_rows(x, **options), together)
            finally:
                torch.set_num_threads(threads)
    assert native.linear_rows(torch.empty(2, 0, 7), torch.ones(5, 7)).shape == (2, 0, 5)


def test_a_team_of_fewer_threads_than_torch_asks_for_computes_all_outputs(product):
    if product == "torch's":
        pytest.skip("says so of none but ours")
    code = (
        "import torch; from vistok.layers import native; assert native.is_available(); torch.set_num_threads(4);"
        "x, w = torch.randn(2, 512), torch.randn(300, 512); y = native.linear_rows(x, w);"
        "assert torch.allclose(y, x @ w.T, atol=1e-3), y"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ, OMP_THREAD_LIMIT="2"))


def test_without_a_compiler_or_where_it_fails_there_is_no_product_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    probe = native._library.__wrapped__  # what is built once a process, here anew
    for script in ("exit 1", 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'):
        cc = tmp_path / "cc"
        cc.write_text(f"#!/bin/sh\n{script}\n")
        cc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert probe() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert probe() is None


# norms


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_quick_rms_norm_is_torchs(scale):
    torch.manual_seed(0)
    norm, x = RMSNorm(96, eps=1e-5), torch.randn(2, 3, 96) * scale
    nn.init.normal_(norm.weight)
    expected = F.rms_norm(x, (96,), norm.weight, 1e-5)
    assert torch.equal(norm(x), expected)  # with gradients
    with torch.no_grad():
        assert torch.allclose(norm(x), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(norm(torch.zeros(1, 96)), torch.zeros(1, 96))
