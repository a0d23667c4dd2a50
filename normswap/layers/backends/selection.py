"""The choice of the backend, by the device and by whether operators on a tensor run eagerly.

- `reference`: the plain formula, differentiable to any order and by any transform. Exporters, tracers and `torch.func`
  always use it.
- `native`: C or ATen kernels. The default on CPU, also in compiled graphs.
- `triton`: the default on CUDA for float32 and half precision, if Triton can be imported and supports the device.
  Compilers use the plain formula there, and fuse it.

`use_backend(name)` or the environment variable NORMSWAP_BACKEND selects one of them.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap.errors import LayerError
from normswap.layers.backends.cpu import NATIVE
from normswap.layers.backends.interface import Backend
from normswap.layers.gating import Branch

_ENVIRONMENT_VARIABLE = "NORMSWAP_BACKEND"


@cache
def _load_triton() -> Backend:
    if not _has_triton():
        raise LayerError("the backend 'triton' needs Triton, which cannot be imported: pip install triton")
    from normswap.layers.backends.triton_launch import TRITON

    return TRITON


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _can_compile_for(device: torch.device) -> bool:
    """Return whether Triton supports the device, that is compute capability 7.0 or higher."""
    return torch.cuda.get_device_capability(device) >= (7, 0)


# Functions that return a backend; Triton is imported at its first use.
_FUSED_BACKENDS: Mapping[str, Callable[[], Backend]] = {"native": lambda: NATIVE, "triton": _load_triton}
BACKENDS = ("reference", *_FUSED_BACKENDS)
_DEFAULT_BACKENDS = {"cpu": "native", "cuda": "triton"}

_forced: str | None = None
_from_environment = os.environ.get(_ENVIRONMENT_VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the backend of every layer, in all threads, inside a `with` block.

    Args:
        name: `"reference"`, `"native"` or `"triton"`. A call that a fused backend does not support (under `torch.func`,
            in an export, on meta tensors; `"triton"` in float64) uses `"reference"`.

    Returns:
        A context manager, which restores the selection at the end of the block.

    Raises:
        LayerError: the name is unknown. With `"triton"`, layers raise it if Triton cannot be imported or a tensor is
            not on a CUDA device.

    Examples:
        >>> import torch, normswap
        >>> layer, x = normswap.SwitchNorm2d(3), torch.randn(8, 3, 16, 16)
        >>> y = layer(x)
        >>> with normswap.use_backend("reference"):
        ...     torch.testing.assert_close(layer(x), y)
    """
    global _forced
    before, _forced = _forced, _check_backend_name(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


use_backend.__module__ = "normswap"


def _check_backend_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise LayerError(f"{source}: expected one of {BACKENDS}, got {name!r}")
    return name


def fused_backend(x: Tensor) -> Backend | None:
    """Return the fused backend for x; None for the plain formula. `is_eager(x)` must be true.

    Raises:
        LayerError: NORMSWAP_BACKEND is not the name of a backend, or the selected backend cannot run.
    """
    forced = _forced_name()
    name = forced or _DEFAULT_BACKENDS.get(x.device.type, "reference")
    if name == "triton":
        return _triton_backend_for(x, forced is not None)
    return None if name == "reference" else _FUSED_BACKENDS[name]()


def needs_custom_op(x: Tensor) -> bool:
    """Return whether a compiler traces x, without export or transform, and the graph should call a fused backend."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or _is_transformed(x):
        return False
    return (_forced_name() or ("native" if x.device.type == "cpu" else "reference")) != "reference"


def _forced_name() -> str | None:
    if _forced is None and _from_environment:
        return _check_backend_name(_from_environment, _ENVIRONMENT_VARIABLE)
    return _forced


def _triton_backend_for(x: Tensor, is_requested: bool) -> Backend | None:
    if x.dtype == torch.float64 or not (is_requested or (_has_triton() and _can_compile_for(x.device))):
        return None
    backend = _load_triton()
    if x.device.type != "cuda" and not is_interpreted():
        raise LayerError(
            f"the backend 'triton' runs on CUDA devices, got a tensor on {x.device}: move model and input to one, use "
            "the backend 'native', or set TRITON_INTERPRET=1 before Triton is imported"
        )
    return backend


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, which then run on CPU tensors."""
    from normswap.layers.backends.triton_kernels import INTERPRETED

    return INTERPRETED


def project_points(points: Sequence[Tensor], branches: Sequence[Branch]) -> bool:
    """Project simplex points (K,) of a layer in place by a kernel; return False if the backend has none."""
    if not is_eager(points[0]):
        return False
    backend = fused_backend(points[0])
    if backend is None or backend.name != "triton":
        return False
    from normswap.layers.backends.triton_launch import project_points

    project_points(points, branches)
    return True


def is_eager(x: Tensor) -> bool:
    """Return whether operators on x run at once on real values: x is not traced, transformed, fake or dispatched."""
    return not (
        torch.compiler.is_compiling()
        or _is_transformed(x)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
    )


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace records. Not asked while compiling, because the question breaks the graph."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def _is_transformed(x: Tensor) -> bool:
    """Return whether a tensor subclass, `torch.func` or forward-mode derivatives change the operators on x."""
    return (
        type(x) not in _PLAIN_TENSOR_TYPES
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def can_read_values(parameter: Tensor) -> bool:
    """Return whether reading a parameter needs no device synchronization and puts no constant into a trace."""
    return parameter.is_cpu and is_eager(parameter)
