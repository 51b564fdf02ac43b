"""What a checkpoint holds: everything that the next step reads.

    model       trained parameters and persistent buffers of task.model
    extras      the same of the task's other trained parts (discriminator, heads), names with the part in front
    ema         averages of the model's trained parameters
    optimizer   AdamW's tensors as "moment/parameter name"
    meters      sums of what was logged since the last line of metrics.jsonl

There is no random state: every draw is a function of the seed and the number of the sample.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import TensorFiles
from .ema import Ema
from .task import TrainingTask


def snapshot(task: TrainingTask, optimizer: torch.optim.Optimizer, ema: Ema, meters: Mapping[str, Tensor]) -> TensorFiles:
    """The tensors of a run between two steps; they share memory with it."""
    return {
        "model": trained_tensors(task.model),
        "extras": _extras(task),
        "ema": ema.averages,
        "optimizer": _optimizer_tensors(task, optimizer),
        "meters": dict(meters),
    }


@torch.no_grad()
def restore(files: TensorFiles, task: TrainingTask, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
    """Put the tensors of a checkpoint into a freshly built run.

    Raises ValueError naming the tensors that are missing, unexpected or of another shape.
    """
    for name, own in (("model", trained_tensors(task.model)), ("extras", _extras(task)), ("ema", ema.averages)):
        _check(name, files[name], own)
        for key, tensor in files[name].items():
            own[key].copy_(tensor)
    _load_optimizer(task, optimizer, files["optimizer"])


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name; frozen parameters come from elsewhere and are left out."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    persistent = module.state_dict().keys()
    return parameters | {name: b for name, b in module.named_buffers() if name in persistent}


def trained_parts(task: TrainingTask) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by top-level part of the task (model, discriminator, ...); those of the task itself are under "task"."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0] if "." in name else "task", []).append(parameter)
    return parts


def _extras(task: TrainingTask) -> dict[str, Tensor]:
    parts = trained_parts(task).keys()
    return {
        name: tensor
        for name, tensor in trained_tensors(task).items()
        if not name.startswith("model.") and ("." not in name or name.partition(".")[0] in parts)
    }


def _parameter_names(task: TrainingTask, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the optimizer's own order of parameters."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(task: TrainingTask, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(task, optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{key}/{names[index]}": value for index, values in state.items() for key, value in values.items()}


def _load_optimizer(task: TrainingTask, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    numbers = {name: index for index, name in enumerate(_parameter_names(task, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, parameter = name.partition("/")
        if parameter not in numbers:
            raise ValueError(f"the checkpoint's optimizer has {parameter}, which this task does not train")
        state.setdefault(numbers[parameter], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check(file: str, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    faults = [f"missing {name}" for name in own if name not in stored]
    faults += [f"unexpected {name}" for name in stored if name not in own]
    faults += [
        f"{name} is {tuple(stored[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    if faults:
        raise ValueError(f"{file}.safetensors does not fit this task: " + "; ".join(faults[:8]) + (" ..." if len(faults) > 8 else ""))
