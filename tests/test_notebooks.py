"""The notebooks run, are short, and are committed with their pictures.

Each notebook's cell tagged "parameters" is all that the tests change. To run the notebooks in full and store what they show:

    python tests/test_notebooks.py                       all of them
    python tests/test_notebooks.py 01 --model FOLDER     one of them, on another model than the one its text names
"""

import argparse
import ast
import os
import re
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install vistok[dev]")
nbclient = pytest.importorskip("nbclient", reason="pip install vistok[dev]")
pytest.importorskip("ipykernel", reason="pip install vistok[dev]")

from ipykernel.kernelspec import RESOURCES, get_kernel_dict  # noqa: E402
from jupyter_client.kernelspec import KernelSpec  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:work|tmp|root|home|Users|usr|opt|var|mnt|private)\b|\b[A-Z]:\\")
SHOWS = ("print(", "display(", "plt.show(", "make_strip(", "make_grid(")


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels of the interpreter that runs the tests, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def execute(notebook, folder: Path):
    """Run a notebook in `folder`, in place. Raises CellExecutionError."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore:IProgress not found"}
    client = nbclient.NotebookClient(
        notebook,
        timeout=280,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    return client.execute(env=environment)


def parameters_of(notebook):
    return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def replaced(source: str, values: dict) -> str:
    """The parameters cell with other values. Raises ValueError: it has other parameters."""
    names = {target.id for node in ast.parse(source).body for target in node.targets}
    if names != set(values):
        raise ValueError(f"the parameters are {sorted(names)}, not {sorted(values)}")
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request):
    return nbformat.read(request.param, as_version=4)


def test_tokenize_and_truncate_runs_on_any_flextok(tmp_path):
    import torch

    import vistok

    torch.manual_seed(0)
    vistok.create("flextok-tiny").save_pretrained(tmp_path / "model")
    notebook = nbformat.read(ROOT / "notebooks" / "01_tokenize_and_truncate.ipynb", as_version=4)
    cell = parameters_of(notebook)
    cell.source = replaced(cell.source, {"MODEL": str(tmp_path / "model"), "NUM_IMAGES": 3, "SEED": 7})
    execute(notebook, tmp_path)
    assert pictures(notebook) == 4


def test_train_on_a_folder_runs_with_a_few_steps(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "02_train_on_a_folder.ipynb", as_version=4)
    cell = parameters_of(notebook)
    cell.source = replaced(cell.source, {"NUM_IMAGES": 60, "TOKENIZER_STEPS": 6, "GENERATOR_STEPS": 6})
    execute(notebook, tmp_path)
    assert pictures(notebook) == 5
    assert "holiday.jpg" in str([cell.outputs for cell in code_cells(notebook)])


def test_a_notebook_has_at_most_12_cells_and_one_of_parameters(committed):
    assert len(committed.cells) <= 12
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in committed.cells) == 1
    assert parameters_of(committed) is code_cells(committed)[0]


def test_a_notebook_imports_only_public_names(committed):
    for cell in code_cells(committed):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") for name in names), ast.unparse(node)


def test_cells_that_show_something_are_committed_with_what_they_show(committed):
    for cell in code_cells(committed):
        if any(call in cell.source for call in SHOWS):
            assert cell.outputs, cell.source
    assert pictures(committed) >= 4


def test_committed_outputs_hold_no_error_and_no_path_of_a_machine(committed):
    outputs = [output for cell in code_cells(committed) for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    for output in outputs:
        texts = [output.get("text", ""), *(str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))]
        for text in texts:
            assert not MACHINE_PATH.search(text), text
            assert not re.search(r"Traceback|Warning:", text), text


def test_a_notebook_stays_small(committed):
    assert len(nbformat.writes(committed)) < 1.5e6


def refresh(path: Path, model: str | None = None) -> None:
    """Run a notebook in full and store it with its outputs; `model` stands in for the one its parameters name."""
    notebook = nbformat.read(path, as_version=4)
    cell = parameters_of(notebook)
    source = cell.source
    if model is not None:
        cell.source = re.sub(r"(?m)^MODEL = .*$", lambda _: f"MODEL = {model!r}", source)
    begin = time.perf_counter()
    execute(notebook, path.parent)
    cell.source = source
    for output in (output for code in code_cells(notebook) for output in code.outputs):
        output.get("data", {}).pop("image/jpeg", None)  # PIL gives every picture twice
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of the machine
    nbformat.write(notebook, path)
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {size:.2f} MB, {pictures(notebook)} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run notebooks in full and store them with their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of their file names; all by default")
    parser.add_argument("--model", help="model folder to run on, in place of the one the parameters name")
    options = parser.parse_args()
    for notebook_path in NOTEBOOKS:
        if not options.names or any(notebook_path.name.startswith(name) for name in options.names):
            refresh(notebook_path, None if options.model is None else str(Path(options.model).resolve()))
    sys.exit(0)
