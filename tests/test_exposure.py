"""Training on own contexts: what is mixed in when, that nothing flows through it, and that a run can stop and go on."""

import pytest
import torch
from token_toys import assert_resumes_bit_by_bit, token_folder

import vistok
from vistok import rng
from vistok.decoding import generate
from vistok.tokens import TokenLayout, VisualTokens
from vistok.training import TrainConfig, train
from vistok.training.tasks.exposure import ExposureTask, ExposureTaskConfig
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenBatch

N, K = 9, 20


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("gpt-tiny", codebook_size=K, layout_shape=(3, 3), num_classes=3)


def task_of(**config):
    return ExposureTask(make(), ExposureTaskConfig(condition_dropout=0.0, **config)).train()


@pytest.fixture
def batch():
    ids = torch.randint(K, (4, N), generator=torch.Generator().manual_seed(0))
    return TokenBatch(ids=ids, labels=torch.tensor([0, 1, 2, -1]), captions=[""] * 4, indices=torch.arange(4), positions=torch.arange(4))


def test_nothing_of_its_own_is_the_plain_loss_bit_for_bit(batch):
    options = dict(dropout=0.2, token_dropout=0.1)
    ours = ExposureTask(make(), ExposureTaskConfig(scheduled_share=0.5, correction_share=0.5, start_step=3, full_step=9, **options))
    plain = GeneratorTask(make(), GeneratorTaskConfig(**options))
    for step in range(3):
        assert torch.equal(ours(batch, rng.image_generators(step, 4), step)[0], plain(batch, rng.image_generators(step, 4), step)[0])
    never = ExposureTask(make(), ExposureTaskConfig(scheduled_share=0.0, **options))
    assert torch.equal(never(batch, rng.image_generators(9, 4), 9)[0], plain(batch, rng.image_generators(9, 4), 9)[0])
    assert not torch.equal(ours(batch, rng.image_generators(9, 4), 9)[0], plain(batch, rng.image_generators(9, 4), 9)[0])


def test_the_share_rises_linearly_between_its_two_steps():
    config = ExposureTaskConfig(scheduled_share=0.4, start_step=10, full_step=30)
    assert [config.share(step) for step in (0, 10, 20, 30, 99)] == [0, 0, 0.2, 0.4, 0.4]
    assert ExposureTaskConfig(scheduled_share=0.4).share(0) == 0.4
    with pytest.raises(ValueError, match="full_step"):
        ExposureTaskConfig(start_step=5, full_step=4)
    with pytest.raises(ValueError, match="correction_share"):
        ExposureTaskConfig(correction_share=1.5)


def test_inputs_are_data_or_what_the_model_makes_and_targets_stay():
    task = task_of(scheduled_share=0.5)
    B = 200
    ids = torch.randint(K, (B, N), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids=ids, labels=torch.zeros(B).long(), captions=[""] * B, indices=torch.arange(B), positions=torch.arange(B))
    inputs, condition, _ = task.corrupt(batch, rng.image_generators(0, B), 0)
    generators = rng.image_generators(0, B)
    rng.rand((3,), generators)  # what the plain task draws
    uniforms = rng.rand((N + N - 1 + 1,), generators, dtype=torch.float64)
    own = generate(task.model.eval(), condition, uniforms=uniforms[:, :N])[0].ids[:, : N - 1]
    data = ids[:, : N - 1]
    assert ((inputs == own) | (inputs == data)).all()
    differing = own != data
    share = (inputs == own)[differing].float().mean()
    assert abs(share - 0.5) < 4 * 0.5 / differing.sum().sqrt()  # four standard deviations
    assert torch.equal(batch.ids, ids)


def test_correction_reads_the_whole_own_image_or_none_of_it(batch):
    task = task_of(scheduled_share=0.0, correction_share=0.5)
    data, whole, other = batch.ids[:, : N - 1], 0, 0
    for seed in range(20):
        inputs, _, _ = task.corrupt(batch, rng.image_generators(seed, 4), 0)
        same = (inputs == data).all(1)
        other += int((~same).sum())
        whole += int((~same & ((inputs == data).float().mean(1) < 0.5)).sum())
    assert 20 < other < 60 and whole == other


def test_no_gradient_flows_through_its_own_tokens_and_its_mode_is_given_back(batch):
    task = task_of(scheduled_share=1.0)
    inputs, condition, _ = task.corrupt(batch, rng.image_generators(0, 4), 0)
    assert not inputs.requires_grad and task.model.training
    loss, _ = task(batch, rng.image_generators(0, 4), 0)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}
    task.zero_grad()
    given = TokenBatch(batch.ids, batch.labels, batch.captions, batch.indices, batch.positions)
    logits = task.model(inputs, task.condition(given))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids.flatten()).backward()
    assert all(torch.allclose(parameter.grad, found[name], atol=1e-6) for name, parameter in task.named_parameters())


def test_an_image_does_not_depend_on_its_batch(batch):
    task = task_of(scheduled_share=0.5, correction_share=0.3)
    together = task.corrupt(batch, rng.image_generators(0, 4), 0)[0]
    for i in range(4):
        row = torch.tensor([i])
        alone = TokenBatch(batch.ids[row], batch.labels[row], [""], batch.indices[row], batch.positions[row])
        assert torch.equal(task.corrupt(alone, rng.image_generators(0, [i]), 0)[0][0], together[i])


def test_a_stopped_run_resumes_bit_by_bit(tmp_path):
    layout = TokenLayout("grid", (3, 3))
    ids = torch.randint(K, (8, N), generator=torch.Generator().manual_seed(3))
    folder = token_folder(tmp_path / "tokens", VisualTokens.from_ids(ids, layout), codebook_size=K)

    def run(out, steps, resume=False):
        task = ExposureTask(make(), ExposureTaskConfig(scheduled_share=0.5, correction_share=0.2, start_step=1, full_step=3))
        fixed = dict(batch_size=4, preview_every=0, log_every=1, schedule="constant", progress=False)
        train(task, folder, TrainConfig(out=tmp_path / out, max_steps=steps, save_every=2, **fixed), resume=resume)
        return vistok.load(tmp_path / out).state_dict()

    assert_resumes_bit_by_bit(run)
