"""Fingerprints that compare what two module trees compute, and facts that describe one to people.

Two models have the same fingerprint if they have the same classes under the same names with the same settings: the
text of `extra_repr` and every simple attribute of every module. A value that cannot be read makes the fingerprint
unique, so models are kept apart when unsure.
"""

import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

# Attributes that describe training or naming and do not affect the outputs.
_BOOKKEEPING = {"training", "pretrained_cfg", "default_cfg", "feature_info", "pruned_loaded"}
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEEPEST = 6
_unreadable = itertools.count()

_ACTIVATION_FILES = re.compile(r"torch\.nn\.modules\.activation$|timm\.layers\.activations")
_NORM = re.compile(r"Norm")
_POOLING = re.compile(r"Pool")
_SAME_ACTIVATION = {"Swish": "SiLU", "SwishMe": "SiLU", "SiLUMe": "SiLU", "ReLU6Me": "ReLU6", "GELUTanh": "GELU tanh"}


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits. They are equal only if two models with equal parameters give equal outputs."""
    digest = hashlib.sha256()
    for name, settings in tree_settings(model).items():
        digest.update(json.dumps([name, settings], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def tree_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the class, the settings and the tensors of each module by name.

    A module with several names is described under the first; the others refer to it.
    """
    seen: dict[int, str] = {}
    found: dict[str, dict[str, Any]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        first = seen.setdefault(id(module), name)
        found[name] = _settings(module, names) if first == name else {"same as": first}
    owners: dict[int, str] = {}
    ties = {}
    for name, tensor in itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        owner = owners.setdefault(id(tensor), name)
        if owner != name:
            ties[name] = owner
    return {**found, "(ties)": ties}


def facts(model: nn.Module, input_size: Any) -> dict[str, str]:
    """Return the facts by which people distinguish models: norms, activations, pooling, heads, input size."""
    kinds = {
        "norm": _norms(model),
        "momentum": {
            f"{m.momentum}" for m in model.modules() if _NORM.search(type(m).__name__) and hasattr(m, "momentum")
        },
        "activation": _activations(model),
        "convolution": {type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)},
        "pooling": {
            re.sub(r", padding=0|, dilation=1|, ceil_mode=False|\s+(?=\s)", "", repr(m))
            for m in model.modules()
            if _POOLING.search(type(m).__name__) and not list(m.children())
        },
        "dropout": {f"{m.p}" for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)},
        "drop path": _drop_path(model),
        "attention heads": {
            f"{m.num_heads}" for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)
        },
        "window": {
            _plain(m.window_size) for m in model.modules() if isinstance(getattr(m, "window_size", None), int | tuple)
        },
    }
    texts = {kind: ", ".join(sorted(values, key=_natural)) for kind, values in kinds.items() if values}
    texts = {kind: text if len(text) <= 120 else text[:117] + "..." for kind, text in texts.items()}
    if input_size:
        texts["input"] = "x".join(map(str, input_size))
    return {"class": f"{type(model).__module__.partition('.')[0]} {type(model).__name__}", **texts}


def _settings(module: nn.Module, names: Mapping[int, str]) -> dict[str, Any]:
    attributes = {
        key: _readable(value, names, 0)
        for key, value in vars(module).items()
        if key not in _INTERNAL and key not in _BOOKKEEPING
    }
    return {
        "class": _qualified(type(module)),
        "repr": module.extra_repr(),
        "attributes": attributes,
        "hooks": [_readable(list(getattr(module, kind).values()), names, 0) for kind in _HOOKS],
        "tensors": {
            key: _tensor(value)
            for key, value in itertools.chain(module._parameters.items(), module._buffers.items())
            if value is not None
        },
        "unsaved": sorted(module._non_persistent_buffers_set),
    }


def _tensor(value: torch.Tensor) -> list[Any]:
    return [str(value.dtype), list(value.shape), value.requires_grad]


def _readable(value: Any, names: Mapping[int, str], depth: int) -> Any:
    """Return a JSON value. Two results are equal only if the two values are equal."""
    if value is None or isinstance(value, bool | int | float | str):
        return value if not isinstance(value, enum.Enum) else f"{_qualified(type(value))}.{value.name}"
    if depth > _DEEPEST:
        return f"unreadable {next(_unreadable)}"
    inner = functools.partial(_readable, names=names, depth=depth + 1)
    if isinstance(value, nn.Module):
        return f"module {names[id(value)]}" if id(value) in names else [_qualified(type(value)), repr(value)]
    if isinstance(value, Mapping):
        return {"mapping": sorted(([inner(k), inner(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(inner, value)]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(map(inner, value), key=json.dumps)]
    return _object(value, inner)


def _object(value: Any, inner: Any) -> Any:
    if isinstance(value, type):
        return f"type {_qualified(value)}"
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | complex | range | slice):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return ["tensor", *_tensor(value), f"unreadable {next(_unreadable)}"]
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", inner(value.__self__), value.__func__.__qualname__]
    if isinstance(value, types.FunctionType):
        cells = [inner(cell.cell_contents) for cell in value.__closure__ or ()]
        return ["function", f"{value.__module__}.{value.__qualname__}", cells, inner(value.__defaults__)]
    if isinstance(value, types.BuiltinFunctionType):
        return ["builtin", f"{value.__module__}.{value.__qualname__}"]
    if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        return [_qualified(type(value)), inner(dict(vars(value)))]
    return f"unreadable {_qualified(type(value))} {next(_unreadable)}"


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _norms(model: nn.Module) -> set[str]:
    found = set()
    for module in model.modules():
        kind = type(module).__name__
        if _NORM.search(kind) and isinstance(getattr(module, "eps", None), float):
            found.add(f"{'BatchNorm' if 'BatchNorm' in kind else kind} eps {module.eps:g}")
    return found


def _activations(model: nn.Module) -> set[str]:
    found = set()
    for module in model.modules():
        kind = type(module)
        if _ACTIVATION_FILES.match(kind.__module__) and kind.__name__ not in ("MultiheadAttention",):
            found.add(_SAME_ACTIVATION.get(kind.__name__, kind.__name__))
    return found


def _drop_path(model: nn.Module) -> set[str]:
    found = {m.drop_prob for m in model.modules() if isinstance(getattr(m, "drop_prob", None), float)}
    return {f"up to {max(found):.3g}"} if found and max(found) > 0 else set()


def _plain(value: Any) -> str:
    return str(value).replace(" ", "")


def _natural(text: str) -> list[Any]:
    return [
        (0, float(part), "") if re.fullmatch(r"[\d.]*\d", part) else (1, 0.0, part)
        for part in re.split(r"([\d.]*\d)", text)
    ]


def setting_differences(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield one line for each setting that differs between two trees: `conv1 stride: (2, 2) / (1, 1)`."""
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name, {}), second.get(name, {})
        if one == other:
            continue
        flat, flat_other = _flat(one), _flat(other)
        for key in dict.fromkeys([*flat, *flat_other]):
            if flat.get(key) != flat_other.get(key):
                yield f"{name or '(model)'} {key}: {_shown(flat.get(key))} / {_shown(flat_other.get(key))}"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings.get("attributes", {}), **{k: v for k, v in settings.items() if k != "attributes"}}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
