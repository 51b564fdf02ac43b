"""LANTERN's neighbour tables, trees, drafting, acceptance and loss against the reference implementation."""

import re

import torch

from vistok.decoding import SamplingConfig, warp
from vistok.decoding.accept import Position, accepts_greedily, neighbour_table, verify, walk_tree
from vistok.decoding.accept.lantern import aggregated, aggregation
from vistok.decoding.drafter_loss import drafter_loss
from vistok.decoding.drafting import best_nodes_tree
from vistok.decoding.trees import TreeTemplate, ancestor_mask, leaf_paths

FAMILY = "lantern"
DRAWS = 10  # tokens that every expanded node of a static tree draws, unless the case says another TOPK


def _io(golden, group: str) -> dict[str, torch.Tensor]:
    return {name[len(group) + 1 :]: tensor for name, tensor in golden.io.items() if name.startswith(f"{group}/")}


def _bound(delta: float) -> dict[str, float]:
    """The reference has one option: a probability up to 1, a multiple above."""
    return {"delta": delta, "multiple": None} if delta <= 1 else {"delta": None, "multiple": delta}


def _compare(golden, group: str, results: dict[str, torch.Tensor], tolerance: float | None = None) -> None:
    io = {name: tensor for name, tensor in _io(golden, group).items() if not name.startswith("in.")}
    assert set(io) == set(results), f"{group} holds tensors that this test does not understand: {set(io) ^ set(results)}"
    tolerance = golden.spec["groups"][group].get("tol", 1e-5) if tolerance is None else tolerance
    for name, result in results.items():
        expected = io[name]
        assert result.shape == expected.shape, f"{group}/{name} has shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
        if expected.is_floating_point():
            torch.testing.assert_close(result.to(expected.dtype), expected, rtol=0, atol=tolerance)
        else:
            assert torch.equal(result.to(expected.dtype), expected), f"{group}/{name}"


def _sampling(options: dict | None) -> SamplingConfig:
    options = options or {"temperature": 1.0, "top_k": 0, "top_p": 0.0}
    return SamplingConfig(temperature=options["temperature"], top_k=options["top_k"], top_p=options["top_p"] or 1.0)


def _neighbours(golden) -> torch.Tensor:
    return golden.io["nbr/out.neighbours"]


def _tables(golden, group):
    codebook = golden.io["nbr/in.codebook"]
    k = len(codebook) - 1
    tables = {metric: neighbour_table(codebook, k, metric=metric) for metric in ("euclidean", "cosine")}
    _compare(golden, group, {"out.neighbours": tables["euclidean"], "derived.neighbours_unit": tables["cosine"]})


def _guidance(golden, group):
    cond, uncond = golden.io[f"{group}/in.logits"].chunk(2)
    _compare(golden, group, {"out.logits": uncond + golden.spec["groups"][group]["scale"] * (cond - uncond)})


def _aggregation(golden, group):
    io, p, counts, ratios, residuals = _io(golden, group), golden.io[f"{group}/in.logits"].softmax(-1), [], [], []
    for token, k, delta in zip(io["in.token"].tolist(), io["in.k"].tolist(), io["in.delta"].tolist()):
        near, x = _neighbours(golden), torch.tensor([token])
        counts.append(int(aggregated(p, x[0], near[token, :k].long(), **_bound(delta)).sum()))
        first, last = aggregation(Position(p, x), neighbours=near, k=k, residual="reference", **_bound(delta))
        ratios.append(min(1.0, float(first.ratio)))
        residuals.append(last.law)
    results = {
        "out.num_neighbours": torch.tensor(counts),
        "out.accept_prob": torch.tensor(ratios),
        "out.residual_dynamic": torch.stack(residuals),
    }
    _compare(golden, group, results)


