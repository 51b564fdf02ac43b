"""What `eval.claims.decoding` makes of its numbers."""

import json

import pytest
import torch

import vistok
from eval.claims.decoding import Config, main
from eval.claims.decoding_report import draw_curve, markdown, verdicts
from vistok.decoding.heads import ChimeraHeads, EagleHead, JudgeHead, MedusaHeads

ABOUT = dict(model="m", num_samples=8, repeats=3, guidance_scale=1.5, floor=1.0, pixel_floor=0.5, machine={"cpu": "a"}, command="c")


def row(family, tokens=1.0, frechet=1.0, speed=1.0, **more):
    always = dict(acceptance=[], spent_per_token=0.0, frechet_real=2.0, pixel_distance=0.1, options={}, seconds=1.0)
    passes = dict(passes_per_image=64 / tokens, tokens_per_pass=tokens)
    return {**always, **passes, "family": family, "frechet_plain": frechet, "speedup": speed, "speedups": [speed], **more}


def found(rows):
    return {verdict.claim: verdict.verdict for verdict in verdicts(rows, ABOUT)}


def test_verdicts_follow_from_the_numbers():
    rows = {
        "plain": row("plain"),
        "chosen by itself": row("exact", 1.3, 1.0, 0.97),
        "SJD": row("exact", 2.1, 1.05, 1.4),
        "SJD, LANTERN delta 0.2": row("lantern", 6.0, 1.09, 3.0, spent_per_token=None),
        "SJD, LANTERN++ lambda 2": row("lantern++", 6.0, 1.08, 3.0, spent_per_token=None),
        "SJD, budget 0.1": row("budget", 6.5, 1.08, 1.6, spent_per_token=0.08, options={"eps": 0.1}),
        "SJD, GSD window 7": row("gsd", 2.6, 1.02, 1.5, spent_per_token=None),
        "ZipAR window 2": row("zipar", 2.3, 1.02, 1.7, spent_per_token=None),
        "ZipAR window 2 or more": row("zipar", 2.0, 1.02, 1.4, spent_per_token=None, pixel_distance=0.05),
    }
    said = found(rows)
    assert len(said) == 11 and set(said.values()) == {"holds"}
    rows["SJD"]["frechet_plain"] = 1.2  # a tenth above the floor is noise, a fifth is not
    rows["SJD, budget 0.1"]["spent_per_token"] = 0.2
    rows["SJD, LANTERN++ lambda 2"]["frechet_plain"] = 31.0
    rows["chosen by itself"]["speedup"] = 0.9
    rows["ZipAR window 2 or more"]["pixel_distance"] = 0.2
    said = found(rows)
    assert [claim for claim, verdict in said.items() if verdict != "holds"] == [
        "exact rules do not change what is generated",
        "LANTERN++ is more faithful than LANTERN at the same tokens a pass or more",
        "rules with a budget spend at most eps of total variation a token",
        "ZipAR's adaptive window stays nearer to the plain loop's images than the fixed one",
        "left to itself, decoding is never more than 5 % slower than the plain loop",
    ]


def test_a_claim_without_its_settings_is_left_out(tmp_path):
    rows = {"plain": row("plain"), "copies": row("exact")}
    results = {"about": ABOUT, "rows": rows, "verdicts": [vars(verdict) for verdict in verdicts(rows, ABOUT)]}
    assert len(results["verdicts"]) == 1
    text = markdown(results)
    assert "| copies | 64.0 | 1.00 | 1.00 (1.00-1.00) | 0.000 |" in text and "exact rules do not change" in text
    draw_curve(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_whole_comparison_runs_on_a_pipeline(tmp_path):
    tokenizer = vistok.create("fsq2d-tiny", image_size=(32, 32)).eval()
    shape = dict(codebook_size=tokenizer.codebook_size, layout_shape=tokenizer.layout.shape)
    generator = vistok.create("gpt-tiny", num_classes=2, classes=("a", "b"), **shape).eval()
    vistok.TokenImagePipeline(generator, tokenizer).save_pretrained(tmp_path / "pipe")
    for name, head in (("eagle", EagleHead), ("medusa", MedusaHeads), ("chimera", ChimeraHeads), ("judge", JudgeHead)):
        head.for_target(generator).save_pretrained(tmp_path / name)
    heads = {name: str(tmp_path / name) for name in ("eagle", "medusa", "chimera", "judge")}
    main(Config(model=str(tmp_path / "pipe"), **heads, num_samples=4, repeats=1, out=tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows["plain"]["tokens_per_pass"] == 1 and rows["plain"]["pixel_distance"] == 0
    assert rows["EAGLE-2 tree"]["pixel_distance"] < 0.02  # drafts that are not drawn change nothing
    assert all(row["spent_per_token"] <= row["options"]["eps"] for row in rows.values() if row["family"] == "budget")
    assert torch.tensor([row["speedup"] for row in rows.values()]).isfinite().all()
