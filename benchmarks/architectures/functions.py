"""Measure if two architectures with the same tensors compute the same function.

Both get the same random parameters and running statistics and run in float64 at several image sizes, in evaluation
mode and in training mode.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.records import built

# Strides divide the first two sizes and not the third. Equality needs two sizes at which both models run.
SIZES = ((128, 128), (160, 192), (97, 131))
_CLASSES = 7
_LIMIT = 1e-9


def difference(first: str, second: str, *, sizes: Sequence[tuple[int, int]] = SIZES) -> str:
    """Return the first difference between the outputs of two architectures with the same tensors, or "" if equal.

    Args:
        sizes: heights and widths of the inputs. At each size both models run or both fail; they must run at two sizes
            (or at the only one).
    """
    torch.manual_seed(0)
    one, other = (_with_classes(name).double() for name in (first, second))
    _scramble(one)
    other.load_state_dict(one.state_dict(), strict=True)
    ran = 0
    for size in sizes:
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for training in (False, True):
            results = [_run(model, x, training=training) for model in (one, other)]
            found = _compare(*results)
            if found:
                return f"{'x'.join(map(str, size))} in {'training' if training else 'evaluation'}: {found}"
            ran += not isinstance(results[0], str) and not training
    return "" if ran >= min(2, len(sizes)) else f"ran at {ran} of {len(sizes)} sizes"


def unsaved_difference(first: str, second: str) -> str:
    """Return the first buffer outside the state dict that differs between two architectures, or ""."""
    found = [_unsaved(_with_classes(name)) for name in (first, second)]
    for name in found[0].keys() | found[1].keys():
        one, other = found[0].get(name), found[1].get(name)
        if one is None or other is None or not torch.equal(one, other):
            return name
    return ""


def _with_classes(name: str) -> nn.Module:
    try:
        return built(name, device="cpu", num_classes=_CLASSES)
    except Exception:  # noqa: BLE001 - builders raise different errors for unknown arguments
        return built(name, device="cpu")


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _scramble(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
    for parameter in model.parameters():
        # Scales initialized with 0 or 1e-6 would hide a whole branch.
        if parameter.dim() <= 1 or parameter.abs().max() < 1e-2:
            parameter.data.add_(torch.empty_like(parameter).uniform_(0.1, 0.5))


def _run(model: nn.Module, x: Tensor, *, training: bool) -> list[Tensor] | str:
    """Return the outputs and, in training, buffers and gradients; or the name of the error."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(2)
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(training):
            warnings.simplefilter("ignore")
            outputs = _flat(model(x))
        if training:
            sum(o.square().sum() for o in outputs).backward()
            outputs += [b for _, b in sorted(model.state_dict().items()) if b.is_floating_point()]
            outputs += [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    except Exception as error:  # noqa: BLE001 - some models raise at some sizes
        return type(error).__name__
    return outputs


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, list | tuple) else []


def _compare(one: list[Tensor] | str, other: list[Tensor] | str) -> str:
    if isinstance(one, str) or isinstance(other, str):
        return "" if isinstance(one, str) and isinstance(other, str) else "one of them fails"
    if [t.shape for t in one] != [t.shape for t in other]:
        return "outputs differ in shape"
    a, b = (torch.cat([t.detach().double().flatten() for t in side]) for side in (one, other))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return "not finite"
    error = float((a - b).norm() / a.norm().clamp(min=1e-300))
    return f"relative L2 {error:.1e}" if error > _LIMIT else ""
