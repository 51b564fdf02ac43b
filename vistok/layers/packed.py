"""Linear layers laid out for decoding: a step of a few rows costs what reading its weights costs, so how they are read decides its speed.

    1 to 16 rows        our own product, which reads the weights where they lie, once for all rows, as fast as memory gives them (`native`)
    int8 (`to_int8`)    the same with a quarter of the bytes: w = s q, q in -127 ... 127, s one number an output

Where that product cannot be built (no Linux, no compiler), weights are packed into a second copy for torch's own kernels:

    one row             the transposed matrix, read by a vector product; with more than two threads as below, since that product uses one
    2 to 16 rows        the blocks of oneDNN's kernel, which serves all rows in one reading
    int8                fbgemm's product of integers; inputs keep 14 bits, as two digits of 7:

    x = a/63 (h + l/126),  a = max |x| of the row,  h and l whole numbers in -63 ... 63          W x = s a/63 (Q h + Q l / 126)

Sums of integers are exact, and the order of our product's sums is the same for 1 to 16 rows: so a row's result does not depend on the rows
beside it. CPU only; on a GPU nothing here does anything.

B rows, I inputs, O outputs.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers import native
from vistok.layers.pattention import Pattention

MAX_ROWS = 16  # with more, the plain product is as fast
SMALLEST = 1 << 14  # weights; smaller matrices gain nothing
_DIGIT = 63


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """While it lasts, the model's float32 linear and parameter-token layers on the CPU take the products above.

    rows: of the passes to come, which decides the layout; passes with other numbers of rows are right too. Results differ from the plain
    ones by rounding. Nothing changes for more than 16 rows, with gradients on, in a compiled model, or where copies would take a quarter of
    all memory. Copies cost a few steps' time and are made anew each time, so that weights may change in between.
    """
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")  # its weights are laid out already
    skipped = rows > MAX_ROWS or torch.is_grad_enabled() or is_compiled
    layers = [] if skipped else [part for part in model.modules() if _is_packable(part)]
    if sum(_copied_bytes(layer) for layer in layers) > _total_memory() / 4:
        layers = []
    for layer in layers:
        layer.forward = _linear(layer, rows) if type(layer) is nn.Linear else _pattention(layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been first


def _is_packable(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Pattention) or "forward" in vars(module):
        return False
    if not native.is_available() and not torch.backends.mkldnn.is_available():
        return False
    weights = [part for part in module.parameters() if part.ndim == 2]
    is_plain = all(part.device.type == "cpu" and part.dtype == torch.float32 and part.is_contiguous() for part in module.parameters())
    return is_plain and min((weight.numel() for weight in weights), default=0) >= SMALLEST


def _copied_bytes(layer: nn.Module) -> int:
    if type(layer) is Pattention:
        return layer.values.nbytes + (0 if native.is_available() else layer.keys.nbytes)
    return 0 if native.is_available() else layer.weight.nbytes


def _total_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return float(1 << 32)


def _linear(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    return _product(layer.weight.detach(), layer.bias, rows)


def _pattention(layer: Pattention, rows: int) -> Callable[..., Tensor]:
    keys, values = _product(layer.keys.detach(), None, rows), _product(layer.values.detach().t().contiguous(), None, rows)

    def forward(x: Tensor, *, mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        if mask is not None or tokens is not None:
            return Pattention.forward(layer, x, mask=mask, tokens=tokens)
        return values(layer.weigh(keys(x)))

    return forward


def _product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """x [..., I] to [..., O], plain where a layout does not take x."""
    if native.is_available():
        return _native(weight, bias)
    return _transposed(weight, bias) if rows == 1 and torch.get_num_threads() <= 2 else _blocked(weight, bias, rows)


def _native(weight: Tensor, bias: Tensor | None):
    I = weight.shape[1]  # noqa: E741

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.shape[-1] != I or x.numel() > MAX_ROWS * I or not x.is_cpu:
            return F.linear(x, weight, bias)
        return native.linear_rows(x, weight, bias=bias)

    return forward


def _transposed(weight: Tensor, bias: Tensor | None):
    turned = weight.t().contiguous()

    def forward(x: Tensor) -> Tensor:
        return torch.matmul(x, turned) if bias is None else torch.addmm(bias, x.flatten(0, -2), turned).unflatten(0, x.shape[:-1])

    return forward


def _blocked(weight: Tensor, bias: Tensor | None, rows: int):
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        if not x.numel() or x.dtype != torch.float32:  # the kernel takes no empty input, and none of autocast's
            return F.linear(x, weight, bias)
        return product(x, blocks, bias, "none", [], "")

    return forward


# -- int8 ---------------------------------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, see the file's head. For generation only: it has no gradient and is not saved.

    weight: [O, I]. bias: [O] or None. scale, quantized: s [O] and q [O, I], the weights that count.
    Raises ValueError: weights that are not float32 on the CPU, or neither our product nor fbgemm's can be had here.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        weight = weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"int8 decoding needs float32 weights on the CPU, got {weight.dtype} on {weight.device}")
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # no buffers: another device or type would be wrong for them
        self.scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        self.quantized = (weight / self.scale[:, None]).round_().to(torch.int8)
        self._packed = None if native.is_available() else _pack_int8(self.quantized, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., I], returns [..., O] float32; no gradient. Raises ValueError: x is not on the CPU, or has another width."""
        if x.device.type != "cpu" or x.shape[-1] != self.in_features:
            raise ValueError(f"this int8 layer takes [..., {self.in_features}] on the CPU, got {tuple(x.shape)} on {x.device}")
        rows = x.detach().reshape(-1, self.in_features).float()
        if self._packed is not None:
            out = self._by_digits(rows)
        elif len(rows) <= MAX_ROWS and not torch.compiler.is_compiling():
            out = native.linear_rows(rows, self.quantized, self.scale)
        else:  # as fast as the plain product, but for making the weights
            out = F.linear(rows, self.quantized.float()).mul_(self.scale)
        return (out if self.bias is None else out + self.bias).unflatten(0, x.shape[:-1])

    def _by_digits(self, rows: Tensor) -> Tensor:
        B = len(rows)
        unit = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(_DIGIT)
        rows = rows / unit
        # two inputs more, of weight 0, hold the ends of the digits' range, so that the kernel's own scale is 1
        ends = F.pad(torch.tensor([[-_DIGIT - 1.0, float(_DIGIT)]]), (self.in_features, 0))
        digits = ends.repeat(2 * B, 1)
        high = torch.round(rows, out=digits[:B, :-2])
        torch.sub(rows, high, out=digits[B:, :-2]).mul_(2 * _DIGIT).round_()
        # 7 bits: 8 would overflow the 16-bit sums of processors without VNNI
        made = torch.ops.quantized.linear_dynamic(digits, self._packed, True)
        return torch.add(made[:B], made[B:], alpha=1 / (2 * _DIGIT)).mul_(unit)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(f"{prefix}: int8 layers cannot be saved; save before to_int8 (save_pretrained(dtype=torch.int8) is small on disk)")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Pattention(nn.Module):
    """A Pattention of int8 keys and values (those with a scale an output); no mask and no choice of tokens."""

    def __init__(self, layer: Pattention):
        super().__init__()
        self.keys, self.values = Int8Linear(layer.keys), Int8Linear(layer.values.detach().t().contiguous())
        layer.keys = layer.values = None  # what is left of it turns scores into weights
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., I], returns [..., O] float32; no gradient."""
        return self.values(self.layer.weigh(self.keys(x)))


def _pack_int8(quantized: Tensor, scale: Tensor):
    """For fbgemm. Raises ValueError: a torch that was built without it."""
    if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
        raise ValueError("int8 decoding needs a C compiler (on Linux), or a torch with int8 kernels for this processor (fbgemm)")
    padded = F.pad(quantized, (0, 2)).float() * scale[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch moves quantized tensors to another package
        packable = torch.quantize_per_channel(padded, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(packable, None)


def to_int8(model: nn.Module) -> nn.Module:
    """Replace linear and parameter-token layers by int8 ones, in place, for faster generation on a CPU; returns the model, in eval mode.

    A quarter of the bytes is read a step and held in memory. Matrices of less than 16,384 weights stay as they are. What it costs in
    logits is measured by `eval/bench/generators.py`. The model cannot be trained or saved any more: load it again for that.
    Raises ValueError: as Int8Linear.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, Int8Linear(child.weight, child.bias))
            elif type(child) is Pattention and min(child.keys.numel(), child.values.numel()) >= SMALLEST:
                setattr(parent, name, Int8Pattention(child))
    return model.eval()
