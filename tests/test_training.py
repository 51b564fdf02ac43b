"""The training loop: what it computes does not depend on interruptions or micro batches; what goes wrong is said and named."""

import json
import logging
import math

import pytest
import torch
from training_toy import ToyConfig, ToyTask, make_config, make_folder, run

from vistok.data import ImageFolder
from vistok.modeling import VisualModel
from vistok.training import TrainConfig, seeded_build, train
from vistok.training.checkpoint import complete_checkpoints, newest_checkpoint, read_checkpoint
from vistok.training.ema import Ema
from vistok.training.schedule import learning_rate_factor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "data")


def final_files(out):
    return newest_checkpoint(out / "checkpoints")[0]


def lines(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_s", "eta_s")} for line in found]


def forget_after(out, step):
    """Make a finished run look as if it had been killed right after the checkpoint of `step`; metrics and model stay as they are."""
    for number, folder in complete_checkpoints(out / "checkpoints"):
        if number > step:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def assert_equal_files(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key]), f"{name}/{key}"


# every save lies inside the EMA warm-up, most of them in the middle of an epoch (7 images) and of a line of metrics (3 steps)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [2, 4, 8, 14, 18])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, data, step, accumulation):
    options = dict(gradient_accumulation=accumulation, keep_checkpoints=100)
    run(data, tmp_path / "straight", **options)
    run(data, tmp_path / "resumed", **options)
    forget_after(tmp_path / "resumed", step)
    run(data, tmp_path / "resumed", resume=True, **options)
    assert_equal_files(final_files(tmp_path / "straight"), final_files(tmp_path / "resumed"))
    assert lines(tmp_path / "straight") == lines(tmp_path / "resumed")


def test_global_random_numbers_neither_steer_a_run_nor_are_touched_by_it(tmp_path, data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(data, tmp_path / "one", preview_every=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    run(data, tmp_path / "two", preview_every=3)
    assert_equal_files(final_files(tmp_path / "one"), final_files(tmp_path / "two"))


def test_previews_and_saves_do_not_change_what_is_trained(tmp_path, data):
    run(data, tmp_path / "one", preview_every=1, save_every=1)
    run(data, tmp_path / "two", preview_every=0, save_every=100)
    assert_equal_files(final_files(tmp_path / "one"), final_files(tmp_path / "two"))


def test_micro_batches_add_up_to_the_batch(tmp_path, data):
    run(data, tmp_path / "one", dropout=False)
    run(data, tmp_path / "four", dropout=False, gradient_accumulation=4)
    one, four = final_files(tmp_path / "one"), final_files(tmp_path / "four")
    for name in ("ema", "extras", "optimizer"):
        for key in one[name]:
            torch.testing.assert_close(one[name][key], four[name][key], rtol=0, atol=1e-5)
    assert lines(tmp_path / "one")[0]["loss"] == pytest.approx(lines(tmp_path / "four")[0]["loss"], abs=1e-5)
    assert lines(tmp_path / "one")[0]["perplexity"] == pytest.approx(lines(tmp_path / "four")[0]["perplexity"])


def test_checkpoints_hold_trained_parts_and_buffers_but_nothing_frozen(tmp_path, data):
    run(data, tmp_path, max_steps=2)
    files = final_files(tmp_path)
    assert "running_mean" in files["model"] and "layers.1.weight" in files["model"]
    assert sorted(files["extras"]) == ["critic.bias", "critic.weight"]
    assert not any("frozen" in key for part in files.values() for key in part)
    assert "exp_avg/critic.weight" in files["optimizer"] and "running_mean" not in files["ema"]


def test_frozen_parts_stay_in_eval_mode_while_training():
    task = ToyTask(ToyConfig(), True).train()
    assert task.model.training and not task.frozen.training and not task.frozen[1].training
    task.model.layers[1].requires_grad_(False)
    assert not task.train().model.layers[1].training and task.model.training and task.model.layers[3].training


def test_the_result_is_a_model_folder_with_the_averaged_weights(tmp_path, data):
    task = run(data, tmp_path)
    loaded = type(task.model).from_pretrained(tmp_path / "model")
    assert isinstance(loaded, VisualModel)
    averages = final_files(tmp_path)["ema"]
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, averages[name])
    assert not torch.equal(averages["layers.1.weight"], task.model.layers[1].weight)


def test_a_run_folder_tells_its_story(tmp_path, data):
    run(data, tmp_path, preview_every=10)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["batch_size"] == 4 and config["task"]["model_config"] == {"width": 8}
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9, 12, 15, 18, 20]
    assert {"loss", "error", "usage", "perplexity", "grad_norm", "grad_norm_critic", "lr"} < set(lines(tmp_path)[0])
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["step_00000010_restored.png", "step_00000020_restored.png"]
    assert "started at step 0 of 20" in (tmp_path / "log.txt").read_text()


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, data):
    run(data, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="already holds a run.*--resume"):
        run(data, tmp_path, max_steps=2)


