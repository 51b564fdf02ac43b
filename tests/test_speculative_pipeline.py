"""Speculative decoding as a user meets it: the pipeline's and the command's arguments."""

import json

import pytest
import torch

import vistok
from vistok.cli import main
from vistok.decoding import SpeculationStats
from vistok.decoding.drafters import make_drafter
from vistok.pipelines import TokenImagePipeline


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = vistok.create("fsq2d-tiny", image_size=(32, 32)).eval()
        shape = dict(codebook_size=tokenizer.codebook_size, layout_shape=tokenizer.layout.shape)
        generator = vistok.create("gpt-tiny", num_classes=3, classes=("Cats", "Dogs", "Flowers"), **shape).eval()
    pipe = TokenImagePipeline(generator, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_drafter_by_name_changes_the_passes_and_not_the_images(pipe):
    plain = pipe(labels=["Cats", "Dogs"], num_images=2, seed=0, output_type="pt")
    drafted = pipe(labels=["Cats", "Dogs"], num_images=2, seed=0, output_type="pt", drafter="recycling", batch_size=3)
    assert torch.equal(plain.tokens.ids, drafted.tokens.ids) and torch.allclose(plain.images, drafted.images, atol=1e-5)
    assert isinstance(drafted.stats, SpeculationStats) and drafted.stats.num_images == 4
    assert drafted.stats.total_variation_spent == 0


def test_the_images_of_a_drawn_draft_depend_on_seed_and_options_alone(pipe):
    call = dict(labels=["Cats"], num_images=3, seed=3, drafter="jacobi")
    assert torch.equal(pipe(**call).tokens.ids, pipe(**call, batch_size=2).tokens.ids)


def test_eps_alone_is_the_budget_rule_and_its_loss_is_counted(pipe):
    stats = pipe(labels=["Cats"], seed=0, drafter="jacobi", eps=0.3).stats
    assert stats.rule.startswith("lantern_budget")
    assert 0 < stats.total_variation_spent <= 0.3 * stats.num_tokens + 1e-4
    assert "total variation spent" in stats.summary()


def test_rows_overlap_on_request(pipe):
    out = pipe(labels=["Cats"], num_images=2, seed=0, row_window=1)
    assert out.stats.target_passes == 2 * 4 + 2 * 1 and len(out.images) == 2
    assert torch.equal(out.tokens.ids[1:], pipe(labels=["Cats"], num_images=2, seed=0, row_window=1, batch_size=1).tokens.ids[1:])


def test_rows_adapt_and_layers_are_skipped_on_request(pipe):
    call = dict(labels=["Cats"], num_images=2, seed=0)
    plain, whole = pipe(**call), pipe(**call, row_window=4, row_window_adapts=True)
    assert torch.equal(whole.tokens.ids, plain.tokens.ids)
    assert 2 * 4 + 2 * 1 < pipe(**call, row_window=1, row_window_adapts=True).stats.target_passes <= 16
    depth = len(pipe.generator.blocks)
    assert torch.equal(pipe(**call, exits=depth - 1).tokens.ids, plain.tokens.ids)
    assert pipe(**call, exits=0).tokens.ids.shape == plain.tokens.ids.shape


def test_typical_sampling_composes_with_drafts_that_are_not_drawn(pipe):
    call = dict(labels=["Cats"], seed=0, typical_p=0.4, top_k=100)
    assert torch.equal(pipe(**call).tokens.ids, pipe(**call, drafter="copy").tokens.ids)
    assert not torch.equal(pipe(**call).tokens.ids, pipe(labels=["Cats"], seed=0, top_k=100).tokens.ids)


def test_drafters_and_models_are_taken_as_they_are(pipe, tmp_path):
    drafter = make_drafter("jacobi", pipe.generator, length=2)
    assert pipe(labels=["Cats"], seed=0, drafter=drafter, num_draft_tokens=1).stats.target_passes <= 16
    pipe.generator.save_pretrained(tmp_path / "small")
    for small in (pipe.generator, str(tmp_path / "small")):
        assert pipe(labels=["Cats"], seed=0, drafter=small).stats.accepted_per_step > 3


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(drafter="jacoby"), "did you mean 'jacobi'"),
        (dict(drafter="jacobi", rule="standrd"), "did you mean 'standard'"),
        (dict(rule="standard"), "give a drafter too"),
        (dict(drafter="jacobi", rule="standard", eps=0.1), "has no eps"),
        (dict(drafter="jacobi", num_draft_tokens=99), "num_draft_tokens=99"),
        (dict(drafter="jacobi", num_draft_tokens="most"), "num_draft_tokens='most'"),
        (dict(drafter="jacobi", row_window=2), "without a drafter"),
        (dict(row_window=5), "window=5 but a row has 1 to 4"),
        (dict(row_window_adapts=True), "needs a row_window"),
        (dict(exits=99), "do not fit"),
        (dict(exits=1, drafter="jacobi"), "without a drafter"),
        (dict(exits=1, row_window=2), "or exits"),
        (dict(typical_p=0.0), "typical_p must be in"),
        (dict(drafter=vistok.create("fsq2d-tiny")), "FSQ2D cannot draft"),
    ],
)
def test_wrong_drafting_says_what_is_right(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels=["Cats"], **call)


def test_the_command_drafts_and_writes_down_how(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipe")
    common = ["generate", "--model", str(tmp_path / "pipe"), "--labels", "Cats", "--num-images", "1", "--seed", "0", "--out", str(tmp_path)]
    drafting = ["--drafter", "jacobi", "--drafter-options", "length=2", "fill=left", "--num-draft-tokens", "2"]
    assert main([*common, *drafting]) == 0
    assert "tokens a pass" in capsys.readouterr().out
    record = json.loads((tmp_path / "generation.json").read_text())
    assert record["drafter"] == "jacobi" and record["drafter_options"] == ["length=2", "fill=left"]
    assert sum(record["stats"]["accepted"]) == record["stats"]["image_passes"]
    assert main([*common, "--drafter", "jacobi", "--drafter-options", "length=two"]) == 2
    assert "must be a whole number" in capsys.readouterr().err
    assert main([*common, "--drafter-options", "length=2"]) == 2
    for options in (["--row-window", "2", "--row-window-adapts"], ["--exits", "0"], ["--drafter", "copy", "--num-draft-tokens", "auto"]):
        assert main([*common, *options]) == 0
        record = json.loads((tmp_path / "generation.json").read_text())
        assert options[0][2:].replace("-", "_") in record
