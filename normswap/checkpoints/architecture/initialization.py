"""Build a network without the random numbers of its initialization: a file replaces its parameters right after."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Some functions of `torch.nn.init` come as such, and others as the method that they call.
_RANDOM = {
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.trunc_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.orthogonal_,
    Tensor.uniform_,
    Tensor.normal_,
}


class WithoutInitialization(TorchFunctionMode):
    """Leave parameters as allocated where a function would fill them with random numbers.

    Buffers and other tensors get their values, because a file may lack them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)
