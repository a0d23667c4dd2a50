"""Training and evaluation as a model's own `train()` and `eval()` set them, for a while.

Models override them, most often to keep Batch Normalization in evaluation while all else trains. Whatever they change
is put back: flags, attributes, buffers, the values and `requires_grad` of parameters.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from normswap.modes import preserved_state
from normswap.surgery.tree import Place, walk_modules

Flags = Mapping[str, bool]


class OwnFlags(NamedTuple):
    """The training flag of every module by its first name, after `model.eval()` and after `model.train()`."""

    evaluation: Flags
    training: Flags


def own_flags(model: nn.Module) -> OwnFlags | None:
    """Return the flags that the model's own `train()` and `eval()` set, None if they are those of `nn.Module`."""
    places = walk_modules(model)
    if not any(_overrides(place.module) for place in places):
        return None
    found: list[Flags] = []
    for training in (False, True):
        with own_mode(model, training=training):
            found.append({place.names[0]: place.module.training for place in places})
    return OwnFlags(*found)


@contextmanager
def own_mode(model: nn.Module, *, training: bool, flags: Flags | None = None) -> Iterator[None]:
    """Call the model's own `train()` or `eval()`, and put back what that changed at the end.

    A model whose own one raises has its flags set directly. Modules that are in no registry get the flag too.

    Args:
        flags: what single modules are set to afterwards, by name.
    """
    places = walk_modules(model)
    before = [(place.module, place.module.training) for place in places]
    with ExitStack() as stack:
        stack.callback(_set_flags, before)
        if any(_overrides(place.module) for place in places):
            stack.enter_context(preserved_state([place.module for place in places]))
            _set_flags((place.module, training) for place in places if not place.registered)
            _switch(model, places, training=training)
        else:
            _set_flags((place.module, training) for place in places)
        if flags:
            _set_flags((p.module, flags[p.names[0]]) for p in places if p.names[0] in flags)
        yield


def _switch(model: nn.Module, places: tuple[Place, ...], *, training: bool) -> None:
    try:
        model.train() if training else model.eval()
    except Exception:  # noqa: BLE001 - such as that of an exported program, which refuses; it runs the model's code
        _set_flags((place.module, training) for place in places)


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag


def _overrides(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # wraps those of `nn.Module`
        return False
    cls, own = type(module), vars(module)
    return cls.train is not nn.Module.train or cls.eval is not nn.Module.eval or "train" in own or "eval" in own
