"""Every method for vision-language models against the tensors of its reference function."""

import torch

from vistok.pruning.methods.act import act
from vistok.pruning.methods.diversity import cdpruner, divprune, text_relevance
from vistok.pruning.methods.sparsevlm import sparsevlm_recycle, sparsevlm_score, text_raters
from vistok.pruning.methods.topk import mask_of, top_indices
from vistok.pruning.methods.vision_attention import flowcut_count, hiprune, prumerge, visionzip, vscan_mask, vscan_merge

FAMILY = "vlm_pruning"


def run_cdpruner(io, options):
    chosen = cdpruner(io["feat"], text_relevance(io["img"], io["txt"]), options["keep"])
    return {"mask": mask_of(chosen, io["feat"].shape[1])}


def run_divprune(io, options):
    return {"idx": divprune(io["feat"][None], options["keep"])[0]}


def run_flowcut_count(io, options):
    counts = flowcut_count(io["cls"], options["layers_left"], options["target"])
    expected = options["expected"]
    assert counts == (expected if isinstance(expected, list) else [expected])
    return {}


def run_hiprune(io, options):
    mask = hiprune(io["mid"][None], io["deep"][None], options["keep"], alpha=options.get("alpha", 0.1), grid_width=options.get("grid"))
    return {"mask": mask[0]}


def run_prumerge(io, options):
    return {"out": prumerge(io["feat"], io["q"], io["k"], is_plus=options.get("plus", False))}


def run_prumerge_plus(io, options):
    return {"out": prumerge(io["feat"], io["q"], io["k"], is_plus=options.get("plus", True))}


def run_sparsevlm_score(io, options):
    score = sparsevlm_score(
        io["logits"], text_raters(io["vis"], io["txt"]), visual_start=options["visual_start"], visual_end=options["visual_end"]
    )
    return {"score": score, "mask": mask_of(top_indices(score, options["keep"]), score.shape[1])}


def run_sparsevlm_recycle(io, options):
    return {"out": sparsevlm_recycle(io["x"], options["num_clusters"])}


def run_visionzip(io, options):
    indices, tokens = visionzip(io["hidden"], io["cls"], io["key"], dominant=options["dominant"], contextual=options["contextual"])
    return {"idx": indices, "out": tokens}


def run_vscan_mask(io, options):
    mask = vscan_mask(
        io["shallow"][None], io["deep"][None], options["keep"], window=options.get("window", 6), grid_width=options.get("grid")
    )
    return {"mask": mask[0]}


def run_vscan_merge(io, options):
    return {"out": vscan_merge(io["feat"], io["mask"].view(1, -1))}


def run_act(io, options):
    return {"out": act(io["A"], beta=options["beta"], threshold=options["threshold"], heads=options["heads"])}


METHODS = {name.removeprefix("run_"): function for name, function in globals().items() if name.startswith("run_")}
INPUTS = {"vscan_merge": {"mask"}}


def test_a_method_gives_what_its_reference_function_gives(golden):
    method = golden.spec["method"]
    assert method in METHODS, f"{golden.folder}: method {method} is not understood by this test"
    results = METHODS[method](golden.io, golden.spec["options"])
    outputs = {"out", "idx", "mask", "score"} - INPUTS.get(method, set())
    assert set(results) == outputs & set(golden.io), f"{golden.folder} is not understood by this test"
    for name, result in results.items():
        expected = golden.io[name]
        if name == "idx":  # in the order of choice or in raster order: a set
            result, expected = result.sort(dim=-1).values, expected.sort(dim=-1).values
        golden.compare(name, result.to(expected.dtype), expected.view(result.shape) if expected.dtype == torch.bool else expected)
