"""Locally typical sampling against the reference warper."""

import torch

from vistok.decoding.typical import is_typical

FAMILY = "typical"


def test_every_law_of_the_case_keeps_the_reference_ids(golden):
    assert set(golden.spec["tensors"]) == set(golden.io)
    assert {name.split("/")[0] for name in golden.io} == set(golden.spec["groups"])
    for name, expected in golden.io.items():
        group, tensor = name.split("/")
        if tensor == "in.logits":
            continue
        out, index = tensor.rsplit(".", 1)
        assert out == "out", f"{name} is not understood by this test"
        params, logits = golden.spec["params"][int(index)], golden.io[f"{group}/in.logits"]
        keeps = is_typical(logits, mass=params["mass"], min_tokens=params["min_tokens_to_keep"])
        assert torch.equal(logits.masked_fill(~keeps, float(params["filter_value"])), expected), name
        counts = golden.spec["groups"][group][f"kept.{index}"]
        if counts is not None:
            assert expected.isfinite().sum(1).tolist() == counts, name
