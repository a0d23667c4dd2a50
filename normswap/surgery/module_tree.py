"""All modules of a model with all their names, copies of a model, and the training flags that it sets itself.

`walk_modules` is the one walk over a model. A module that only a plain list, tuple or dict refers to is not in
`named_modules()` and has no state-dict keys, but it runs: it is found through the `__dict__` of its owner, and its name
is a Python expression such as `blocks.norms[0]`.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from normswap.layers.in_place import qualified_name
from normswap.model_state import preserved_state, preserved_training_flags, set_training_flags
from normswap.text import join_fqn

_logger = logging.getLogger(__name__)

# Registries of nn.Module itself: `_modules` is walked by name, the others have no modules.
_OWN_REGISTRIES = {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, tuple, dict)
_CONTAINER_DEPTH = 3


@dataclass(frozen=True)
class ModuleEntry:
    """A module, all its names in the order of the walk, and whether its tensors are in the state dict."""

    module: nn.Module
    names: tuple[str, ...]
    registered: bool


def walk_modules(model: nn.Module) -> tuple[ModuleEntry, ...]:
    """Return every distinct module of `model` with the root (named ""), in the order of registration."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    registered = set(names)
    pending = list(names)
    for owner in pending:  # the loop appends to it
        for suffix, module in _referenced_modules(owner):
            if module not in names:
                for inner_name, inner in module.named_modules(prefix=join_fqn(names[owner][0], suffix)):
                    if inner not in names:
                        names[inner] = [inner_name]
                        pending.append(inner)
    return tuple(ModuleEntry(module, tuple(found), module in registered) for module, found in names.items())


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return every name of every module of `model`."""
    return {name: entry.module for entry in walk_modules(model) for name in entry.names}


def never_updated(mean: Any = None, var: Any = None, count: Any = None) -> bool:
    """Return whether running statistics never had a batch: mean 0, variance 1, and no batch counted.

    Statistics without a counter, and those of files from before torch counted batches, are judged by their values.
    """
    if not all(isinstance(each, Tensor) and not each.is_meta and each.numel() for each in (mean, var)):
        return False
    counted = isinstance(count, Tensor) and not count.is_meta and bool(count != 0)
    return not counted and not bool(mean.any()) and bool((var == 1).all())


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of `model` whose parameters require gradients like those of `model`.

    It is made without gradients: a deep copy of TorchScript inside a model would share its graph (torch 2.14).

    Args:
        memo: as in `deep_copy`.
    """
    with torch.no_grad():
        module_copy = deep_copy(model, {} if memo is None else memo)
    for parameter, copied in zip(model.parameters(), module_copy.parameters(), strict=True):
        if copied.requires_grad != parameter.requires_grad:
            copied.requires_grad_(parameter.requires_grad)
    for module, copied_module in zip(model.modules(), module_copy.modules(), strict=True):
        if isinstance(module, fx.GraphModule):
            _complete_graph_copy(module, copied_module)
    return module_copy


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the same parameters and its own buffers: for a conversion, not for training."""
    return copy_model(model, {id(parameter): parameter for parameter in model.parameters()})


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return what `copy.deepcopy` returns, faster for the most common attributes: numbers and empty registries.

    Args:
        memo: as in `copy.deepcopy`: copies by the id of the original; objects in it are not copied again.
    """
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    cls = type(module)
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _COPY_PROTOCOL):
        return copy.deepcopy(module, memo)
    module_copy = cls.__new__(cls)
    memo[id(module)] = module_copy
    for name, value in module.__getstate__().items():  # type: ignore[no-untyped-call]  # no compiled code
        if type(value) in _IMMUTABLE or isinstance(value, _SHARED):
            vars(module_copy)[name] = value
        elif type(value) in _DICTS and id(value) not in memo and (name in _OWN_REGISTRIES or not value):
            # In the memo, since other objects refer to the dict itself, such as the handle of a hook.
            memo[id(value)] = vars(module_copy)[name] = copied = type(value)()
            copy_item = deep_copy if name == "_modules" else copy.deepcopy
            for key, item in value.items():
                copied[key] = item if item is None else copy_item(item, memo)
        else:
            vars(module_copy)[name] = copy.deepcopy(value, memo)
    return module_copy


