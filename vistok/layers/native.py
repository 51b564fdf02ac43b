"""Products and norms of a few rows in C (`rows.c`): built once a machine by its compiler, and done without where there is none.

torch's own products of two rows read a matrix at half the speed or less. The library is built in a second, by `cc -O3 -march=native`, into
`~/.cache/vistok` (or `$XDG_CACHE_HOME/vistok`), and checked against torch before it is used. On anything but Linux, without a compiler, or
with VISTOK_NATIVE=0 in the environment there is none, and the callers take torch's products.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11", "-fPIC", "-shared")


enabled = os.environ.get("VISTOK_NATIVE") != "0"
"""Whether the library may be used; read often, so from the environment only once."""


def is_available() -> bool:
    """Whether the functions below can be called; the first call may build the library."""
    return enabled and _library() is not None


def linear_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x W^T [..., O], with int8 weights (scale W) x^T; no gradient.

    x: [..., K] float32. weight: [O, K] contiguous, float32, or int8 with scale [O] float32. bias: [O] float32.
    All on the CPU, and unchecked.
    """
    x, (O, K) = x.contiguous(), weight.shape  # noqa: E741
    y = x.new_empty(*x.shape[:-1], O)
    if y.numel():
        scale, bias = (None if part is None else part.data_ptr() for part in (scale, bias))
        _library().linear_rows(weight.data_ptr(), x.data_ptr(), scale, bias, y.data_ptr(), y.numel() // O, K, O, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) weight; no gradient. x: [..., D], weight: [D], both float32 on the CPU, and unchecked."""
    x, D = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    _library().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // D, D, eps)
    return y


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
        library.linear_rows.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int]
        library.rms_norm.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_float]
        library.use_threads.argtypes = [ctypes.c_void_p] * 3
        for function in (library.linear_rows, library.rms_norm, library.use_threads):
            function.restype = None
        library.use_threads(*_threads())
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError):  # RuntimeError: no home
        return None
    return library if _is_right(library) else None


def _build(compiler: str) -> Path:
    """Path of the library for this source, processor and compiler. Raises OSError, SubprocessError: it cannot be built or kept."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features", "model name"))]
    key = hashlib.sha256("\n".join([SOURCE.read_text(encoding="utf-8"), *_FLAGS, os.path.realpath(compiler), *sorted(set(cpu))]).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vistok"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        home = Path(tempfile.mkdtemp(prefix="vistok-"))
    owner, mode = home.stat().st_uid, home.stat().st_mode
    if owner != os.getuid() or mode & 0o002 or not os.access(home, os.W_OK):  # what anybody can write is not run
        home = Path(tempfile.mkdtemp(prefix="vistok-"))
    path = home / f"rows-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            built = Path(scratch) / path.name
            subprocess.run([compiler, *_FLAGS, "-o", built, SOURCE, "-lm"], check=True, capture_output=True, timeout=60)
            os.replace(built, path)  # at once: another process may be loading it
    return path


def _threads() -> list[int | None]:
    """Addresses of three functions of the OpenMP runtime that torch has loaded, or None: a runtime of our own would fight for cores."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for path in sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names]
    return [None] * len(names)


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch does: products, float and int8, of numbers that are exact in both, and a norm."""
    weight, x = torch.arange(9 * 21).view(9, 21) % 7 - 3.0, torch.arange(3 * 21).view(3, 21) % 5 - 2.0
    y, norm, codes, ones = torch.empty(3, 9), torch.empty_like(x), weight.to(torch.int8), torch.ones(21)
    library.linear_rows(weight.data_ptr(), x.data_ptr(), None, None, y.data_ptr(), 3, 21, 9, 1)
    is_right = torch.equal(y, x @ weight.T)
    y.zero_()
    library.linear_rows(codes.data_ptr(), x.data_ptr(), ones.data_ptr(), None, y.data_ptr(), 3, 21, 9, 1)
    library.rms_norm(x.data_ptr(), ones.data_ptr(), norm.data_ptr(), 3, 21, 1e-6)
    return is_right and torch.equal(y, x @ weight.T) and torch.allclose(norm, x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt())
