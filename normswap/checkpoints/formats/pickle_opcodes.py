"""A summary of a pickle from its opcodes: nothing is imported, built or run.

The interpreter here follows the stack as the unpickler does. It keeps the values that matter for the checks (strings,
numbers, tuples, names of code, storages) and replaces all others by placeholders. It reads a damaged pickle up to the
damage; the reader of the file refuses it later.
"""

import pickletools
import re
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple


class GlobalName(NamedTuple):
    """A global that a pickle names: `module.attribute`."""

    text: str


class TupleValue(NamedTuple):
    """A tuple, and its number of entries with nested tuples expanded at every use."""

    items: Sequence[Any]
    num_entries: int


class StorageClaim(NamedTuple):
    """A storage as the pickle declares it: its class, its key in the file, its number of elements."""

    kind: str
    key: str
    elements: int


class TensorClaim(NamedTuple):
    """A tensor as the pickle declares it: its storage, offset, shape and strides (in elements)."""

    storage: StorageClaim
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class CallResult(NamedTuple):
    """The unknown result of a call of the global `by`."""

    by: str


class PickleSummary(NamedTuple):
    """The contents of a pickle that the checks use.

    Attributes:
        names: the names of code in it.
        called_names: those that it calls; `UNRESOLVED` among them means a call of a computed object, or a
            tensor with computed parts.
        storages, tensors: as the pickle declares them.
        max_tuple_entries: the number of entries of its largest tuple, with nested tuples expanded.
        max_memo_index: the largest index in its memo.
        is_complete: whether it has an end.
    """

    names: frozenset[str]
    called_names: frozenset[str]
    storages: tuple[StorageClaim, ...]
    tensors: tuple[TensorClaim, ...]
    max_tuple_entries: int
    max_memo_index: int
    is_complete: bool


class _Mark:
    pass


