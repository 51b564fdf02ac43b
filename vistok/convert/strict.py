"""Names and shapes of a checkpoint against those a model expects: everything fits, or the error lists what does not."""

from collections.abc import Callable, Mapping

from torch import Tensor

MAX_SHOWN = 20


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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


def shape_reader(shapes: Mapping[str, tuple[int, ...]], complaint: str) -> Callable[[str, int], tuple[int, ...]]:
    """A function (name, rank) -> shape for what a config is measured on. complaint: how its errors begin: "x.pt is no RAR checkpoint".

    The function raises ValueError: no such tensor, or one of another rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            raise ValueError(f"{complaint}: {name} must be there with {rank} axes, got {shapes.get(name)}")
        return shapes[name]

    return shape


def num_children(names: Mapping[str, object], prefix: str) -> int:
    """How many different parts follow `prefix` (with its dot) in the names: the depth of a stack of layers."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
