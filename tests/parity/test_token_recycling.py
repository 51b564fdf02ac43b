"""Token Recycling against its reference: the tree, one step from a random table, and a whole greedy run."""

import torch

from vistok.decoding.recycling import longest_match, recycled_tree, updated_successors
from vistok.decoding.trees import TreeTemplate, leaf_paths

FAMILY = "token_recycling"


def _groups(golden) -> dict[str, dict]:
    groups: dict[str, dict] = {}
    for name, tensor in golden.io.items():
        group, key = name.rsplit("/", 1)
        groups.setdefault(group, {})[key] = tensor
    return groups


def _same(groups, group: str, results: dict, inputs: set[str]) -> None:
    assert set(groups[group]) == set(results) | inputs, f"{group} holds tensors that this test does not understand"
    for key, result in results.items():
        expected = groups[group][key]
        assert result.shape == expected.shape and torch.equal(result.to(expected.dtype), expected), f"{group}/{key}"


def test_template_buffers(golden):
    template, groups = TreeTemplate.from_choices(golden.spec["template"]), _groups(golden)
    if "buf" not in groups:
        return
    results = {
        "out.attn_mask": template.mask,
        "out.child_rank": torch.tensor(template.ranks),
        "out.level_split": template.level_bounds,
        "out.parent": torch.tensor(template.parents),
        "out.position_ids": template.depths,
        "out.search_path": leaf_paths(template.parents, is_sorted=False),
    }
    _same(groups, "buf", results, set())


def test_one_step(golden):
    template, groups = TreeTemplate.from_choices(golden.spec["template"]), _groups(golden)
    assert set(groups) <= {"buf", "run"} | {group for group in groups if group.startswith("one/")}
    for group in (group for group in groups if group.startswith("one/")):
        io = groups[group]
        draft = recycled_tree(io["in.adj"], int(io["in.root"]), template)
        results = {"out.draft": draft, "out.adj": updated_successors(io["in.adj"], draft, io["in.logits"])}
        _same(groups, group, results, {"in.adj", "in.logits", "in.root"})


def test_a_greedy_run(golden):
    spec, groups = golden.spec, _groups(golden)
    if "run" not in groups:
        return
    table, prompt = groups["run"]["in.table"], groups["run"]["in.prompt"].tolist()
    template = TreeTemplate.from_choices(spec["template"])
    paths = leaf_paths(template.parents, is_sorted=False)
    lineage = [row.nonzero().flatten().tolist() for row in template.mask]

    def next_logits(context: list[int]) -> torch.Tensor:
        recent = list(enumerate(context))[-2:]
        weights = (7, 3)[-len(recent) :]
        return table[sum(token * weight + position % 2 for (position, token), weight in zip(recent, weights)) % len(table)]

    successors = torch.zeros(spec["vocab"], spec["topk"], dtype=torch.int32)
    sequence, root = prompt[:-1], prompt[-1]
    accepted, before, drafts = [], [], []
    while True:
        before.append(successors)
        tokens = recycled_tree(successors, root, template)
        drafts.append(tokens)
        logits = torch.stack([next_logits(sequence + tokens[nodes].tolist()) for nodes in lineage])
        path, length = longest_match(paths, tokens, logits.argmax(-1))
        nodes = paths[path, :length]
        sequence += tokens[nodes].tolist()
        accepted.append(length)
        if len(sequence) - len(prompt) >= spec["max_new_tokens"] or spec["eos"] in tokens[nodes].tolist():
            break
        successors, root = updated_successors(successors, tokens, logits), int(logits[nodes[-1]].argmax())
    results = {
        "out.accepted": torch.tensor(accepted),
        "out.adj_before_step": torch.stack(before),
        "out.adj_final": successors,
        "out.draft_tokens": torch.stack(drafts),
        "out.kv_tokens": torch.tensor(sequence),
        "out.sequence": torch.tensor(sequence),
    }
    _same(groups, "run", results, {"in.prompt", "in.table"})
    assert len(accepted) == spec["steps"]
