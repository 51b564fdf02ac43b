"""Training drafting heads and judges: every recipe, a frozen target, a head that learns, figures that mean what they say."""

import json

import pytest
import torch

import vistok
from vistok import rng
from vistok.data import TokenFolder
from vistok.decoding.accept import make_rule
from vistok.decoding.drafters import make_drafter
from vistok.decoding.heads import EagleHead, JudgeHead, MedusaHeads
from vistok.decoding.speculative import speculate
from vistok.training.recipes import RECIPES, train_generator, train_tokenizer
from vistok.training.recipes.drafter import train_drafter
from vistok.training.tasks.drafter import DrafterTask, DrafterTaskConfig
from vistok.training.tasks.generator import read_batch
from vistok.training.tasks.judge import JudgeTask

QUICK = {"max_steps": 2, "save_every": 2, "preview_every": 2, "progress": False}
TINY = [name for name, recipe in RECIPES.items() if name.endswith("-tiny") and recipe().kind == "drafter"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A run folder of a tiny generator, and the tokens it was trained on."""
    home = tmp_path_factory.mktemp("pipeline")
    tokenizer = train_tokenizer("fsq2d-tiny", out=home / "tokenizer", **QUICK)
    return train_generator("gpt-tiny", out=home / "gpt", tokenizer=str(tokenizer), **QUICK), home / "gpt-tokens" / "train"


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_recipe_trains_a_head_that_serves_its_target(pipeline, tmp_path, name):
    source, tokens = pipeline
    run = train_drafter(name, out=tmp_path / "run", target=str(source), tokens=tokens, **QUICK)
    pipe, head = vistok.load(source), vistok.load(run)
    kind = name.partition("-")[0]
    if kind == "judge":
        drafter, rule = make_drafter("copy", pipe.generator), make_rule("judge", head=head)
    else:
        drafter, rule = make_drafter(kind, pipe.generator, head=str(run), length=2), make_rule("standard")
    condition = pipe.generator.make_condition(2, labels=[0, 1])
    ids = speculate(pipe.generator, condition, drafter=drafter, rule=rule, generators=rng.image_generators(0, 2), guidance_scale=1.5)[0].ids
    assert ids.shape == (2, pipe.generator.max_tokens)
    record = json.loads((run / "config.json").read_text())
    assert record["recipe"] == name and len(list((run / "checkpoints").iterdir())) == 1


def task_for(pipeline, head_class, **config):
    source, tokens = pipeline
    pipe, folder = vistok.load(source), TokenFolder(tokens)
    with torch.no_grad():
        pipe.generator.head.weight.mul_(10)  # two steps of training leave its laws flat, and nothing to learn
    task = DrafterTask(head_class.for_target(pipe.generator), pipe.generator, DrafterTaskConfig(**config))
    task.train().on_start(folder)
    return task, read_batch(folder, list(range(8)))


@pytest.mark.parametrize("head_class", [EagleHead, MedusaHeads])
def test_a_head_learns_and_its_target_stays(pipeline, head_class):
    task, batch = task_for(pipeline, head_class)
    before = {key: value.clone() for key, value in task.target.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    losses, accepted = [], []
    for step in range(25):
        loss, logs = task(batch, rng.image_generators(step, 8), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accepted.append(logs["acceptance_1"].item())
    assert losses[-1] < 0.9 * losses[0] and accepted[-1] > accepted[0]
    assert all(torch.equal(value, before[key]) for key, value in task.target.state_dict().items())
    assert all(name.startswith("model.") for name, p in task.named_parameters() if p.requires_grad)


def test_the_logged_acceptance_is_how_often_the_standard_rule_accepts(pipeline):
    task, batch = task_for(pipeline, MedusaHeads)
    torch.nn.init.normal_(task.model.heads[0].weight, std=0.3)
    ids, target = batch.ids[:, :-1], task.target
    with torch.no_grad():
        features = target.features(ids, task.reader.condition(batch))
        drafted = task.drafts(ids, features)
        logged = task.acceptance(drafted, features, torch.ones_like(ids))
        p, q = target.head(features[:, 1:]).softmax(-1), drafted[0].softmax(-1)
        accepted = (q * (p / q).clamp(max=1)).sum(-1).mean()
    torch.testing.assert_close(logged["acceptance_1"], accepted, rtol=0, atol=1e-5)


def test_a_loss_does_not_depend_on_the_rest_of_the_batch(pipeline):
    task, batch = task_for(pipeline, EagleHead)
    generators = rng.image_generators(0, 8)
    folder = task.dataset
    whole = task(batch, generators, 0)[0]
    parts = [task(read_batch(folder, [i]), [rng.image_generators(0, 8)[i]], 0)[0] for i in range(8)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


def test_the_judge_learns_from_how_far_the_image_moves(pipeline):
    source, tokens = pipeline
    pipe, folder = vistok.load(source), TokenFolder(tokens)
    task = JudgeTask(JudgeHead.for_target(pipe.generator), pipe.generator, pipe.tokenizer)
    task.train().on_start(folder)
    batch = read_batch(folder, list(range(16)))
    features, distance = task.examples(batch, rng.image_generators(0, 16))
    assert features.shape == (16, pipe.generator.settings.width) and bool((distance >= 0).all())
    assert float(distance.min()) < task.limit < float(distance.max())  # both labels occur
    loss, logs = task(batch, rng.image_generators(0, 16), 0)
    loss.backward()
    assert 0 < float(logs["good"]) < 1 and task.model.linear.weight.grad.abs().sum() > 0
    again = task.examples(read_batch(folder, [3]), [rng.image_generators(0, 16)[3]])
    torch.testing.assert_close(again[1][0], distance[3], rtol=1e-3, atol=1e-5)


def test_a_target_that_drafts_nothing_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="no pipeline"):
        train_drafter("eagle-tiny", out=tmp_path / "run", target="vistok/emoji-fsq2d")