_COPY_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__", "__slots__")
_DICTS = (dict, OrderedDict)
_IMMUTABLE = (bool, int, float, str, type(None))
# Objects that a copy shares with the original: the process group of a SyncBatchNorm.
_SHARED = (torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()


_HOOK_DICTS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def _complete_graph_copy(module: nn.Module, module_copy: nn.Module) -> None:
    """Add to the copy of a GraphModule what torch does not copy: its name, hooks and attributes (torch 2.14)."""
    type(module_copy).__name__, type(module_copy).__qualname__ = type(module).__name__, type(module).__qualname__
    handles: dict[str, RemovableHandle] = {}
    for name, value in vars(module).items():
        if name.endswith(_HOOK_DICTS) and value:
            vars(module_copy)[name] = value.copy()
        elif name not in vars(module_copy):
            vars(module_copy)[name] = value
            if isinstance(value, MethodType) and value.__self__ is module:
                vars(module_copy)[name] = MethodType(value.__func__, module_copy)
            elif isinstance(value, RemovableHandle):
                handles[name] = value
    # A handle must remove the hook of the copy, so it is copied last: it refers to the dicts of hooks.
    dicts = {id(value): vars(module_copy)[name] for name, value in vars(module).items() if name.endswith(_HOOK_DICTS)}
    for name, handle in handles.items():
        vars(module_copy)[name] = copy.deepcopy(handle, dict(dicts))


def class_name(module: nn.Module) -> str:
    """Return the module's class as `module.QualName`."""
    return qualified_name(type(module))


def _referenced_modules(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(owner, torch.jit.ScriptModule):  # its attributes are wrappers of itself
        return
    for name, value in vars(owner).items():
        # The cheap test that applies to nearly all attributes comes first: models have tens of thousands.
        if type(value) in _IMMUTABLE or (isinstance(value, _CONTAINERS) and not value):
            continue
        if name not in _OWN_REGISTRIES and not name.endswith("_hooks"):
            yield from _modules_in(value, name, _CONTAINER_DEPTH)


def _modules_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif not depth or not isinstance(value, _CONTAINERS):
        return
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _modules_in(item, f"{name}[{key!r}]", depth - 1)
    else:
        for index, item in enumerate(value):
            yield from _modules_in(item, f"{name}[{index}]", depth - 1)


# --- training flags ---------------------------------------------------------------------------------------------------

Flags = Mapping[str, bool]


class ModelTrainingFlags(NamedTuple):
    """The training flag of every module by its first name, after `model.eval()` and after `model.train()`."""

    evaluation: Flags
    training: Flags


def model_training_flags(model: nn.Module) -> ModelTrainingFlags | None:
    """Return the flags that the model's own `train()` and `eval()` set, None if no module overrides these."""
    entries = walk_modules(model)
    if not any(_overrides_mode(entry.module) for entry in entries):
        return None
    found: list[Flags] = []
    for training in (False, True):
        with model_mode(model, training=training):
            found.append({entry.names[0]: entry.module.training for entry in entries})
    return ModelTrainingFlags(*found)


@contextmanager
def model_mode(
    model: nn.Module,
    *,
    training: bool,
    flags: Flags | None = None,
    entries: tuple[ModuleEntry, ...] | None = None,
) -> Iterator[None]:
    """Call the model's own `train()` or `eval()`, and restore at the end what that changed.

    If the method raises, all flags are set directly. Modules that are in no registry get the flag too.

    Args:
        flags: the flags of single modules by first name, which are set afterwards.
        entries: `walk_modules(model)`, if the caller has it.
    """
    entries = walk_modules(model) if entries is None else entries
    with ExitStack() as stack:
        stack.enter_context(preserved_training_flags(entry.module for entry in entries))
        if any(_overrides_mode(entry.module) for entry in entries):
            stack.enter_context(preserved_state([entry.module for entry in entries]))
            set_training_flags((entry.module, training) for entry in entries if not entry.registered)
            _set_mode(model, entries, training=training)
        else:
            set_training_flags((entry.module, training) for entry in entries)
        if flags:
            set_training_flags((p.module, flags[p.names[0]]) for p in entries if p.names[0] in flags)
        yield


def _set_mode(model: nn.Module, entries: tuple[ModuleEntry, ...], *, training: bool) -> None:
    try:
        model.train() if training else model.eval()
    except Exception as error:  # noqa: BLE001 - the model's code; the module of an exported program always raises
        _logger.debug("%s: its train() or eval() raised %s: flags are set directly", type(model).__name__, error)
        set_training_flags((entry.module, training) for entry in entries)


def _overrides_mode(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # its methods are wrappers of those of `nn.Module`
        return False
    cls, own = type(module), vars(module)
    return cls.train is not nn.Module.train or cls.eval is not nn.Module.eval or "train" in own or "eval" in own