UNRESOLVED = ""
_REBUILD_TENSOR = re.compile(r"torch\._utils\._rebuild_q?tensor")
_REBUILD_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_MARK = _Mark()
_PLACEHOLDER = None  # a value of no interest here
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def summarize_pickle(file: IO[bytes]) -> PickleSummary:
    """Return the summary of one pickle; `file` is then positioned after it, or at the damage."""
    reader = _Reader()
    is_complete = False
    try:
        for opcode, argument, _ in pickletools.genops(file):
            is_complete = opcode.name == "STOP"
            reader.execute(opcode, argument)
    except Exception:  # noqa: BLE001 - damaged bytes may raise any error
        pass
    max_memo_index = max(reader.memo, default=0)
    return PickleSummary(
        frozenset(reader.names),
        frozenset(reader.called_names),
        tuple(reader.storages),
        tuple(reader.tensors),
        reader.max_tuple_entries,
        max_memo_index,
        is_complete,
    )


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.called_names: set[str] = set()
        self.storages: list[StorageClaim] = []
        self.tensors: list[TensorClaim] = []
        self.max_tuple_entries = 0

    def execute(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Apply the effect of an opcode to the stack and the memo."""
        stack = self.stack
        if opcode.name in _PUTS:
            self.memo[int(argument)] = stack[-1]
        elif opcode.name in _GETS:
            stack.append(self.memo.get(int(argument), _PLACEHOLDER))
        elif opcode.name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            rule = _STACK_EFFECTS[opcode.name]
            popped = self._pop(rule.num_popped, down_to_mark=rule.down_to_mark)
            if rule.num_pushed == 1:
                stack.append(rule.make(self, popped, argument))
            else:
                stack.extend([_PLACEHOLDER] * rule.num_pushed)

    def _pop(self, count: int, *, down_to_mark: bool) -> list[Any]:
        """Pop `count` values, after all values above the topmost mark and the mark itself if `down_to_mark`."""
        stack = self.stack
        above: list[Any] = []
        if down_to_mark:
            while (value := stack.pop()) is not _MARK:
                above.append(value)
        if count > len(stack):
            raise ValueError("the stack is empty")
        popped = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return popped + above[::-1]

    def record_global(self, text: str) -> GlobalName:
        """Record the name of a class or function."""
        self.names.add(text)
        return GlobalName(text)

    def make_tuple(self, items: list[Any]) -> TupleValue:
        """Return a tuple, and record the number of its entries."""
        value = TupleValue(items, 1 + sum(item.num_entries if isinstance(item, TupleValue) else 1 for item in items))
        self.max_tuple_entries = max(self.max_tuple_entries, value.num_entries)
        return value

    def record_storage(self, saved: Any) -> Any:
        """Record the storage that a persistent id declares."""
        # ("storage", class, key, device, elements) and, in legacy files, a view of another storage
        match saved:
            case TupleValue(items=["storage", GlobalName(text=kind), str(key), _, int(elements), *_]):
                self.storages.append(StorageClaim(kind, key, elements))
                return self.storages[-1]
        self.called_names.add(UNRESOLVED)
        return _PLACEHOLDER

    def record_call(self, function: Any, arguments: Any) -> Any:
        """Record a call, and the tensor that it builds if it is one of torch's rebuild functions."""
        name = function.text if isinstance(function, GlobalName) else UNRESOLVED
        self.called_names.add(name)
        items = arguments.items if isinstance(arguments, TupleValue) else ()
        if name == _REBUILD_WITH_ATTRIBUTES and len(items) > 2:  # (function, class, its arguments, attributes)
            return self.record_call(items[0], items[2])
        # torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, ...) and its variants
        if _REBUILD_TENSOR.match(name):
            self.record_tensor(items)
        # pickle writes bytearray("text", "latin-1"); bytearray(10**12) would allocate a terabyte.
        if name.endswith(".bytearray") and items and not isinstance(items[0], str | CallResult):
            self.called_names.add(UNRESOLVED)
        return CallResult(name)

    def record_state(self, inst: Any, state: Any) -> Any:
        """Record the state that is set on an object; the state of a tensor is another view of a storage."""
        if isinstance(inst, CallResult) and inst.by.startswith("torch."):
            self.record_tensor(state.items if isinstance(state, TupleValue) else ())
        return inst

    def record_tensor(self, items: Sequence[Any]) -> None:
        """Record a tensor by its storage, offset, shape and strides."""
        match items:
            case [StorageClaim() as storage, int(offset), TupleValue(items=shape), TupleValue(items=stride), *_] if all(
                isinstance(number, int) for number in (*shape, *stride)
            ):
                self.tensors.append(TensorClaim(storage, offset, tuple(shape), tuple(stride)))
            case _:
                self.called_names.add(UNRESOLVED)


class _StackEffect(NamedTuple):
    """The effect of an opcode on the stack.

    Attributes:
        num_popped: how many values it pops.
        down_to_mark: whether it also pops all values above the topmost mark.
        num_pushed: how many values it pushes.
        make: what makes the value, if it pushes one.
    """

    num_popped: int
    down_to_mark: bool
    num_pushed: int
    make: "_Maker"


_Maker = Callable[[_Reader, list[Any], Any], Any]


def _make_placeholder(_reader: _Reader, _taken: list[Any], _argument: Any) -> Any:
    return _PLACEHOLDER


def _argument(_reader: _Reader, _taken: list[Any], argument: Any) -> Any:
    return argument.decode("latin-1") if isinstance(argument, bytes) else argument


_MAKERS: dict[str, _Maker] = {
    "MARK": lambda reader, popped, argument: _MARK,
    "GLOBAL": lambda reader, popped, argument: reader.record_global(argument.replace(" ", ".", 1)),
    "INST": lambda reader, popped, argument: reader.record_global(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda reader, popped, argument: reader.record_global(f"{popped[0]}.{popped[1]}"),
    "TUPLE": lambda reader, popped, argument: reader.make_tuple(popped),
    "BINPERSID": lambda reader, popped, argument: reader.record_storage(popped[0]),
    "REDUCE": lambda reader, popped, argument: reader.record_call(popped[0], popped[1]),
    "NEWOBJ": lambda reader, popped, argument: reader.record_call(popped[0], popped[1]),
    "BUILD": lambda reader, popped, argument: reader.record_state(popped[0], popped[1]),
    **{name: (lambda reader, popped, argument: reader.make_tuple(popped)) for name in _TUPLES},
    **{
        opcode.name: _argument
        for opcode in pickletools.opcodes
        if opcode.arg is not None and not opcode.stack_before and len(opcode.stack_after) == 1
        if opcode.stack_after[0] in (pickletools.pyunicode, pickletools.pybytes_or_str, pickletools.pyint)
    },
}


def _stack_effect(opcode: pickletools.OpcodeInfo) -> _StackEffect:
    before = opcode.stack_before
    marked = pickletools.markobject in before
    count = before.index(pickletools.markobject) if marked else len(before)
    return _StackEffect(count, marked, len(opcode.stack_after), _MAKERS.get(opcode.name, _make_placeholder))


_STACK_EFFECTS = {opcode.name: _stack_effect(opcode) for opcode in pickletools.opcodes}
