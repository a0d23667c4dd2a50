"""A forward run as it is written, with its batch_norm calls led to the gates: for calls that no graph was made for.

Optional arguments that decide what a forward does leave it as many forms as they have values. The graphs stand for the
defaults; for anything else, such as the parameters of a fast learner, the code itself runs, and its batch_norm calls
meet the sites in their order. Where their number is another one, nothing tells which is which, and that is an error.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from normswap.errors import LayerError
from normswap.surgery.calls import NORM_CALLS, all_results

_CALLS_OF_MODULES = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


class _Redirection(TorchFunctionMode):
    """Leads the batch_norm calls of one forward, those of its helper functions included, to the gates in order."""

    def __init__(self, gates: list[nn.Module | None]) -> None:
        super().__init__()
        self.gates = gates
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = NORM_CALLS.get(func)
        if call is None or call.kind != "bn" or _in_another_module():
            return func(*args, **kwargs)
        self.count += 1
        gate = self.gates[self.count - 1] if self.count <= len(self.gates) else None
        if gate is None:
            return func(*args, **kwargs)
        arguments = dict(zip(call.parameters, args, strict=False)) | kwargs | dict(call.settled)
        arguments.pop("cudnn_enabled", None)
        y = gate(arguments.pop("input"), **arguments)
        return y if call.results is None else all_results(call, y, arguments)


def run_as_written(forward: Callable[..., Any], gates: list[nn.Module | None], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` with its batch_norm calls led to `gates`, one per call in order, None for a call that stays.

    Raises:
        LayerError: it calls batch_norm, but another number of times.
    """
    with _Redirection(gates) as redirection:
        result = forward(*args, **kwargs)
    if redirection.count not in (0, len(gates)):
        raise LayerError(
            f"{forward.__qualname__} was rewritten for {len(gates)} batch_norm calls, and with these arguments makes "
            f"{redirection.count}: move each call into a module of its own, then convert again"
        )
    return result


def _in_another_module() -> bool:
    """Say whether a module that the forward called is running, by the frames between the two."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not run_as_written.__code__:
        if frame.f_code in _CALLS_OF_MODULES:
            return True
        frame = frame.f_back
    return False