def _walk(golden, group, parents, tokens, paths, rule):
    io, options = _io(golden, group), golden.spec["groups"][group]
    laws = warp(io["in.node_logits"], _sampling(options["warp"])).softmax(-1)
    results = {name: [] for name in ("out.accepted", "out.best_path", "out.uniforms_used")}
    next_dist = []
    for uniforms in io["in.uniforms"].tolist():
        decision = walk_tree(parents, tokens, lambda node: laws[node], rule, uniforms)
        results["out.accepted"].append(len(decision.path) - 1)
        results["out.best_path"].append(int((paths == decision.path[-1]).any(1).int().argmax()))
        results["out.uniforms_used"].append(decision.num_uniforms)
        next_dist.append(decision.law)
    return {name: torch.tensor(values) for name, values in results.items()} | {"out.next_dist": torch.stack(next_dist)}


def _dynamic(golden, group):
    io, options = _io(golden, group), golden.spec["groups"][group]
    tokens = io["in.node_tokens"].tolist()

    def rule(p, nodes, parent):
        at = Position(p, torch.tensor([tokens[node] for node in nodes], dtype=torch.int64))
        if options["lantern"] is None:
            return verify(at)
        k, bound = options["lantern"]["k"], _bound(options["lantern"]["delta"])
        return aggregation(at, neighbours=_neighbours(golden), k=k, residual="reference", **bound)

    _compare(golden, group, _walk(golden, group, io["in.node_parents"].tolist(), tokens, io["in.retrieve_indices"], rule))


def _template(golden, group):
    template = TreeTemplate.from_choices(golden.spec["groups"][group]["choices"])
    said = re.search(r"TOPK=(\d+)", golden.spec["groups"][group].get("what", ""))
    paths, rows = template.paths, torch.tensor(template.level_rows)
    results = {
        "out.attn_mask": template.mask,
        "out.position_ids": template.depths,
        "out.retrieve_indices": paths,
        "out.tree_indices": template.token_slots(int(said[1]) if said else DRAWS),
        "out.parent_row": rows[paths],  # where the path has ended, the reference's entry is the last node's
    }
    _compare(golden, group, results)
    siblings = [[template.earlier_siblings(node) if node >= 0 else [] for node in path] for path in paths.tolist()]
    assert siblings == golden.spec["groups"][group]["earlier_siblings"]


def _static(golden, group):
    io, options = _io(golden, group), golden.spec["groups"][group]
    template = TreeTemplate.from_choices(options["choices"])
    slots, paths = template.token_slots(io["in.draft_tokens"].shape[1]), template.paths
    tokens = torch.cat([io["in.root_token"], io["in.draft_tokens"].flatten()])[slots]
    chances = torch.cat([torch.ones(1), io["in.draft_cond_prob"].flatten()])[slots]
    depths, listed = template.depths.tolist(), tokens.tolist()

    def rule(p, nodes, parent):
        candidates = torch.tensor([listed[node] for node in nodes], dtype=torch.int64)
        if not nodes:
            return verify(Position(p, candidates))
        q = io[f"in.draft_dist.{depths[parent]}"][template.level_rows[nodes[0]]]
        at = Position(p, candidates, q, "without_replacement")
        if options["lantern"] is None:
            return verify(at)
        k, bound = options["lantern"]["k"], _bound(options["lantern"]["delta"])
        return aggregation(at, neighbours=_neighbours(golden), k=k, residual="reference", chances=chances[nodes], **bound)

    results = _walk(golden, group, template.parents, listed, paths, rule)
    is_node = paths >= 0
    results["mid.candidates"] = torch.where(is_node, tokens[paths.clamp(min=0)], -1)
    results["mid.candidate_q"] = torch.where(is_node, chances[paths.clamp(min=0)], 1.0)
    _compare(golden, group, results)


