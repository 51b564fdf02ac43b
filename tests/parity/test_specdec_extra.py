"""Chains, Jacobi windows, typical acceptance and ZipAR against their references."""

import torch

from vistok.decoding.accept import typical_paths, walk_chain
from vistok.decoding.zipar import zipar_passes

FAMILY = "specdec_extra"


def _outputs(golden, group: str, results: dict[str, torch.Tensor], inputs: set[str]) -> None:
    io = {name.split("/", 1)[1]: tensor for name, tensor in golden.io.items() if name.startswith(f"{group}/")}
    assert set(io) == {f"out.{name}" for name in results} | {f"in.{name}" for name in inputs}, f"{group}: a tensor is not understood"
    tolerance = golden.spec["groups"][group].get("tol", 0)
    for name, result in results.items():
        torch.testing.assert_close(result.to(io[f"out.{name}"].dtype), io[f"out.{name}"], rtol=0, atol=tolerance)


def _standard(golden, group: str) -> None:
    io = {name: golden.io[f"{group}/in.{name}"] for name in ("draft_logits", "target_logits", "uniforms", "draft_tokens")}
    decisions = [
        walk_chain(target.softmax(-1), tokens, draft.softmax(-1), uniforms.tolist())
        for target, draft, tokens, uniforms in zip(io["target_logits"], io["draft_logits"], io["draft_tokens"], io["uniforms"])
    ]
    results = {"accepted": torch.tensor([d.accepted for d in decisions]), "next_dist": torch.stack([d.law for d in decisions])}
    _outputs(golden, group, results, set(io))


def _jacobi(golden, group: str) -> None:
    io = {name: golden.io[f"{group}/in.{name}"] for name in ("window_tokens", "window_q", "target_p", "uniforms")}
    matched, residuals = [], []
    for tokens, q, p, uniforms in zip(io["window_tokens"], io["window_q"], io["target_p"], io["uniforms"]):
        drafts = tokens[1:]
        own = uniforms[1:].gather(1, drafts[:, None].long())[:, 0]
        decision = walk_chain(p, drafts, q[1:], own.tolist())
        matched.append(decision.accepted + 1)
        residuals.append(decision.law if decision.accepted < len(drafts) else torch.zeros_like(decision.law))
    _outputs(golden, group, {"matched": torch.tensor(matched), "residual": torch.stack(residuals)}, set(io))


def _typical(golden, group: str) -> None:
    options = golden.spec["groups"][group]
    bests = [
        typical_paths(
            logits,
            tokens,
            temperature=options["temperature"],
            threshold=options["posterior_threshold"],
            alpha=options["posterior_alpha"],
        )
        for logits, tokens in zip(golden.io[f"{group}/in.logits"], golden.io[f"{group}/in.candidates"])
    ]
    best, accepted = torch.tensor(bests).T
    _outputs(golden, group, {"best": best, "accepted": accepted}, {"logits", "candidates"})


def _zipar(golden, group: str) -> None:
    options, table = golden.spec["groups"][group], golden.io[f"{group}/in.table"]
    width, height, prompt = options["width"], options["height"], options["prompt_len"]
    tokens = golden.io[f"{group}/in.first_row"].flatten().tolist() + [-1] * (width * (height - 1))
    fed, positions = [], []
    for feeds in zipar_passes(width, height, options["window"]):
        fed.append([tokens[feed.source] for feed in feeds])
        positions.append([prompt + feed.slot for feed in feeds])
        for feed, token in zip(feeds, fed[-1]):
            if feed.target is not None:
                tokens[feed.target] = int(table[token, prompt + feed.slot].argmax())
    most = max(map(len, fed))
    fed, positions = (torch.tensor([row + [-1] * (most - len(row)) for row in rows]) for rows in (fed, positions))
    results = {"tokens": torch.tensor(tokens), "step_input_tokens": fed, "step_positions": positions}
    _outputs(golden, group, results, {"first_row", "table"})
    assert len(fed) == options["forwards_after_first_row"]
    assert len(fed) + width == options["total_forwards"]


CHECKS = {"std": _standard, "sjd": _jacobi, "medusa": _typical, "zipar": _zipar}


def test_every_group_of_the_case(golden):
    groups = {name.split("/")[0] for name in golden.io}
    assert groups == set(golden.spec["groups"])
    assert set(golden.spec["tensors"]) == set(golden.io)
    for group in sorted(groups):
        kind = group.rstrip("0123456789")
        assert kind in CHECKS, f"group {group} is not understood by this test"
        CHECKS[kind](golden, group)
