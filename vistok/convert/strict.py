"""Names and shapes of a checkpoint against those a model expects: everything fits, or the error lists what does not."""

from collections.abc import Mapping

MAX_SHOWN = 20


def check_shapes(where: str, kind: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError with every missing, unexpected or mis-shaped tensor. kind: what the checkpoint should be, for the message."""
    problems = [f"missing {name} {wanted[name]}" for name in sorted(set(wanted) - set(found))]
    problems += [f"unexpected {name} {found[name]}" for name in sorted(set(found) - set(wanted))]
    for name in sorted(set(wanted) & set(found)):
        if wanted[name] != found[name]:
            problems.append(f"{name} has shape {found[name]}, expected {wanted[name]}")
    if problems:
        rest = f"\n  ... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise ValueError(f"{where} does not fit {kind}:\n  " + "\n  ".join(problems[:MAX_SHOWN]) + rest)
