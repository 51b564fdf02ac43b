"""Two processes on a CPU (gloo) train as one does, and none waits for ever when the other is gone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import training_toy
from vistok.training.checkpoint import newest_checkpoint

WORKER = """
import os, sys
from pathlib import Path
import training_toy

class Dies(training_toy.ToyTask):
    def forward(self, batch, generators, step):
        if step == 3 and os.environ["RANK"] == "1":
            os._exit(9)
        return super().forward(batch, generators, step)

class Breaks(training_toy.ToyTask):
    def forward(self, batch, generators, step):
        loss, logs = super().forward(batch, generators, step)
        return loss * float("nan") if step == 3 and os.environ["RANK"] == "1" else loss, logs

kind = {"plain": training_toy.ToyTask, "dies": Dies, "breaks": Breaks}[sys.argv[3]]
options = dict(argument.split("=") for argument in sys.argv[4:] if "=" in argument)
training_toy.run(Path(sys.argv[1]), Path(sys.argv[2]), resume="--resume" in sys.argv, task_class=kind, dropout=False, process_timeout=20,
                 **{key: int(value) for key, value in options.items()})
"""


def launch(data: Path, out: Path, kind: str, *arguments: str) -> list[subprocess.Popen]:
    """Two processes with the environment that torchrun and accelerate launch give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(training_toy.__file__).parent
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
    }  # fmt: skip
    command = [sys.executable, "-c", WORKER, str(data), str(out), kind, *arguments]
    return [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    return [(process.returncode, text) for process in processes for text in [process.communicate(timeout=100)[1]]]


@pytest.fixture
def data(tmp_path):
    return training_toy.make_folder(tmp_path / "data")


def test_two_processes_train_as_one_and_resume(tmp_path, data):
    training_toy.run(data, tmp_path / "one", dropout=False)
    for arguments in (["max_steps=20"], ["max_steps=20", "--resume"]):
        for code, text in finish(launch(data, tmp_path / "two", "plain", *arguments)):
            assert code == 0, text
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
        for path in (tmp_path / "two" / "checkpoints").glob("step_0000001[2-9]/*"):  # the second round resumes from step 16
            if path.parent.name > "step_00000016":
                path.unlink()
        for path in (tmp_path / "two" / "checkpoints" / "step_00000020").glob("*"):
            path.unlink()


def test_when_one_process_dies_the_other_ends_with_an_error(tmp_path, data):
    begin = time.monotonic()
    survivor, dead = finish(launch(data, tmp_path / "run", "dies"))
    assert dead[0] == 9 and survivor[0] not in (0, None)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_nan_in_one_process_stops_both_with_its_files(tmp_path, data):
    for code, text in finish(launch(data, tmp_path / "run", "breaks")):
        assert code == 1 and "FloatingPointError: NaN or infinite numbers at step 3: loss term loss of the batch image_" in text
