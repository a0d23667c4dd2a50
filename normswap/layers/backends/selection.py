"""Which implementation normalises: one table of backends, chosen by device and by what may be done with a tensor now.

`reference` is the plain formula, differentiable to any order and by any transform; exporters, tracers and `torch.func`
always get it. `native` is made of ATen kernels and the default on CPU, in compiled graphs too. `triton` is the default
on CUDA, for float32 and half precision, where Triton can be imported and compiles for the device; compilers get the
plain formula there, and fuse it. Force one by `use_backend(name)` or the environment variable NORMSWAP_BACKEND.
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
        raise LayerError("the backend 'triton' needs Triton, which cannot be imported here: pip install triton")
    from normswap.layers.backends.triton_launch import TRITON

    return TRITON


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _can_compile_for(device: torch.device) -> bool:
    """Triton compiles for devices from compute capability 7 on."""
    return torch.cuda.get_device_capability(device) >= (7, 0)


# By name: how to get it. What needs a compiler of its own is imported at its first use.
_FUSED_BACKENDS: Mapping[str, Callable[[], Backend]] = {"native": lambda: NATIVE, "triton": _load_triton}
BACKENDS = ("reference", *_FUSED_BACKENDS)
_DEFAULT_BACKENDS = {"cpu": "native", "cuda": "triton"}

_forced: str | None = None
_from_environment = os.environ.get(_ENVIRONMENT_VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every layer, in all threads, normalise by one backend inside the block.

    Args:
        name: `"reference"`, `"native"` or `"triton"`. Where a fused backend cannot serve (under `torch.func`, in an
            export, on meta tensors; `"triton"` in float64) it is the reference all the same.

    Raises:
        LayerError: an unknown name. Layers raise one where `"triton"` was asked for and Triton cannot be imported or
            a tensor is not on a CUDA device.
    """
    global _forced
    before, _forced = _forced, _check_backend_name(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _check_backend_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise LayerError(f"{source}: expected one of {BACKENDS}, got {name!r}")
    return name


def fused_backend(x: Tensor) -> Backend | None:
    """Return the fused backend for x, which `is_eager`; None where the plain formula normalises.

    Raises:
        LayerError: the environment variable NORMSWAP_BACKEND names no backend, or the backend asked for cannot run
            here.
    """
    forced = _forced_name()
    name = forced or _DEFAULT_BACKENDS.get(x.device.type, "reference")
    if name == "triton":
        return _triton_backend_for(x, forced is not None)
    return None if name == "reference" else _FUSED_BACKENDS[name]()


def needs_custom_op(x: Tensor) -> bool:
    """Say whether a graph is being compiled, neither exported nor transformed, that calls a fused backend for x."""
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
            f"the backend 'triton' runs on CUDA devices, got a tensor on {x.device}: move model and input to one, ask "
            "for 'native', or set TRITON_INTERPRET=1 before Triton is imported"
        )
    return backend


def is_interpreted() -> bool:
    """Say whether Triton interprets its kernels here, so that they run on CPU tensors."""
    from normswap.layers.backends.triton_kernels import INTERPRETED

    return INTERPRETED


def project_points(points: Sequence[Tensor], branches: Sequence[Branch]) -> bool:
    """Put simplex points (K,) of a layer back on the simplex by a kernel, where the backend has one; say whether."""
    if not is_eager(points[0]):
        return False
    backend = fused_backend(points[0])
    if backend is None or backend.name != "triton":
        return False
    from normswap.layers.backends.triton_launch import project_points

    project_points(points, branches)
    return True


def is_eager(x: Tensor) -> bool:
    """Say whether operators on x run at once on real values: x is not traced, transformed, fake or watched."""
    return not (
        torch.compiler.is_compiling()
        or _is_transformed(x)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
    )


def is_jit_tracing() -> bool:
    """Say whether torch.jit.trace records; a compiler, which would break its graph at the question, never does."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def _is_transformed(x: Tensor) -> bool:
    """Whether operators on x do more than their names say, which an operator of ours has no rule for."""
    return (
        type(x) not in _PLAIN_TENSOR_TYPES
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def can_read_values(parameter: Tensor) -> bool:
    """Say whether the values of a parameter can be read at no cost, and would not be burnt into a trace."""
    return parameter.is_cpu and is_eager(parameter)
