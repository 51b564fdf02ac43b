"""Linear layers laid out for decoding: a step of a few rows costs what reading its weights costs, so how they lie decides its speed.

    one row             the transposed matrix, read by a vector product; with more than two threads as below, since that product uses one
    2 to 16 rows        the blocks of oneDNN's own kernel, which serves all rows in one reading, with all threads; a plain product reads at
                        half the speed, with one thread
    int8 (`to_int8`)    a quarter of the bytes: w = s q, q in -127 ... 127, s one number an output; about 0.4 % of a row's largest weight

With int8 the inputs keep 14 bits, as two digits of 7 that go through one product of integers:

    x = a/63 (h + l/126),  a = max |x| of the row,  h and l whole numbers in -63 ... 63          W x = s a/63 (Q h + Q l / 126)

Sums of integers are exact, so a row's result does not depend on the rows beside it. CPU only; on a GPU nothing here does anything.

B rows, I inputs, O outputs.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 16  # with more, the plain product is as fast
SMALLEST = 1 << 14  # weights; smaller matrices gain nothing
_DIGIT = 63


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """While it lasts, the model's float32 linear layers on the CPU read a second, packed copy of their weights.

    rows: of the passes to come, which decides the layout; passes with other numbers of rows are right too. Results differ from the plain
    ones by rounding. Nothing is packed for more than 16 rows, with gradients on, in a compiled model, or where the copy would take a
    quarter of all memory. Packing costs a few steps' time and is done anew each time, so that weights may change in between.
    """
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")  # its weights are laid out already
    skipped = rows > MAX_ROWS or torch.is_grad_enabled() or is_compiled
    layers = [] if skipped else [part for part in model.modules() if _is_packable(part)]
    if sum(layer.weight.nbytes for layer in layers) > _total_memory() / 4:
        layers = []
    for layer in layers:
        layer.forward = _transposed(layer) if rows == 1 and torch.get_num_threads() <= 2 else _blocked(layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been first


def _is_packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module) or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _total_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return float(1 << 32)


def _transposed(layer: nn.Linear):
    weight, bias = layer.weight.detach().t().contiguous(), layer.bias

    def forward(x: Tensor) -> Tensor:
        return torch.matmul(x, weight) if bias is None else torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    return forward


def _blocked(layer: nn.Linear, rows: int):
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows), layer.bias
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        if not x.numel() or x.dtype != torch.float32:  # the kernel takes no empty input, and none of autocast's
            return F.linear(x, layer.weight, bias)
        return product(x, weight, bias, "none", [], "")

    return forward


# -- int8 ---------------------------------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and 14-bit inputs, see the file's head. For generation only: it has no gradient and is not saved.

    Raises ValueError: weights that are not float32 on the CPU, or a torch that was built without fbgemm's kernels.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"int8 decoding needs float32 weights on the CPU, got {weight.dtype} on {weight.device}")
        if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
            raise ValueError("this torch has no int8 kernels for this processor (fbgemm)")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        # two inputs more, of weight 0, hold the ends of the digits' range, so that the kernel's own scale is 1
        padded = F.pad(weight, (0, 2)).contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch moves quantized tensors to another package
            quantized = torch.quantize_per_channel(padded, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._ends = F.pad(torch.tensor([[-_DIGIT - 1.0, float(_DIGIT)]]), (self.in_features, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., I], returns [..., O] float32; no gradient."""
        rows = x.detach().reshape(-1, self.in_features).float()
        B = len(rows)
        unit = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(_DIGIT)
        rows = rows / unit
        digits = self._ends.expand(2 * B, -1).clone()
        high = torch.round(rows, out=digits[:B, :-2])
        torch.sub(rows, high, out=digits[B:, :-2]).mul_(2 * _DIGIT).round_()
        # 7 bits: 8 would overflow the 16-bit sums of processors without VNNI
        made = torch.ops.quantized.linear_dynamic(digits, self._packed, True)
        out = torch.add(made[:B], made[B:], alpha=1 / (2 * _DIGIT)).mul_(unit)
        return (out if self.bias is None else out + self.bias).unflatten(0, x.shape[:-1])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(f"{prefix}: int8 layers cannot be saved; save before to_int8 (save_pretrained(dtype=torch.int8) is small on disk)")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def to_int8(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model by int8 ones, in place, for faster generation on a CPU; returns it, in eval mode.

    A quarter of the bytes is read a step and held in memory. Matrices of less than 16,384 weights stay as they are. What it costs in
    logits is measured by `eval/bench/generators.py`. The model cannot be trained or saved any more: load it again for that.
    Raises ValueError: as Int8Linear.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, Int8Linear(child))
    return model.eval()
