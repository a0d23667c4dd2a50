"""Checks of arguments: models and inputs, with messages for common mistakes that say what to pass instead."""

import os
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import UnionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.errors import ArgumentError, ModelError
from normswap.layers.in_place import has_frozen_buffers


def require_module(value: object, argument: str = "model") -> nn.Module:
    """Return `value` if it is a module.

    Args:
        argument: the name of the argument, for the message.

    Raises:
        ArgumentError: it is something else, with what to pass instead.
    """
    if isinstance(value, nn.Module):
        return value
    description = next(
        (describe(value) for matches, describe in _MODEL_MISTAKES if matches(value)), f"got {_type_with_article(value)}"
    )
    raise ArgumentError(f"{argument}: expected a torch.nn.Module, {description}")


def refuse_private(model: nn.Module, problem: str) -> None:
    """Refuse what samples of a batch or of a data set would share, in a model of differentially private training.

    Args:
        model: prepared by `normswap.privacy.prepare`, or with the per-sample gradients of Opacus, or neither.
        problem: what the call would do, for the message.

    Raises:
        ModelError: the model trains with differential privacy.
    """
    is_private = any(map(has_frozen_buffers, model.modules())) or has_sample_gradients(model)
    if is_private:
        raise ModelError(
            f"{problem}, which epsilon does not cover: the model is prepared for differential privacy. Do it on public "
            "data before normswap.privacy.prepare; if the data is public, call normswap.privacy.restore(model) first"
        )


def has_sample_gradients(model: nn.Module) -> bool:
    """Return whether Opacus records per-sample gradients of the model's parameters."""
    return any(hasattr(parameter, "grad_sample") for parameter in model.parameters())


def require_type(value: object, kinds: type | UnionType | tuple[type, ...], argument: str, expected: str) -> None:
    """Refuse an argument of a wrong type.

    Args:
        kinds: the types that are accepted.
        argument: the name of the argument, for the message.
        expected: in words, what is expected and how to get it.

    Raises:
        ArgumentError: it is of another type.
    """
    if not isinstance(value, kinds):
        raise ArgumentError(f"{argument}: expected {expected}, got {_type_with_article(value)}")


def read_path(value: object, argument: str, expected: str) -> str:
    """Return a path as a string.

    Raises:
        ArgumentError: it is no path, is empty, or contains a zero byte, which no system allows.
    """
    require_type(value, str | os.PathLike, argument, expected)
    path = os.fspath(value)  # type: ignore[call-overload]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ArgumentError(f"{argument}: expected {expected}, got {path!r}")
    return path


def check_norm_table(norms: object) -> None:
    """Refuse what is no table of norm classes and their readers.

    Raises:
        ArgumentError: no mapping, a key is no module class and no string, or a value is no function.
    """
    require_type(norms, Mapping, "norms", "a table such as KNOWN_NORMS | {TheirNorm: read_batch_norm}")
    for key, reader in norms.items():  # type: ignore[attr-defined]
        if isinstance(key, nn.Module):
            name = type(key).__name__
            raise ArgumentError(f"norms: expected classes of modules as keys, got an instance of {name}: pass {name}")
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise ArgumentError(
                f"norms: expected classes of modules or their qualified names as keys, got {key!r:.80}: pass "
                "KNOWN_NORMS | {TheirNorm: read_batch_norm}"
            )
        if not callable(reader):
            name = key if isinstance(key, str) else key.__name__
            raise ArgumentError(f"norms[{name}]: expected a function such as read_batch_norm, got {reader!r:.80}")


