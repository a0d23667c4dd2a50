"""Which implementation normalises: one table of backends, chosen by device and by what may be done with a tensor now.

`reference` is the plain formula, differentiable to any order and by any transform; exporters, tracers and `torch.func`
always get it, compilers unless another is forced, and so they fuse or differentiate it themselves. `native` is made of
ATen kernels and the default on CPU. Force one by `use_backend(name)` or the environment variable NORMSWAP_BACKEND.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normswap.errors import LayerError
from normswap.layers.fused import Backend

_VARIABLE = "NORMSWAP_BACKEND"


def _native() -> Backend:
    from normswap.layers.native import NATIVE

    return NATIVE


# By name: how to get it. What needs a compiler of its own is imported at its first use.
_FUSED: Mapping[str, Callable[[], Backend]] = {"native": _native}
BACKENDS = ("reference", *_FUSED)
_BY_DEVICE = {"cpu": "native"}

_forced: str | None = None
_from_environment = os.environ.get(_VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every layer, in all threads, normalise by one backend inside the block.

    Args:
        name: `"reference"` or `"native"`. Where a fused backend cannot serve (under `torch.func`, in an export, on meta
            tensors) it is the reference all the same.

    Raises:
        LayerError: an unknown name.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _checked(name: str, asked_by: str) -> str:
    if name not in BACKENDS:
        raise LayerError(f"{asked_by}: expected one of {BACKENDS}, got {name!r}")
    return name


def fused_backend(x: Tensor) -> Backend | None:
    """Return the fused backend for x, which `runs_now`; None where the plain formula normalises.

    Raises:
        LayerError: the environment variable NORMSWAP_BACKEND names no backend.
    """
    name = _forced_name() or _BY_DEVICE.get(x.device.type, "reference")
    return None if name == "reference" else _FUSED[name]()


def compiles_operator() -> bool:
    """Say whether a graph is being compiled, and not exported, with a fused backend forced."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and _forced_name() not in (None, "reference")


def _forced_name() -> str | None:
    if _forced is None and _from_environment:
        return _checked(_from_environment, _VARIABLE)
    return _forced


def runs_now(x: Tensor) -> bool:
    """Say whether operators on x run at once on real values: x is not traced, transformed, fake or watched."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or x.is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def can_read(parameter: Tensor) -> bool:
    """Say whether the values of a parameter can be read at no cost, and would not be burnt into a trace."""
    return parameter.device.type == "cpu" and runs_now(parameter)
