"""Checkpoint folders: complete or absent, never half; damage is seen; nothing but tensors and numbers inside."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import training_toy

from vistok.training.checkpoint import complete_checkpoints, newest_checkpoint, read_checkpoint, remove_leftovers, write_checkpoint


def tensors(value: float) -> dict:
    return {"model": {"a": torch.full((3,), value), "b": torch.tensor(2)}, "ema": {"a": torch.full((3,), -value)}}


@pytest.fixture
def data(tmp_path):
    return training_toy.make_folder(tmp_path / "data")


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path):
    folder = write_checkpoint(tmp_path, 7, tensors(0.1), {"samples_seen": 28}, keep=2)
    files, state = read_checkpoint(folder)
    assert (state["step"], state["samples_seen"]) == (7, 28)
    assert all(torch.equal(files[file][key], value) for file, part in tensors(0.1).items() for key, value in part.items())


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path):
    folder = write_checkpoint(tmp_path, 7, tensors(0.1), {}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["ema.safetensors", "model.safetensors", "state.json"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        write_checkpoint(tmp_path, step, tensors(step), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000011"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "file gone", "no state", "half a state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    write_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=3)
    folder = write_checkpoint(tmp_path, 2, tensors(2.0), {}, keep=3)
    weights, state = folder / "model.safetensors", folder / "state.json"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "file gone":
        weights.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:40])
    files, state = newest_checkpoint(tmp_path)
    assert state["step"] == 1 and files["model"]["a"][0] == 1
    write_checkpoint(tmp_path, 2, tensors(2.0), {}, keep=3)
    assert newest_checkpoint(tmp_path)[1]["step"] == 2


def test_half_written_folders_are_no_checkpoints_and_are_removed(tmp_path):
    write_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=3)
    (tmp_path / ".tmp-step_00000002").mkdir()
    (tmp_path / ".tmp-step_00000002" / "model.safetensors").write_bytes(b"half")
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [1]
    assert remove_leftovers(tmp_path) == [".tmp-step_00000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named_with_the_bytes_needed(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"step_00000001.*needs 32 bytes"):
        write_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=2)


def test_a_failed_write_leaves_the_checkpoints_before_it_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step_00000002.*needs 80,000 bytes"):
            write_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(20_000)}}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert newest_checkpoint(tmp_path)[0]["model"]["a"][0] == 1


def test_a_full_disk_stops_training_with_path_and_bytes_and_keeps_the_last_good_checkpoint(tmp_path, data):
    class FillsTheDisk(training_toy.ToyTask):
        def forward(self, batch, generators, step):
            if step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
            return super().forward(batch, generators, step)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"stopped at step 6: cannot write checkpoint .*step_00000006.*bytes.*last good .* step 4"):
            training_toy.run(data, tmp_path / "run", task_class=FillsTheDisk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "trying once more" in (tmp_path / "run" / "log.txt").read_text()
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 4
    (tmp_path / "run" / "config.json").write_text((tmp_path / "run" / "config.json").read_text().replace("FillsTheDisk", "ToyTask"))
    training_toy.run(data, tmp_path / "run", resume=True)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 20


def kill_at_random_instants(tmp_path: Path, data: Path, times: int) -> None:
    """Start, kill -9, look, resume, ... and compare the end with a run that nobody touched."""
    out, generator = tmp_path / "killed", torch.Generator().manual_seed(times)
    options = dict(max_steps=10 + 10 * times, log_every=5)
    seen = 0
    for _ in range(times):
        process = training_toy.start(data, out, resume=True, **options)
        while process.is_alive() and newest_step(out) <= seen:
            time.sleep(0.002)
        time.sleep(0.02 * torch.rand((), generator=generator).item())
        process.kill()
        process.join()
        found = newest_checkpoint(out / "checkpoints")  # reads every digest
        assert found is not None and found[1]["step"] >= seen
        if (out / "model").exists():  # killed between the first checkpoint and the first model there is none yet
            assert training_toy.ToyModel.from_pretrained(out / "model")
        seen = found[1]["step"]
    process = training_toy.start(data, out, resume=True, **options)
    process.join()
    assert process.exitcode == 0
    training_toy.run(data, tmp_path / "straight", **options)
    for _, folder in complete_checkpoints(out / "checkpoints"):
        for name in read_checkpoint(folder)[0]:
            other = tmp_path / "straight" / folder.relative_to(out) / f"{name}.safetensors"
            assert (folder / f"{name}.safetensors").read_bytes() == other.read_bytes()
    assert steps_of(out) == steps_of(tmp_path / "straight")
    assert not list(out.glob(".tmp-*")) + list((out / "checkpoints").glob(".tmp-*"))


def newest_step(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")), default=0)


def steps_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_s", "eta_s")} for line in lines]


def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(tmp_path, data):
    kill_at_random_instants(tmp_path, data, 3)


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_as_if_it_had_not_been(tmp_path, data):
    kill_at_random_instants(tmp_path, data, 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_ends_well(tmp_path, data, number):
    out = tmp_path / "run"
    process = training_toy.start(data, out, max_steps=100_000, save_every=100_000)
    while process.is_alive() and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(timeout=60)  # the whole run would take longer
    assert process.exitcode == 0
    ((step, folder),) = complete_checkpoints(out / "checkpoints")
    assert read_checkpoint(folder)[1]["samples_seen"] == 4 * step > 0
    assert "stopped by a signal" in (out / "log.txt").read_text()
    training_toy.run(data, out, resume=True, max_steps=step + 2, save_every=100_000)
    assert newest_checkpoint(out / "checkpoints")[1]["step"] == step + 2