def _greedy(golden, group):
    options, accepted, best = golden.spec["groups"][group], [], []
    for trial in range(options["trials"]):
        io = {name.split("/")[1]: tensor for name, tensor in _io(golden, group).items() if name.startswith(f"{trial:02d}/")}
        tokens, paths = io["in.node_tokens"].tolist(), io["in.retrieve_indices"]
        table = _neighbours(golden) if options["lantern"] else None
        bound = {"k": options["lantern"]["k"], **_bound(options["lantern"]["delta"])} if options["lantern"] else {}
        lengths = []
        for path in ([node for node in row if node >= 0] for row in paths.tolist()):
            keeps = [accepts_greedily(io["in.node_logits"][a], tokens[b], table, **bound) for a, b in zip(path[:-1], path[1:])]
            lengths.append((keeps + [False]).index(False))
        accepted.append(max(lengths))
        best.append(lengths.index(max(lengths)))
        assert set(io) == {"in.node_tokens", "in.node_logits", "in.node_parents", "in.retrieve_indices"}
        assert torch.equal(leaf_paths(io["in.node_parents"].tolist()).int(), paths)
    outputs = {name: tensor for name, tensor in _io(golden, group).items() if name.startswith("out.")}
    assert set(outputs) == {"out.accepted", "out.best_path"}
    assert outputs["out.accepted"].tolist() == accepted and outputs["out.best_path"].tolist() == best, group


def _eagle2(golden, group):
    io, options = _io(golden, group), golden.spec["groups"][group]
    guided = io["in.uncond_logits"] + options["cfg"] * (io["in.cond_logits"] - io["in.uncond_logits"])
    log_probs = warp(guided, _sampling(options["warp"])).log_softmax(-1)
    sizes = {"num_nodes": options["total_token"], "rounds": options["depth"], "top_k": options["top_k"]}
    for index, root in enumerate(io["in.root"].tolist()):
        tree = best_nodes_tree(lambda paths: log_probs[paths[:, -1]], root, **sizes)
        mask = ancestor_mask(tree.parents)
        results = {
            "out.draft_tokens": torch.tensor(tree.tokens),
            "out.position_ids": mask.sum(1) - 1,
            "out.retrieve_indices": leaf_paths(tree.parents, is_sorted=options["warp"] is not None),
            "out.tree_mask": mask,
        }
        expected = {name[3:]: tensor for name, tensor in io.items() if name.startswith(f"{index:02d}/")}
        assert set(expected) == set(results)
        for name, result in results.items():
            assert torch.equal(result.to(expected[name].dtype), expected[name]), f"{group}/{index:02d}/{name}"
    assert {name.split("/")[0] for name in io if "/" in name} == {f"{index:02d}" for index in range(len(io["in.root"]))}


def _loss(golden, group):
    io, options = _io(golden, group), golden.spec["groups"][group]
    scale = options["cfg_scale"] + 1 if options["cfg_loss"] else None  # the reference combines c + s (c - u)
    out = drafter_loss(io["in.pred"], io["in.target"], io["in.head"], io["in.mask"], ce_weight=options["p_w"], guidance_scale=scale)
    results = {"out.loss": out.loss[None], "out.correct_total": torch.tensor([out.num_correct, out.num_positions])}
    _compare(golden, group, results)


CHECKS = {
    "nbr": _tables, "cfg": _guidance, "agg": _aggregation, "dyn": _dynamic, "treebuf": _template, "sta": _static, "gre": _greedy,
    "eagle2": _eagle2, "loss": _loss,
}  # fmt: skip


def pytest_generate_tests(metafunc):
    """One test a kind of group; the fixture `golden` is parametrized by conftest."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", CHECKS)


def test_every_group_of_the_kind(golden, kind):
    groups = {group for group in golden.spec["groups"] if _kind(group) == kind}
    for group in sorted(groups):
        CHECKS[kind](golden, group)


def test_every_tensor_belongs_to_a_group_that_is_checked(golden):
    groups = {name.split("/")[0] for name in golden.io}
    assert groups == set(golden.spec["groups"])
    assert {_kind(group) for group in groups} <= set(CHECKS)
    assert set(golden.spec["tensors"]) == set(golden.io)


def _kind(group: str) -> str:
    return "treebuf" if group.startswith("treebuf_") else re.sub(r"_?\d+$", "", group)
