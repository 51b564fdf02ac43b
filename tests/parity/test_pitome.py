"""PiToMe against the reference: energies, the two matching rules and the text variant, and whole vision transformers."""

import torch

import vistok
from vistok.pruning.methods.pitome import energy, gaussian_energy, pitome, pitome_count

from .test_tome import build_vit, one_hot

FAMILY = "pitome"
RULES = {"protect": "protect", "bsm_order": "order"}


def test_energies_matching_and_folding_match(golden):
    for case in golden.spec["matching"]:
        name, io, rule = case["name"], golden.io, RULES[case["kind"]]
        metric, x, size = io[f"{name}.metric"], io[f"{name}.x"], io[f"{name}.size"]
        prefix = int(case["class_token"])
        r = pitome_count(metric.shape[1] - prefix, case["ratio"])
        assert r == case["r"]
        plan = pitome(metric, r, margin=case["margin"], num_prefix=prefix, rule=rule, alpha=case["elu_alpha"])
        score = energy(metric[:, prefix:], case["margin"], case["elu_alpha"])
        order = score.argsort(dim=-1, descending=True, stable=True)
        if rule == "protect":
            indices = {"a_idx": order[:, 0 : 2 * r : 2], "b_idx": order[:, 1 : 2 * r : 2], "protected_idx": order[:, 2 * r :]}
            # dst_idx: position among the destinations, which come last in the output
            indices["dst_idx"] = plan.slot - (plan.num_kept - r)
        else:
            a, b = order[:, ::2], order[:, 1::2]
            rest = plan.keep[:, prefix : plan.num_kept - b.shape[1]] - prefix
            indices = {"a_idx": a, "b_idx": b, "unm_idx": position_in(rest, a), "src_idx": position_in(plan.source - prefix, a)}
            indices["dst_idx"] = plan.slot - (plan.num_kept - b.shape[1])
        results = {key: value.int() for key, value in indices.items()}
        results |= {"energy": score, "source": one_hot(plan), "merge_prune": plan.gather(x)}
        results |= {f"merge_{mode}": plan.reduce(x, mode) for mode in ("mean", "sum", "amax")}
        results["wavg_nosize"], results["wavg_nosize.size"] = plan.merge(x)
        results["wavg"], results["wavg.size"] = plan.merge(x, size)
        golden.check(
            name,
            {f"{name}.{key}": value for key, value in results.items()},
            inputs=tuple(f"{name}.{key}" for key in ("metric", "x", "size")),
        )


def position_in(index, among):
    """index: [B, n], each a member of among [B, m]. Returns its position there."""
    return (index[:, :, None] == among[:, None, :]).int().argmax(dim=-1)


def test_the_text_variant_matches(golden):
    for case in golden.spec["text"]:
        name = case["name"]
        metric, x = golden.io[f"{name}.metric"], golden.io[f"{name}.x"]
        prefix = int(case["class_token"])
        plan = pitome(metric, pitome_count(metric.shape[1] - prefix, case["ratio"]), margin=case["margin"], num_prefix=prefix, rule="text")
        results = {f"merge_{mode}": plan.reduce(x, mode) for mode in ("mean", "sum", "amax")}
        results["energy"] = gaussian_energy(metric[:, prefix:], case["margin"])
        golden.check(name, {f"{name}.{key}": value for key, value in results.items()}, inputs=(f"{name}.metric", f"{name}.x"))


def protected_prefixes(model, run):
    """Numbers of protected tokens that give the case's counts: the reference takes one off whatever the model has, a port may take all."""
    counts = [*run["tokens_in"], run["final_tokens"]]
    steps = list(zip(counts, counts[1:]))
    candidates = sorted({1, model.num_prefix_tokens}, reverse=True)
    return [p for p in candidates if all(n - m == pitome_count(n - p, run["ratio"]) for n, m in steps)]


def test_vision_transformers_match(golden):
    spec, images = golden.spec["vit"], golden.io["vit.x"]
    model = build_vit(golden)
    with torch.no_grad():
        results = {"vit.logits_base": model(images)}
        for run in spec["runs"]:
            name = f"vit.{run['name']}"
            prefixes = protected_prefixes(model, run)
            assert prefixes, f"{name}: no number of protected tokens makes {run['tokens_in']} and {run['final_tokens']}"
            for num_protected in prefixes:
                options = {
                    "layer_keep_ratio": run["ratio"],
                    "rule": ["order" if is_order else "protect" for is_order in run["use_bsm_per_layer"]],
                    "margin": spec["margins"],
                    "alpha": spec["elu_alpha"],
                    "is_proportional": run.get("prop_attn", spec["prop_attn"]),
                    "num_protected_prefix": num_protected,
                }
                with vistok.prune(model, "pitome", **options) as pruned:
                    results[f"{name}.logits"] = model(images)
                results[f"{name}.size"], results[f"{name}.source"] = pruned.size, one_hot(pruned.plan)
                assert list(pruned.stats().num_tokens) == [*run["tokens_in"], run["final_tokens"]]
                if torch.equal(results[f"{name}.source"], golden.io[f"{name}.source"]):
                    break
    golden.check("vit", results, inputs=("vit.x",))
    groups = {case["name"] for case in golden.spec["matching"] + golden.spec["text"]} | {"vit"}
    assert {name.split(".")[0] for name in golden.io} == groups
