"""What the documentation tells a reader to type or to open is there: commands parse, recipes and models exist, links and names resolve.

Read are README, ARCHITECTURE, CHANGELOG, docs/, the cards of the bundled models, the notebooks, and the docstrings of commands and scripts.
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from vistok.cli import COMMANDS, OVERVIEW
from vistok.registry import is_bundled
from vistok.training.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("vistok/models/*/README.md")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
SCRIPTS = sorted(path for folder in ("vistok/commands", "eval", "train", "scripts") for path in ROOT.glob(f"{folder}/**/*.py"))
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)

COMMAND = re.compile(
    r"(?:accelerate launch |torchrun )?(?:--[\w-]+ \d+ )*(?:python )?(?:-m )?(?P<what>vistok|eval(?:\.\w+)+|train(?:\.\w+|/\w+\.py))"
    r"(?: (?P<rest>.*))?"
)
GROUPS = {command.split()[0] for command in COMMANDS}
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9]*")  # NAME, PHOTOS, N: the reader's own


def of(path):
    return str(path.relative_to(ROOT))


def parts_of(text):
    """Lines of fenced blocks, one command each (a backslash joins lines), and code spans, which may be pieces of a command."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return lines, spans


def docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))


def commands():
    """(where, command, whether it is whole) of every command that the documentation shows."""
    found = []
    for path in PAGES:
        lines, spans = parts_of(path.read_text(encoding="utf-8"))
        found += [(of(path), line, True) for line in lines] + [(of(path), span, False) for span in spans]
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            lines, spans = parts_of("".join(cell["source"]))
            lines += [line.removeprefix("!") for line in cell["source"] if cell["cell_type"] == "code" and line.startswith("!")]
            found += [(of(path), line, True) for line in lines] + [(of(path), span, False) for span in spans]
    for path in SCRIPTS:
        text = docstrings(path)
        found += [(of(path), line, True) for line in text.splitlines() if line.startswith("    ")]
        found += [(of(path), span, False) for span in parts_of(text)[1]]
    found += [("vistok --help", line, True) for line in OVERVIEW.splitlines() if line.startswith("  ")]
    cut = [(where, re.split(r"\s+#\s|\s{2,}", text.strip())[0], is_whole) for where, text, is_whole in found]  # remarks behind
    return [(where, text, is_whole and "..." not in text) for where, text, is_whole in cut if COMMAND.fullmatch(text)]


@functools.cache
def options_class(name):
    """The dataclass of options of `vistok NAME`, eval.NAME or train.NAME."""
    if name in COMMANDS:
        return getattr(importlib.import_module(f"vistok.commands.{COMMANDS[name].module}"), COMMANDS[name].options)
    assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"there is no script {name}"
    if name.startswith("train."):
        return options_class(name.replace(".", " "))
    module = pytest.importorskip(name)  # some need an extra
    return getattr(module, "Config", None) or module.BenchConfig


def names_and_arguments(text):
    match = COMMAND.fullmatch(text)
    words = shlex.split(match["rest"] or "")
    if match["what"].startswith("eval"):
        return match["what"], words
    if match["what"].startswith("train"):
        return match["what"].replace("/", ".").removesuffix(".py"), words
    two, one = " ".join(words[:2]), " ".join(words[:1])
    return (two, words[2:]) if two in COMMANDS else (one, words[1:])


@functools.cache
def option_names(name):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        tyro.cli(options_class(name), args=["--help"], config=CONFIG)
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue()))


def filled_in(words):
    """The words with a recipe that exists where the reader is to put one."""
    return ["fsq2d-tiny" if before == "--recipe" and PLACEHOLDER.fullmatch(word) else word for before, word in zip(["", *words], words)]


def check(text, is_whole):
    name, words = names_and_arguments(text)
    if name in ("", "--help", "--version") or PLACEHOLDER.fullmatch(name) or (not words and name in GROUPS):
        return
    assert name in COMMANDS or name.split(".")[0] in ("eval", "train"), f"there is no command `vistok {name}`"
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in option_names(name), f"`{text}`: {name} has no option {option}"
    recipe = dict(zip(words, words[1:])).get("--recipe")
    if recipe is not None and not PLACEHOLDER.fullmatch(recipe):
        assert recipe in RECIPES, f"`{text}`: there is no recipe {recipe}"
        kind = name.replace(".", " ").removeprefix("train ")
        assert kind == "eval cost" or get_recipe(recipe).kind == kind, f"`{text}`: {recipe} is a recipe of another command"
    if is_whole and "--help" not in words and not any(len(word) == 1 and word.isupper() for word in words):  # N: a number of the reader's
        try:
            tyro.cli(options_class(name), args=filled_in(words), config=CONFIG)
        except SystemExit as stop:
            raise AssertionError(f"`{text}` does not parse") from stop


FOUND = commands()


@pytest.mark.parametrize("where", sorted({where for where, _, _ in FOUND}))
def test_every_command_that_a_page_shows_parses(where, capsys):
    for _, text, is_whole in (entry for entry in FOUND if entry[0] == where):
        check(text, is_whole)


def test_the_page_of_the_command_line_names_every_command():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"`{name}`" not in text and f"`{name} " not in text]


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = page if not file else page.parent / file
        assert there.exists(), f"{of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ +(.+)$", there.read_text(encoding="utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{of(page)} links to {target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_bundled_models_that_a_page_names_are_there(page):
    names = set(re.findall(r"vistok/emoji-[a-z0-9-]*[a-z0-9]", page.read_text(encoding="utf-8").replace("vistok/models/", "")))
    assert not [name for name in names if not is_bundled(name)]


@functools.cache
def files():
    folders = ("vistok", "docs", "eval", "train", "scripts", "tests", "notebooks")
    return [f"/{of(path)}" for folder in folders for path in ROOT.glob(f"{folder}/**/*.*")]


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|ipynb))`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in files())]


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_python_on_a_page_is_python_and_imports_what_exists(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("vistok", "eval"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{of(page)}: {node.module} has no {', '.join(missing)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vistok":
                assert hasattr(importlib.import_module("vistok"), node.attr), f"{of(page)}: there is no vistok.{node.attr}"
