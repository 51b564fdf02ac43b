"""Two processes on a CPU (gloo) train as one does, and none waits for ever when the other is gone."""

import json
import os
import shutil
import signal
import socket
import time
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
import training_toy

from vistok.training.checkpoint import complete_checkpoints, newest_checkpoint


def launch(data: Path, out: Path, **options) -> list[Process]:
    """Two processes with the environment that torchrun and accelerate launch give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    common["OMP_NUM_THREADS"] = "1"
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [training_toy.start(data, out, environment=rank, dropout=False, process_timeout=20, **options) for rank in ranks]


def exit_codes(processes: list[Process]) -> list[int]:
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


@pytest.fixture
def data(tmp_path):
    return training_toy.make_folder(tmp_path / "data")


def forget_after(out: Path, step: int) -> None:
    for number, folder in complete_checkpoints(out / "checkpoints"):
        if number > step:
            shutil.rmtree(folder)


def test_two_processes_train_as_one_and_resume(tmp_path, data):
    training_toy.run(data, tmp_path / "one", dropout=False)
    for resume in (False, True):
        assert exit_codes(launch(data, tmp_path / "two", resume=resume)) == [0, 0]
        one, state = newest_checkpoint(tmp_path / "one" / "checkpoints")
        two, other = newest_checkpoint(tmp_path / "two" / "checkpoints")
        assert state["samples_seen"] == other["samples_seen"] == 80
        for name in one:
            for key, value in one[name].items():
                torch.testing.assert_close(value, two[name][key], rtol=0, atol=1e-5, msg=f"{name}/{key}")
        lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two")]
        for first, second in zip(*lines, strict=True):
            for key in ("step", "loss", "error", "grad_norm", "usage", "perplexity"):
                assert first[key] == pytest.approx(second[key], abs=1e-5)
        forget_after(tmp_path / "two", 16)


@pytest.mark.timeout(150)  # and does not wait for the dead one
def test_when_one_process_dies_the_other_ends_with_an_error(tmp_path, data):
    survivor, dead = exit_codes(launch(data, tmp_path / "run", task_class=training_toy.Dies))
    assert dead == 9 and survivor == 1


def test_a_nan_in_one_process_stops_both_and_names_its_files(tmp_path, data):
    assert exit_codes(launch(data, tmp_path / "run", task_class=training_toy.Breaks)) == [1, 1]
    for rank in range(2):
        text = (tmp_path / f"run.error{rank}").read_text()
        assert "FloatingPointError: NaN or infinite numbers at step 3: loss term loss of the batch image_" in text


def test_a_signal_to_one_process_ends_both_at_the_same_step_and_saved(tmp_path, data):
    out = tmp_path / "run"
    processes = launch(data, out, max_steps=100_000, save_every=100_000)
    while all(process.is_alive() for process in processes) and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [0, 0]
    assert len(complete_checkpoints(out / "checkpoints")) == 1
