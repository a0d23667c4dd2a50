"""Which modules may be norms although nothing is known of their class: by ancestry, by what they keep, by their name.

A candidate is never converted: it is listed as a skip, so that no norm is passed over in silence.
"""

import inspect
import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

# Norms that torch defines, most derived first, with their kind.
TORCH_KINDS: dict[type, str] = {
    _BatchNorm: "bn",
    _InstanceNorm: "in",
    nn.GroupNorm: "gn",
    nn.LayerNorm: "ln",
    nn.RMSNorm: "rms",
}

_STATISTIC_PATTERN = r"(mean|var|variance|cov|covar|covariance|std|wm|whitening|sqrt|sq)"
# Statistics that a class keeps of its batches, by the names that libraries give them: `ra_mean`, `moving_variance`.
_RUNNING_STATISTIC_NAME = re.compile(
    rf"(^|_)(running|moving|ra|ema|avg|population|pop|global)_(\w+_)?{_STATISTIC_PATTERN}(_|\d|$)"
)
_STATISTIC_NAME = re.compile(rf"^{_STATISTIC_PATTERN}$")
_EXCEPTIONS = r"(?!Free|al(?![a-z]))"  # norm-free, normal
_NAMED_NORM = re.compile(rf"[Nn]orm{_EXCEPTIONS}|(?<![A-Z])BN(?!N)|[a-z]BN(?!N)|ABN")
_NAMED_BATCH_NORM = re.compile(r"[Bb]atch_?(Re)?[Nn]orm|BN(?!N)")


def looks_like_norm(module: nn.Module) -> bool:
    """Say whether `module` may be a norm: by its torch ancestry, its running statistics, or its name and tensors."""
    if inspect.getattr_static(type(module), "forward") is nn.Module.forward:  # it only holds tensors for another
        return False
    if isinstance(module, tuple(TORCH_KINDS)):
        return True
    if any(looks_like_norm(child) for child in module.children()):
        return bool({"running_mean", "running_var"} & {*module._buffers.keys()})
    has_norm_name = re.search(rf"Norm{_EXCEPTIONS}", type(module).__name__) is not None
    tensors = _tensors(module).values()
    vectors = all(not is_lazy(t) and max(t.shape, default=1) == t.numel() for t in tensors)
    return bool(
        running_statistics_names(module)
        or (has_norm_name and (module._parameters or module._buffers))
        or (vectors and tensors and _NAMED_NORM.search(type(module).__name__))
    )


def running_statistics_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors that are running statistics of batches, as far as names tell.

    A plain `mean` or `std` is one only in a class that is called a norm: others are constants of a preprocessing.
    """
    has_norm_name = _NAMED_NORM.search(type(module).__name__) is not None
    fixed = [
        name
        for name, t in _tensors(module).items()
        if not t.requires_grad and not is_lazy(t) and _is_floating_or_complex(t)
    ]
    return tuple(
        name
        for name in fixed
        if _RUNNING_STATISTIC_NAME.search(name) or (has_norm_name and _STATISTIC_NAME.match(name))
    )


def has_batch_norm_name(cls: type) -> bool:
    """Say whether the name of a class says that it normalizes by batches."""
    return _NAMED_BATCH_NORM.search(cls.__name__) is not None


def _is_floating_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named_tensors = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in named_tensors if tensor is not None}
