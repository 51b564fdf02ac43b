"""The benchmark of decoding runs, counts its steps and takes other implementations."""

import json

import pytest
import torch

from eval.bench.generators import SIZES as SHAPES
from eval.bench.generators import BenchConfig, build, logit_errors, main, step_bytes
from vistok.layers import native
from vistok.layers.packed import to_int8


def peer(shape):
    """Another implementation: it decodes nothing, but in the right number of steps."""

    def generate(num_tokens, guidance_scale, on_step):
        for _ in range(num_tokens):
            torch.zeros(shape.width).sum()
            on_step()

    return generate


@pytest.mark.slow
def test_it_times_ours_against_transformers_and_a_peer_in_one_run(tmp_path, capsys):
    pytest.importorskip("transformers")
    main(BenchConfig(size="small", num_tokens=18, rounds=1, peer=f"{__name__}:peer", out=tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours = ["vistok, plain", "vistok", "vistok, no compiler", "vistok, int8"]
    assert [row["name"] for row in figures["rows"]] == ["transformers", "peer", *(ours if native.is_available() else ours[:2] + ours[3:])]
    assert figures["errors"][0]["largest"] < 1e-4 and figures["errors"][0]["same_best_id"] == 1
    assert "transformers" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="module:function"):
        main(BenchConfig(size="small", num_tokens=2, rounds=1, no_transformers=True, peer="nothing"))


@torch.no_grad()
def test_bytes_and_errors_are_those_of_the_model():
    model = build(SHAPES["small"])
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "table" not in name and "embedding" not in name)
    assert step_bytes(model, 2, 64) == 4 * weights + 2 * 6 * 2 * 320 * 4 * 32
    assert logit_errors("itself", model, model, 4)["largest"] < 1e-4
    error = logit_errors("int8", model, to_int8(build(SHAPES["small"])), 4)
    assert 0 < error["rms"] < 0.1 * error["deviation"]
