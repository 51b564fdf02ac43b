import subprocess
import sys

import pytest

PROBE = """
import sys, time, warnings
filters = list(warnings.filters)
start = time.process_time()
import vistok
seconds = time.process_time() - start
heavy = {"torch", "numpy", "diffusers", "transformers", "timm", "PIL"} & set(sys.modules)
assert not heavy, heavy
assert warnings.filters == filters
assert seconds < 0.3, seconds
assert "create" in dir(vistok) and vistok.__version__
"""

STATE = """
import torch
linear = torch.nn.Linear.reset_parameters
torch.manual_seed(3)
before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
import vistok, vistok.tokenizers, vistok.convert.flextok
after = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert torch.nn.Linear.reset_parameters is linear
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_importing_vistok_is_quick_loads_nothing_heavy_and_keeps_warning_filters():
    run(PROBE)


@pytest.mark.slow
def test_importing_the_models_changes_no_global_state_of_torch():
    run(STATE)