def describe_shapes(inputs: Any) -> str:
    """Return the shapes in `inputs` for a message, such as `2x3x224x224`."""
    shapes = ["x".join(map(str, leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return ", ".join(shapes) or "no tensor"


def describe_inputs(inputs: Any) -> str:
    """Return the shapes in `inputs` for a message, and, if they look like a mistake, what to pass instead."""
    advice = next((describe(inputs) for matches, describe in _INPUT_MISTAKES if matches(inputs)), "")
    return describe_shapes(inputs) + (f" ({advice})" if advice else "")


def describe_invalid_batches(batches: object) -> str | None:
    """Return why `batches` is not an iterable of inputs and what to pass instead, or None if it can be one."""
    kind = f"expected a list of inputs, got one {type(batches).__name__}"
    if isinstance(batches, Tensor | dict):
        return f"{kind}: pass [x]"
    if _is_array(batches):
        return f"{kind} from numpy: pass [torch.from_numpy(x)]"
    if _is_shape(batches):
        shape = _format_shape(batches)
        return f"expected a list of inputs, got the shape {shape}: pass [torch.randn{shape}]"
    if isinstance(batches, str | bytes | PurePath | nn.Module) or not hasattr(type(batches), "__iter__"):
        return f"{kind}: pass [x], or a DataLoader"
    return None


def list_batches(batches: Any, argument: str) -> list[Any]:
    """Return an iterable of inputs as a list.

    Args:
        argument: the name of the argument, for the message.

    Raises:
        ModelError: it is no iterable of inputs, or is empty.
    """
    if problem := describe_invalid_batches(batches):
        raise ModelError(f"{argument}: {problem}")
    inputs = list(batches)
    if not inputs:
        raise ModelError(f"{argument}: expected at least one input, got none")
    return inputs


# --- mistakes in models -----------------------------------------------------------------------------------------------


def _type_with_article(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _is_state_dict(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _is_checkpoint(value: object) -> bool:
    return isinstance(value, Mapping) and any(_is_state_dict(item) for item in value.values())


def _describe_state_dict(value: Any) -> str:
    return (
        f"got a state dict ({len(value)} tensors), which has no forward pass: create its model and call "
        "model.load_state_dict(...), or load the file with normswap.load(path, architecture=...)"
    )


def _describe_checkpoint(value: Any) -> str:
    keys = ", ".join(map(repr, list(value)[:3]))
    return (
        f"got a checkpoint (a {type(value).__name__} with {keys}): create its model and load its weights, "
        "or load the file with normswap.load(path, architecture=...)"
    )


def _describe_path(value: Any) -> str:
    return f"got the path {str(value)!r}: pass normswap.load({str(value)!r}).model, or type: normswap convert {value}"


def _describe_class(value: Any) -> str:
    return f"got the class {value.__name__}: pass an instance, such as {value.__name__}()"


def _describe_result(value: Any) -> str:
    return f"got a {type(value).__name__}: pass its .model"


def _describe_program(_value: Any) -> str:
    return "got an exported program: pass program.module()"


def _describe_tensor(_value: Any) -> str:
    return "got a Tensor: pass the model first, then its inputs"


def _describe_sequence(value: Any) -> str:
    return f"got a {type(value).__name__} of {len(value)} modules: pass one at a time, or torch.nn.ModuleList(...)"


def _describe_function(value: Any) -> str:
    return f"got the function {getattr(value, '__name__', repr(value))}: pass the module that it returns"


# Tests and messages; the first test that applies counts.
_MODEL_MISTAKES: tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...] = (
    (_is_state_dict, _describe_state_dict),
    (_is_checkpoint, _describe_checkpoint),
    (lambda value: isinstance(value, str | PurePath), _describe_path),
    (lambda value: isinstance(value, type) and issubclass(value, nn.Module), _describe_class),
    (lambda value: isinstance(value, tuple) and isinstance(getattr(value, "model", None), nn.Module), _describe_result),
    (lambda value: isinstance(value, torch.export.ExportedProgram), _describe_program),
    (lambda value: isinstance(value, Tensor), _describe_tensor),
    (
        lambda value: isinstance(value, list | tuple) and any(isinstance(item, nn.Module) for item in value),
        _describe_sequence,
    ),
    (callable, _describe_function),
)


# --- mistakes in inputs -----------------------------------------------------------------------------------------------


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "shape")


def _is_shape(value: object) -> bool:
    is_tuple = isinstance(value, tuple | list)
    return is_tuple and bool(value) and all(type(size) is int for size in value)  # type: ignore[attr-defined]


def _format_shape(value: Any) -> str:
    return f"({', '.join(map(str, value))}{',' * (len(value) == 1)})"


def _is_labelled(value: object) -> bool:
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(item, Tensor) for item in value)):
        return False
    images, labels = value
    return labels.dim() == 1 and not labels.is_floating_point() and images.shape[:1] == labels.shape


def _is_single_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] in (1, 3)


_INPUT_MISTAKES: tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...] = (
    (
        _is_shape,
        lambda value: f"{_format_shape(value)} is a shape: pass a tensor, such as torch.randn{_format_shape(value)}",
    ),
    (
        lambda value: any(map(_is_array, tree_leaves(value))),
        lambda _: "a numpy array: pass a tensor, such as torch.from_numpy(x).float()",
    ),
    (lambda value: isinstance(value, str | PurePath), lambda value: f"{str(value)!r} is a string: pass a tensor"),
    (
        lambda value: isinstance(value, torch.utils.data.DataLoader | torch.utils.data.Dataset),
        lambda value: f"a {type(value).__name__}: pass the inputs of one batch, such as next(iter(loader))[0]",
    ),
    (_is_labelled, lambda _: "images and labels: pass only the images"),
    (
        lambda value: isinstance(value, list) and bool(value),
        lambda _: "a list is one argument: pass a tuple for several arguments",
    ),
    (
        _is_single_image,
        lambda value: f"one image without a batch dimension: pass 2x{describe_shapes(value)}",
    ),
)