def test_resuming_with_other_mathematics_is_refused_and_the_fields_are_named(tmp_path, data):
    run(data, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"batch_size: 4 -> 8; learning_rate: 0.001 -> 0.1"):
        run(data, tmp_path, resume=True, max_steps=2, batch_size=8, learning_rate=0.1)


def test_resuming_another_model_is_refused_and_its_field_named(tmp_path, data):
    run(data, tmp_path, max_steps=2)
    config = make_config(data, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"task.model_config.width: 8 -> 9"):
        train(ToyTask(ToyConfig(width=9), True), ImageFolder(data, image_size=8, split="all"), config, resume=True)


def test_resuming_on_other_images_is_refused_but_a_moved_folder_is_fine(tmp_path, data):
    run(data, tmp_path / "run", max_steps=2)
    run(make_folder(tmp_path / "moved"), tmp_path / "run", resume=True, max_steps=2)
    with pytest.raises(ValueError, match="has other images than"):
        run(make_folder(tmp_path / "more", count=9), tmp_path / "run", resume=True, max_steps=2)


def test_a_finished_run_can_be_made_longer(tmp_path, data):
    run(data, tmp_path / "long", schedule="constant")
    run(data, tmp_path / "grown", schedule="constant", max_steps=9)
    run(data, tmp_path / "grown", schedule="constant", resume=True)
    for name in ("model", "ema", "optimizer"):
        for key, value in final_files(tmp_path / "long")[name].items():
            assert torch.equal(value, final_files(tmp_path / "grown")[name][key])


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(tmp_path, data):
    run(data, tmp_path / "straight")
    run(data, tmp_path / "new", resume=True)
    assert_equal_files(final_files(tmp_path / "straight"), final_files(tmp_path / "new"))


class BreaksAtStepFive(ToyTask):
    """Its error term is NaN at step 5, and only there."""

    def forward(self, batch, generators, step):
        loss, logs = super().forward(batch, generators, step)
        if step == 5:
            return loss + math.nan, {**logs, "error": logs["error"] * math.nan}
        return loss, logs


class BreaksItsGradient(ToyTask):
    """A finite loss whose gradient is not: the square root at zero."""

    def forward(self, batch, generators, step):
        loss, logs = super().forward(batch, generators, step)
        return loss + (self.critic.bias * 0).abs().sqrt().sum() * 0, logs


def test_a_nan_is_named_with_step_loss_term_and_files(tmp_path, data):
    with pytest.raises(FloatingPointError, match=r"step 5: loss term loss, error of the batch image_\d.png(, image_\d.png){3}") as caught:
        run(data, tmp_path, task_class=BreaksAtStepFive)
    assert str(caught.value).split(". ")[0] in (tmp_path / "log.txt").read_text()
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] == 4


def test_a_gradient_that_is_no_number_is_named_by_its_parameter(tmp_path, data):
    with pytest.raises(FloatingPointError, match=r"step 0: gradient of critic.bias after the batch image_"):
        run(data, tmp_path, task_class=BreaksItsGradient)


def test_a_pixel_that_is_no_number_is_named_by_its_file(tmp_path, data):
    class Poisoned(ToyTask):
        def make_loader(self, *arguments):
            for batch in super().make_loader(*arguments):
                batch.images[2, 0, 0, 0] = math.nan
                self.poisoned = self.dataset.names[batch.indices[2]]
                yield batch

    task = ToyTask(ToyConfig(), True)
    task.__class__ = Poisoned
    with pytest.raises(FloatingPointError, match="step 0: loss term loss, error of images with NaN pixels image_._*.png") as caught:
        train(task, ImageFolder(data, image_size=8, split="all"), make_config(data, tmp_path, max_steps=1))
    assert task.poisoned in str(caught.value)


def test_allowed_bad_steps_are_left_out_and_counted(tmp_path, data):
    task = run(data, tmp_path, task_class=BreaksAtStepFive, max_bad_steps=1)
    assert all(p.isfinite().all() for p in task.parameters())
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["bad_steps"] == 1
    assert "step left out (1 of 1)" in (tmp_path / "log.txt").read_text()
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


def test_running_out_of_memory_says_what_to_lower_and_a_smaller_run_then_works(tmp_path, data):
    class Hungry(ToyTask):
        def forward(self, batch, generators, step):
            if step == 2 and len(batch) == 4:
                torch.empty(2**60, dtype=torch.uint8)
            return super().forward(batch, generators, step)

    with pytest.raises(
        MemoryError, match=r"at step 2, 4 images per forward pass: raise --gradient-accumulation.*1152921504606846976 bytes"
    ):
        run(data, tmp_path, task_class=Hungry)
    run(data, tmp_path, task_class=Hungry, resume=True, gradient_accumulation=2)
    assert len(lines(tmp_path)) == 7


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path):
    folder = make_folder(tmp_path / "data")
    (folder / "image_3.png").write_bytes(b"no image")
    run(folder, tmp_path / "run", max_steps=4)
    report = json.loads((tmp_path / "run" / "bad_images.json").read_text())
    assert report["count"] == 1 and list(report["images"]) == ["image_3.png"]
    assert "unreadable images so far: 1" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_folder_that_disappears_stops_the_run_with_the_file_that_could_not_be_written(tmp_path, data):
    class Vanishing(ToyTask):
        def forward(self, batch, generators, step):
            if step == 4:
                (tmp_path / "run").rename(tmp_path / "gone")  # not rmtree: TensorBoard's thread may write meanwhile
            return super().forward(batch, generators, step)

    with pytest.raises(OSError, match="cannot write .*metrics.jsonl"):
        run(data, tmp_path / "run", task_class=Vanishing, save_every=100)


