"""The command line: a table of commands, their help, and what a user sees when something goes wrong.

Each command is a dataclass of options in `vistok.commands` with a method `run`; tyro makes its arguments and help. Only the module of the
command that runs is imported, and torch only once it runs, so help answers at once.

Exit codes: 0 done; 2 something the user can mend, said in one line on stderr; 130 stopped by Ctrl-C or SIGTERM.
"""

import difflib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Where a command's options live (module below vistok.commands, class) and one line about it."""

    module: str
    options: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "Demo", "a tour on bundled models and images; with --train, the whole job from scratch"),
    "train tokenizer": Command("train", "TrainTokenizer", "images -> a tokenizer"),
    "train generator": Command("train", "TrainGenerator", "tokens -> a generator of images"),
    "train drafter": Command("train_drafter", "TrainDrafter", "a generator -> a head that drafts its next tokens"),
    "train classifier": Command("train_vision", "TrainClassifier", "images in classes -> a classifier of timm"),
    "train vlm": Command("train_vision", "TrainVLM", "rendered scenes and questions -> a small LLaVA"),
    "train pruner": Command("train_pruner", "TrainPruner", "a vision-language model -> what to drop inside it"),
    "train teacher": Command("train_teacher", "TrainTeacher", "classes and captions -> a vision tower that teaches tokenizers"),
    "tokenize": Command("tokenize", "Tokenize", "images -> a folder of tokens"),
    "reconstruct": Command("reconstruct", "Reconstruct", "a strip of images at several token counts"),
    "generate": Command("generate", "Generate", "labels or captions -> new images"),
    "prune": Command("prune", "Prune", "images with the tokens a method keeps, folds and drops"),
    "models": Command("models", "Models", "list presets and bundled models"),
    "info": Command("models", "Info", "what a model is: class, size, tokens, config, card"),
    "convert": Command("models", "Convert", "official checkpoints -> vistok folders, and back"),
}

OVERVIEW = """usage: vistok COMMAND [OPTIONS]

Visual tokens: train image tokenizers on a folder of images, generate images from their tokens.

{commands}

A first tour, and then the same on your own images:
  vistok demo --out demo
  vistok train tokenizer --recipe fsq2d-emoji --data PHOTOS --out runs/tokenizer
  vistok train generator --recipe gpt-emoji --data PHOTOS --tokenizer runs/tokenizer --out runs/generator
  vistok generate --model runs/generator --num-images 16 --out samples

A model is a folder, a run folder of `vistok train`, a bundled name (vistok/emoji-flextok) or a hub id.
Images are a folder (flat, or one folder a class), emoji (the bundled set), or hf:ID (Hugging Face, needs vistok[data]).
`vistok COMMAND --help` explains a command; `vistok --version` prints the version.
"""

USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. arguments: without the program's name; sys.argv's by default."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except SystemExit as stop:  # tyro, after help or a wrong option
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        print(f"vistok: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if arguments[0] == "--version":
        from vistok import __version__

        print(f"vistok {__version__}")
        return 0
    name = next((name for name in (" ".join(arguments[:2]), arguments[0]) if name in COMMANDS), None)
    if name is None:
        return _no_such_command(arguments)
    import tyro

    command = COMMANDS[name]
    options_class = getattr(importlib.import_module(f"vistok.commands.{command.module}"), command.options)
    rest = arguments[len(name.split()) :]
    if {"-h", "--help"} & set(rest):
        print(inspect.getdoc(options_class), end="\n\n")  # tyro would join its lines, examples and all
    options = tyro.cli(
        options_class,
        args=rest,
        prog=f"vistok {name}",
        description="",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    with messages_on_stderr():
        return options.run() or 0


def _no_such_command(arguments: list[str]) -> int:
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group and set(arguments[1:]) <= {"-h", "--help"}:
        print("\n".join(["usage: vistok " + arguments[0] + " COMMAND [OPTIONS]", "", *_lines(group)]))
        return 0 if len(arguments) > 1 else 2
    typed = " ".join(arguments[: 2 if group else 1])
    near = difflib.get_close_matches(typed, [*COMMANDS, *(name.partition(" ")[0] for name in COMMANDS)], 1)
    hint = f"did you mean `vistok {near[0]}`?" if near else "`vistok --help` lists them"
    print(f"vistok: there is no command {typed!r}; {hint}", file=sys.stderr)
    return 2


def overview() -> str:
    """What `vistok --help` prints."""
    return OVERVIEW.format(commands="\n".join(_lines(COMMANDS)))


def _lines(names) -> list[str]:
    return [f"  {name:<17} {COMMANDS[name].summary}" for name in names]


class _AboveTheBar(logging.Handler):
    """Writes to stderr above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the block, messages of vistok from INFO on go to stderr; stdout is for results. diffusers only tells errors."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logger, handler = logging.getLogger("vistok"), _AboveTheBar()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
