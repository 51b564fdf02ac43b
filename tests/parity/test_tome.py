"""ToMe against the reference: matching, folding, schedules, and whole vision transformers."""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vistok
from vistok.pruning.methods.tome import kth_tome, tome, tome_schedule
from vistok.pruning.plan import ReductionPlan

FAMILY = "tome"


def one_hot(plan):
    """The reference's source matrix [B, M, N]."""
    return F.one_hot(plan.owner, plan.num_kept).transpose(1, 2).float()


def build_vit(golden):
    """The case's timm model; a distilled one has two prefix tokens and two heads."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    spec = golden.spec["vit"]
    model = (VisionTransformerDistilled if spec.get("distilled") else VisionTransformer)(**spec["cfg"]).eval()
    model.load_state_dict(load_file(golden.folder / "state.safetensors"))
    return model


def without_reordering(plan, case):
    """The reference undoes a distilled model's merge as if it had not moved the distillation token to the front: so did its output rows."""
    if not (case["class_token"] and case["distill_token"]):
        return plan
    num_unmerged = (plan.num_tokens + 1) // 2 - plan.num_merged - 1
    order = [0, *range(2, 2 + num_unmerged), 1, *range(2 + num_unmerged, plan.num_kept)]
    return ReductionPlan(plan.num_tokens, plan.keep[:, order], plan.source, plan.slot)


def test_matching_folding_and_restoring_match(golden):
    for case in golden.spec["matching"]:
        name, io = case["name"], golden.io
        metric, x, size = io[f"{name}.metric"], io[f"{name}.x"], io[f"{name}.size"]
        options = {"num_prefix": case["class_token"] + case["distill_token"], "sort_unmerged": case["class_token"]}
        plan = tome(metric, case["r_requested"], **options)
        assert plan.num_merged == case["r_effective"]
        mean = plan.reduce(x, "mean")
        half = golden.io[f"{name}.unm_idx"].shape[1]
        keep = without_reordering(plan, case).keep
        results = {
            "unm_idx": (keep[:, :half] // 2).int(),
            "src_idx": (plan.source // 2).int(),
            "dst_idx": (plan.keep.gather(1, plan.slot) // 2).int(),
            "merge_mean": mean,
            "merge_sum": plan.reduce(x, "sum"),
            "merge_amax": plan.reduce(x, "amax"),
            "source": one_hot(plan),
            "unmerge_of_mean": without_reordering(plan, case).restore(mean),
        }
        results["wavg_nosize"], results["wavg_nosize.size"] = plan.merge(x)
        results["wavg"], results["wavg.size"] = plan.merge(x, size)
        if case["has_step2"]:
            step = tome(plan.reduce(metric, "mean"), case["r_requested"], **options)
            results["step2"], results["step2.size"] = step.merge(results["wavg"], results["wavg.size"])
            results["step2.source"] = one_hot(plan.compose(step))
        golden.check(
            name,
            {f"{name}.{key}": value for key, value in results.items()},
            inputs=tuple(f"{name}.{key}" for key in ("metric", "x", "size")),
        )


def test_keeping_every_kth_token_matches(golden):
    if "kth" in golden.spec:
        plan = kth_tome(golden.io["kth.metric"], golden.spec["kth"])
        merged = plan.reduce(golden.io["kth.x"], "mean")
        golden.check("kth", {"kth.merge_mean": merged, "kth.unmerge": plan.restore(merged)}, inputs=("kth.metric", "kth.x"))


def test_schedules_match(golden):
    for case in golden.spec["schedules"]:
        r = case["r"]
        if isinstance(r, list) and len(r) == 2 and isinstance(r[1], float):
            r = tuple(r)
        assert list(tome_schedule(case["num_layers"], r)) == case["expect"]


def test_vision_transformers_match(golden):
    spec, images = golden.spec["vit"], golden.io["vit.x"]
    model = build_vit(golden)
    with torch.no_grad():
        results = {"vit.logits_base": model(images)}
        for run in spec["runs"]:
            name = f"vit.{run['name']}"
            r = tuple(run["r"]) if run["is_inflection"] else run["r"]
            sort = model.num_prefix_tokens > 0
            with vistok.prune(model, "tome", r=r, is_proportional=run["prop_attn"], sort_unmerged=sort) as pruned:
                results[f"{name}.logits"] = model(images)
            results[f"{name}.size"], results[f"{name}.source"] = pruned.size, one_hot(pruned.plan)
            counts = pruned.stats().num_tokens
            assert counts[-1] == run["final_tokens"]
            steps = [[before, before - after] for before, after in zip(counts, counts[1:]) if before > after]
            assert steps == [list(step) for step in run["tokens_in_and_r"] if step[1]]
    golden.check("vit", results, inputs=("vit.x",))
    assert {name.split(".")[0] for name in golden.io} == {"vit", "kth"} & {name.split(".")[0] for name in golden.io} | {
        case["name"] for case in golden.spec["matching"]
    }
