"""What every parity test needs: the reference cases as a fixture, and a comparison that refuses tensors it does not know.

A test file names its family (`FAMILY = "flextok"`); its tests take the fixture `golden`, once for every folder `ROOT/FAMILY/*`. ROOT is the
environment variable VISTOK_GOLDEN, or tests/golden.
"""

import ast
import json
import math
import operator
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DEFAULT_ROOT = Path(__file__).parent.parent / "golden"
ROOT = Path(os.environ.get("VISTOK_GOLDEN", DEFAULT_ROOT))


class Golden:
    """One reference case: `spec` is its case.json, `io` its tensors, `folder` where its weights are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spec = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.io = load_file(folder / "io.safetensors")

    def what(self, name: str) -> str:
        """What case.json says a tensor is."""
        return self.spec["tensors"].get(name, {}).get("what", "")

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.io if name.split(".")[0] == prefix]

    def check(self, prefix: str, results: dict[str, Tensor], *, inputs: tuple[str, ...] = ()) -> None:
        """Compare every tensor of the group `prefix` with its result; one without a result that is no input is an error."""
        for name in self.names(prefix):
            if name in inputs:
                continue
            assert name in results, f"{self.folder}: {name} is not understood by this test"
            self.compare(name, results[name])

    def check_weights(self, found: dict[str, Tensor], file: str = "state.safetensors") -> None:
        """`found` holds exactly the weights of the case, bit for bit."""
        original = load_file(self.folder / file)
        assert found.keys() == original.keys()
        wrong = [name for name in original if not torch.equal(found[name], original[name])]
        assert not wrong, f"{self.folder}: {', '.join(wrong[:5])} are not bit-equal"

    def compare(self, name: str, actual: Tensor, expected: Tensor | None = None) -> None:
        """Integers and booleans exactly; floats within case.json's tolerance, else 1e-4 of the largest value."""
        expected = self.io[name] if expected is None else expected
        assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            wrong = int((actual != expected).sum())
            assert wrong == 0, f"{name}: {wrong} of {expected.numel()} entries differ"
            return
        if not expected.numel():
            return
        tolerance = self.spec.get("tolerances", {}).get("fp32", {})
        atol, rtol = tolerance.get("atol", 1e-4 * float(expected.abs().max())), tolerance.get("rtol", 0.0)
        actual, expected = actual.detach().double(), expected.double()
        assert bool(actual.isfinite().all()), f"{name} is not finite"
        excess = float(((actual - expected).abs() - atol - rtol * expected.abs()).max())
        assert excess <= 0, f"{name}: off by {float((actual - expected).abs().max()):.3g}, allowed {atol:g} + {rtol:g} |expected|"


_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


_FUNCTIONS = {"min": min, "max": max, "abs": abs, "sqrt": math.sqrt, "exp": math.exp, "cos": math.cos, "sin": math.sin}


def arithmetic(text: str):
    """A function of t from an expression of numbers, t, pi, + - * / **, parentheses and a few functions, without eval."""

    def value(node: ast.AST, t: float) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return node.value
        if isinstance(node, ast.Name) and node.id in ("t", "pi"):
            return t if node.id == "t" else math.pi
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
            return _FUNCTIONS[node.func.id](*(value(argument, t) for argument in node.args))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left, t), value(node.right, t))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand, t))
        raise ValueError(f"{text!r} holds {ast.dump(node)}, which is not arithmetic in t")

    tree = ast.parse(text, mode="eval").body
    value(tree, 0.5)
    return lambda t: float(value(tree, t))


def _folders(family: str) -> list[Path]:
    folder = ROOT / family
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def pytest_generate_tests(metafunc):
    if "golden_folder" in metafunc.fixturenames:
        family = metafunc.module.FAMILY
        folders = _folders(family)
        if not folders and ROOT == DEFAULT_ROOT:
            raise pytest.UsageError(f"{ROOT / family} holds no reference cases")
        metafunc.parametrize("golden_folder", folders, ids=[folder.name for folder in folders], scope="module")


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> Golden:
    torch.manual_seed(0)
    return Golden(golden_folder)


@pytest.fixture(scope="session")
def schedule():
    """Guidance of a case: a number, or a function of t from "sched:EXPRESSION"."""

    def parse(guidance):
        if isinstance(guidance, (int, float)):
            return float(guidance)
        kind, _, text = guidance.partition(":")
        if kind != "sched":
            raise ValueError(f"guidance {guidance!r} is not understood")
        return arithmetic(text)

    return parse
