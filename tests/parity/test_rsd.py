"""Recursive rejection, stochastic beams and K-SEQ against their references."""

import pytest
import torch

from vistok.decoding.accept import Position, decide, k_seq, k_seq_constants, verify, walk_tree
from vistok.decoding.drafting import beam_step, draw_without_replacement, perturb, stochastic_beam_tree

FAMILY = "rsd"
GROUPS = {"gumbel_topk", "rrs_wo", "rrs_w", "sbs", "rsd_s", "kseq"}


def _inputs(golden, group: str) -> dict[str, torch.Tensor]:
    return {name.rsplit("/", 1)[1]: tensor for name, tensor in golden.io.items() if name.startswith(f"{group}/")}


def _check(golden, group: str, results: dict[str, torch.Tensor]) -> None:
    """Every output of the group, floats to the group's tolerance."""
    expected = {name: tensor for name, tensor in _inputs(golden, group).items() if not name.startswith("in.")}
    assert set(expected) == {f"out.{name}" for name in results}, f"{group} holds tensors that this test does not understand"
    tolerance = golden.spec["groups"][group.split("/")[0]].get("tol", 1e-9)  # ids are compared as integers
    for name, result in results.items():
        torch.testing.assert_close(result.to(expected[f"out.{name}"].dtype), expected[f"out.{name}"], rtol=0, atol=tolerance)


def _skip_if_absent(golden, group: str) -> None:
    if not any(name.startswith(f"{group}/") for name in golden.io):
        pytest.skip(f"this case has no group {group}")


def test_every_group_is_checked(golden):
    assert {name.split("/")[0] for name in golden.io} == set(golden.spec["groups"])
    assert set(golden.spec["groups"]) <= GROUPS
    assert set(golden.spec["tensors"]) == set(golden.io)


def test_gumbel_top_k(golden):
    _skip_if_absent(golden, "gumbel_topk")
    io, group = _inputs(golden, "gumbel_topk"), golden.spec["groups"]["gumbel_topk"]
    log_probs = (io["in.logits"] / group["temperature"]).log_softmax(-1)
    _check(golden, "gumbel_topk", {"tokens": draw_without_replacement(log_probs, io["in.uniforms"], group["k"])})


@pytest.mark.parametrize(("group", "drawn"), [("rrs_wo", "without_replacement"), ("rrs_w", "with_replacement")])
def test_recursive_rejection(golden, group, drawn):
    _skip_if_absent(golden, group)
    io, decisions = _inputs(golden, group), []
    for p, q, candidates, uniforms in zip(io["in.target"], io["in.draft"], io["in.candidates"], io["in.uniforms"].tolist()):
        decisions.append(decide(verify(Position(p, candidates, q, drawn)), iter(uniforms)))
    accepted = torch.tensor([decision.accepted for decision in decisions])
    _check(golden, group, {"accepted": accepted, "residual": torch.stack([decision.law for decision in decisions])})


def test_one_level_of_stochastic_beams(golden):
    _skip_if_absent(golden, "sbs")
    io = _inputs(golden, "sbs")
    beams = beam_step(io["in.logp"], io["in.phi"], io["in.psi"], io["in.uniforms"], golden.spec["groups"]["sbs"]["W"])
    perturbed = perturb(io["in.phi"][:, None] + io["in.logp"], io["in.psi"], io["in.uniforms"])
    results = {"beam_parent": beams.parents, "beam_token": beams.tokens, "beam_phi": beams.phi, "beam_psi": beams.psi}
    _check(golden, "sbs", results | {"perturbed": perturbed})


def test_stochastic_beam_trees_end_to_end(golden):
    _skip_if_absent(golden, "rsd_s")
    io, group = _inputs(golden, "rsd_s"), golden.spec["groups"]["rsd_s"]
    log_q, p = io["in.draft_logp"], io["in.target_prob"]
    expected_roots, results = io["out.tokens"][:, 0].tolist(), {"tokens": [], "parents": [], "path": [], "next_dist": []}
    for root, uniforms, coins in zip(expected_roots, io["in.gumbel_uniforms"], io["in.verify_uniforms"].tolist()):
        tree = stochastic_beam_tree(lambda paths: log_q[paths[:, -1]], root, uniforms)

        def rule(law, nodes, parent, tokens=tree.tokens):
            q = log_q[tokens[parent]].exp()
            return verify(Position(law, torch.tensor([tokens[node] for node in nodes], dtype=torch.int64), q, "without_replacement"))

        decision = walk_tree(tree.parents, tree.tokens, lambda node, tokens=tree.tokens: p[tokens[node]], rule, coins)
        results["tokens"].append(tree.tokens)
        results["parents"].append(tree.parents)
        results["path"].append(decision.path + [-1] * (group["levels"] + 1 - len(decision.path)))
        results["next_dist"].append(decision.law)
    next_dist = torch.stack(results.pop("next_dist"))
    _check(golden, "rsd_s", {name: torch.tensor(rows) for name, rows in results.items()} | {"next_dist": next_dist})


def test_k_seq(golden):
    _skip_if_absent(golden, "kseq")
    for index, k in enumerate(golden.spec["groups"]["kseq"]["k"]):
        io = _inputs(golden, f"kseq/{index}")
        p, q = io["in.target"], io["in.draft"]
        constants = k_seq_constants(p, q, k)
        drafts = torch.arange(len(p))[:, None].expand(-1, k)
        at = Position(p.expand(len(p), -1), drafts, q.expand(len(p), -1), "with_replacement")
        ratios = next(iter(k_seq(at))).ratio
        results = {
            "accept_per_token": ratios.to(p.dtype).clamp(max=1),
            "residual": constants.residual,
            "scalars": torch.stack(constants[:3]).to(p.dtype),
        }
        _check(golden, f"kseq/{index}", results)
    names = {name.split("/")[1] for name in golden.io if name.startswith("kseq/")}
    assert names == {str(index) for index in range(len(golden.spec["groups"]["kseq"]["k"]))}
