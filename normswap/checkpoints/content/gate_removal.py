"""The gates removed again from the content of a converted file: the inverse of `converted_content`.

A conversion adds gates, matching constants and some running statistics to state dicts, a last group to optimizers, and
an entry for that group to schedulers. Everything else is left as it was, bit for bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.checkpoints.content.optimizer_state import (
    GATE_GROUP,
    GROUP_LISTS,
    StateDict,
    has_gates,
    is_optimizer_state,
    is_scheduler_state,
    non_gate_groups,
)
from normswap.layers.gating import importance_weights
from normswap.layers.in_place import GATE_PARAMETERS, STATISTICS
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.surgery.plan import Swap

_ADDED = (*GATE_PARAMETERS, *MATCHING_BUFFERS)
# The versions that torch's norms write into the metadata of a state dict.
_BN_VERSION, _VERSION = 2, 1


class SwapFinder:
    """Finds the swap of a module name in a file, which may have a prefix."""

    def __init__(self, swaps: Sequence[Swap], stored_as: Mapping[str, str]) -> None:
        self._swaps = {name: swap for swap in swaps for name in (swap.fqn, stored_as.get(swap.fqn, swap.fqn))}

    def find(self, module: str) -> Swap | None:
        """Return the swap whose name is that of a module, or its longest end."""
        parts = module.split(".")
        names = (".".join(parts[start:]) for start in range(len(parts) + 1))
        return next((self._swaps[name] for name in names if name in self._swaps), None)


def remove_gates_from_state(state: Mapping[str, Tensor], find: Callable[[str], Swap | None]) -> dict[str, Tensor]:
    """Return a state dict without what the conversion added, in the same order, with torch's metadata."""
    result: OrderedDict[str, Tensor] = OrderedDict(
        (key, tensor) for key, tensor in state.items() if not _is_added(key, find)
    )
    own = getattr(state, "_metadata", None)
    if isinstance(own, Mapping):
        result._metadata = OrderedDict(  # type: ignore[attr-defined]
            (module, _plain_metadata(note, find(module)) if "gate" in note else note)
            for module, note in own.items()
            if "gate" not in note or not _is_functional(find(module))
        )
    return result


def changed_gates(state: Mapping[str, Tensor], find: Callable[[str], Swap | None]) -> list[str]:
    """Return the module names in a state dict whose importance weights differ from the old norm."""
    changed: dict[str, None] = {}
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        swap = find(module)
        if name not in GATE_PARAMETERS or swap is None or not isinstance(value, Tensor):
            continue
        weights = importance_weights(value.detach(), swap.gate)
        at_vertex = swap.vertex in swap.branches and bool(weights[swap.branches.index(swap.vertex)] == 1)
        changed |= {} if at_vertex else {module: None}
    return [*changed]


def remove_gates_from_optimizer(state: StateDict) -> dict[str, Any]:
    """Return an optimizer's state dict without the group of gates and their state."""
    groups = [group for group in state["param_groups"] if group.get(GATE_GROUP) is True]
    gates = {key for group in groups for key in group["params"]}
    entries = {key: value for key, value in state["state"].items() if key not in gates}
    return {
        **state,
        "state": type(state["state"])(entries) if isinstance(state["state"], dict) else entries,
        "param_groups": non_gate_groups(state),
    }


def remove_gates_from_scheduler(state: StateDict, groups: Sequence[StateDict]) -> dict[str, Any]:
    """Return a scheduler's state dict without the entries of the gates.

    Args:
        groups: the parameter groups of its optimizer, with that of the gates.
    """
    kept = [index for index, group in enumerate(groups) if group.get(GATE_GROUP) is not True]
    result = dict(state)
    for name in GROUP_LISTS:
        values = state.get(name)
        if isinstance(values, list) and len(values) == len(groups):
            result[name] = [values[index] for index in kept]
    if isinstance(state.get("_schedulers"), list):
        result["_schedulers"] = [remove_gates_from_scheduler(inner, groups) for inner in state["_schedulers"]]
    return result


def optimizers_with_gates(content: Any, key_paths: Collection[Any], get: Callable[[Any, Any], Any]) -> list[Any]:
    """Return the key paths of optimizers that have a group of gates."""
    states = ((key_path, get(content, key_path)) for key_path in key_paths)
    return [key_path for key_path, state in states if is_optimizer_state(state) and has_gates(state)]


def schedules_groups(state: Any, groups: Sequence[StateDict]) -> bool:
    """Return whether a scheduler's lists have an entry for each of these groups."""
    if not is_scheduler_state(state):
        return False
    inner = state.get("_schedulers")
    if isinstance(inner, list):
        return all(schedules_groups(each, groups) for each in inner)
    lists = [state[name] for name in GROUP_LISTS if isinstance(state.get(name), list)]
    return bool(lists) and all(len(values) == len(groups) for values in lists)


def _is_added(key: str, find: Callable[[str], Swap | None]) -> bool:
    module, _, name = key.rpartition(".")
    swap = find(module) if name in _ADDED or name in STATISTICS else None
    return swap is not None and (name in _ADDED or swap.creates_running_stats)


def _is_functional(swap: Swap | None) -> bool:
    """Whether a module was added for a call of a function, and is removed as a whole."""
    return swap is not None and swap.owner is not None


def _plain_metadata(note: Mapping[str, Any], swap: Swap | None) -> dict[str, Any]:
    without = {name: value for name, value in note.items() if name != "gate"}
    if swap is None:
        return without
    return without | {"version": _BN_VERSION if swap.kind in ("bn", "in") else _VERSION}