def test_a_collapsed_codebook_is_warned_of_once(tmp_path, data):
    class Collapsed(ToyTask):
        codebook_size = 64

    run(data, tmp_path, task_class=Collapsed)
    assert (tmp_path / "log.txt").read_text().count("below 10 % of its 64 codes") == 1


def test_bf16_trains_and_resumes_bit_for_bit(tmp_path, data):
    run(data, tmp_path / "straight", precision="bf16", keep_checkpoints=100)
    run(data, tmp_path / "resumed", precision="bf16", keep_checkpoints=100)
    forget_after(tmp_path / "resumed", 8)
    run(data, tmp_path / "resumed", resume=True, precision="bf16", keep_checkpoints=100)
    assert_equal_files(final_files(tmp_path / "straight"), final_files(tmp_path / "resumed"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is allowed on a GPU")
def test_fp16_on_a_cpu_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="needs a GPU"):
        run(data, tmp_path, precision="fp16")


@pytest.mark.slow
def test_a_compiled_task_trains_like_a_plain_one(tmp_path, data):
    run(data, tmp_path / "plain", dropout=False, max_steps=6)
    run(data, tmp_path / "compiled", dropout=False, max_steps=6, compile=True)
    for key, value in final_files(tmp_path / "plain")["ema"].items():
        torch.testing.assert_close(value, final_files(tmp_path / "compiled")["ema"][key], rtol=0, atol=1e-5)


def test_every_trained_parameter_must_be_in_a_group(tmp_path, data):
    class Forgetful(ToyTask):
        def parameter_groups(self):
            return [{"params": list(self.model.parameters())}]

    with pytest.raises(ValueError, match="lists 4 parameters, but 6"):
        run(data, tmp_path, task_class=Forgetful)


def test_vectors_are_not_decayed_and_groups_may_have_their_own_rate(tmp_path, data):
    class TwoRates(ToyTask):
        def parameter_groups(self):
            return [{"params": list(self.model.parameters())}, {"params": list(self.critic.parameters()), "lr": 0.0}]

    groups = ToyTask(ToyConfig(), True).parameter_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 0.0] and all(p.ndim == 1 for p in groups[1]["params"])
    before = seeded_build(lambda: TwoRates(ToyConfig(), True), 5)
    after = run(data, tmp_path, task_class=TwoRates, max_steps=3)
    assert torch.equal(before.critic.weight, after.critic.weight) and not torch.equal(
        before.model.layers[1].weight, after.model.layers[1].weight
    )


def test_the_logger_is_left_as_it_was(tmp_path, data):
    logger = logging.getLogger("vistok")
    before = (logger.level, list(logger.handlers))
    run(data, tmp_path, max_steps=2)
    assert (logger.level, list(logger.handlers)) == before


def test_the_average_forgets_its_start_and_gives_the_weights_back():
    model = torch.nn.Linear(2, 1, bias=False)
    ema = Ema(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(5):
        model.weight.data += 1
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema.update(step)
    own = model.weight.detach().clone()
    with ema.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)


def config_of(**options):
    return TrainConfig(out="x", **{**dict(max_steps=100, warmup_steps=10, final_fraction=0.1), **options})


def test_schedules_rise_to_the_peak_and_end_where_they_should():
    for schedule, last in (("cosine", 0.1), ("trapezoid", 0.1), ("constant", 1.0)):
        config = config_of(schedule=schedule)
        factors = [learning_rate_factor(config, step) for step in range(101)]
        assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
        assert factors[100] == pytest.approx(last) and max(factors) == 1.0
    trapezoid = [learning_rate_factor(config_of(schedule="trapezoid", decay_fraction=0.2), step) for step in (79, 80, 90)]
    assert trapezoid == [1.0, 1.0, pytest.approx(0.55)]


@pytest.mark.parametrize(
    "options", [dict(batch_size=5, gradient_accumulation=2), dict(schedule="linear"), dict(max_steps=0), dict(ema_decay=1.5)]
)
def test_impossible_configs_are_refused_with_the_field_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        config_of(**options)


def test_the_state_of_a_run_is_plain_data(tmp_path, data):
    run(data, tmp_path, max_steps=2)
    ((_, folder),) = complete_checkpoints(tmp_path / "checkpoints")
    assert read_checkpoint(folder)[1]["samples_seen"] == 8
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
