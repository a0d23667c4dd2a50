"""What a pickle says, read from its opcodes: nothing is imported, built or run for it.

Follows the stack as the unpickler would, with the values that matter here (strings, numbers, tuples, names of code,
storages) and placeholders for all others. A damaged pickle is read as far as it goes: to refuse it is the reader's job.
"""

import pickletools
import re
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple


class Name(NamedTuple):
    """A global that a pickle names: `module.attribute`."""

    text: str


class Tuple(NamedTuple):
    """A tuple, and how many entries it has once all tuples in it are counted wherever they are used again."""

    items: Sequence[Any]
    unfolded: int


class Storage(NamedTuple):
    """The claim that so many elements of a storage class lie under `key`."""

    kind: str
    key: str
    elements: int


class Rebuilt(NamedTuple):
    """The claim that a tensor is a view of a storage: from which element on, of which shape, in which steps."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Made(NamedTuple):
    """Whatever a call of the global `by` returns."""

    by: str


class Said(NamedTuple):
    """What a pickle says: names of code, which of them it calls, storages, tensors, entries of its largest tuple, the
    highest number under which it keeps something, and whether it has an end.

    Among the names that are called, an empty one stands for a call that cannot be followed: of something that is no
    name, or of a tensor's parts that are not written out.
    """

    names: frozenset[str]
    called: frozenset[str]
    storages: tuple[Storage, ...]
    tensors: tuple[Rebuilt, ...]
    largest_tuple: int
    highest_place: int
    whole: bool


class _Mark:
    pass


UNCLEAR = ""
_OF_STORAGE = re.compile(r"torch\._utils\._rebuild_q?tensor")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_MARK = _Mark()
_OTHER = None  # a value of no interest here
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_opcodes(file: IO[bytes]) -> Said:
    """Return what one pickle says; `file` then stands behind it, or where it is damaged."""
    reader = _Reader()
    whole = False
    try:
        for opcode, argument, _ in pickletools.genops(file):
            whole = opcode.name == "STOP"
            reader.follow(opcode, argument)
    except Exception:  # noqa: BLE001 - what damaged bytes raise is anybody's guess
        pass
    highest_place = max(reader.memo, default=0)
    return Said(
        frozenset(reader.names),
        frozenset(reader.called),
        tuple(reader.storages),
        tuple(reader.tensors),
        reader.largest_tuple,
        highest_place,
        whole,
    )


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.called: set[str] = set()
        self.storages: list[Storage] = []
        self.tensors: list[Rebuilt] = []
        self.largest_tuple = 0

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the stack what `opcode` does."""
        stack = self.stack
        if opcode.name in _PUTS:
            self.memo[int(argument)] = stack[-1]
        elif opcode.name in _GETS:
            stack.append(self.memo.get(int(argument), _OTHER))
        elif opcode.name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            rule = _RULES[opcode.name]
            taken = self._take(rule.under, down_to_mark=rule.down_to_mark)
            if rule.left == 1:
                stack.append(rule.make(self, taken, argument))
            else:
                stack.extend([_OTHER] * rule.left)

    def _take(self, count: int, *, down_to_mark: bool) -> list[Any]:
        """Pop so many values and, above them, all down to the topmost mark; the mark itself goes too."""
        stack = self.stack
        above: list[Any] = []
        if down_to_mark:
            while (value := stack.pop()) is not _MARK:
                above.append(value)
        if count > len(stack):
            raise ValueError("the stack is empty")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken + above[::-1]

    def named(self, text: str) -> Name:
        self.names.add(text)
        return Name(text)

    def tuple_of(self, items: list[Any]) -> Tuple:
        made = Tuple(items, 1 + sum(item.unfolded if isinstance(item, Tuple) else 1 for item in items))
        self.largest_tuple = max(self.largest_tuple, made.unfolded)
        return made

    def storage_of(self, saved: Any) -> Any:
        # ("storage", class, key, device, elements) and, in legacy files, which part of another one it is
        match saved:
            case Tuple(items=["storage", Name(text=kind), str(key), _, int(elements), *_]):
                self.storages.append(Storage(kind, key, elements))
                return self.storages[-1]
        self.called.add(UNCLEAR)
        return _OTHER

    def built(self, function: Any, arguments: Any) -> Any:
        name = function.text if isinstance(function, Name) else UNCLEAR
        self.called.add(name)
        items = arguments.items if isinstance(arguments, Tuple) else ()
        if name == _WITH_ATTRIBUTES and len(items) > 2:  # (function, class, its arguments, attributes)
            return self.built(items[0], items[2])
        # torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, ...) and its kin
        if _OF_STORAGE.match(name):
            self.seen_as(items)
        # bytearray("text", "latin-1") is what is pickled; bytearray(10**12) is a bomb.
        if name.endswith(".bytearray") and items and not isinstance(items[0], str | Made):
            self.called.add(UNCLEAR)
        return Made(name)

    def given(self, inst: Any, state: Any) -> Any:
        # What a tensor is given is another view of a storage.
        if isinstance(inst, Made) and inst.by.startswith("torch."):
            self.seen_as(state.items if isinstance(state, Tuple) else ())
        return inst

    def seen_as(self, items: Sequence[Any]) -> None:
        match items:
            case [Storage() as storage, int(offset), Tuple(items=shape), Tuple(items=stride), *_] if all(
                isinstance(number, int) for number in (*shape, *stride)
            ):
                self.tensors.append(Rebuilt(storage, offset, tuple(shape), tuple(stride)))
            case _:
                self.called.add(UNCLEAR)


class _Rule(NamedTuple):
    """How many values an opcode takes, whether all above a mark too, how many it leaves, and what the only one is."""

    under: int
    down_to_mark: bool
    left: int
    make: "_Maker"


_Maker = Callable[[_Reader, list[Any], Any], Any]


def _nothing(_reader: _Reader, _taken: list[Any], _argument: Any) -> Any:
    return _OTHER


def _argument(_reader: _Reader, _taken: list[Any], argument: Any) -> Any:
    return argument.decode("latin-1") if isinstance(argument, bytes) else argument


_MAKERS: dict[str, _Maker] = {
    "MARK": lambda reader, taken, argument: _MARK,
    "GLOBAL": lambda reader, taken, argument: reader.named(argument.replace(" ", ".", 1)),
    "INST": lambda reader, taken, argument: reader.named(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda reader, taken, argument: reader.named(f"{taken[0]}.{taken[1]}"),
    "TUPLE": lambda reader, taken, argument: reader.tuple_of(taken),
    "BINPERSID": lambda reader, taken, argument: reader.storage_of(taken[0]),
    "REDUCE": lambda reader, taken, argument: reader.built(taken[0], taken[1]),
    "NEWOBJ": lambda reader, taken, argument: reader.built(taken[0], taken[1]),
    "BUILD": lambda reader, taken, argument: reader.given(taken[0], taken[1]),
    **{name: (lambda reader, taken, argument: reader.tuple_of(taken)) for name in _TUPLES},
    **{
        opcode.name: _argument
        for opcode in pickletools.opcodes
        if opcode.arg is not None and not opcode.stack_before and len(opcode.stack_after) == 1
        if opcode.stack_after[0] in (pickletools.pyunicode, pickletools.pybytes_or_str, pickletools.pyint)
    },
}


def _rule(opcode: pickletools.OpcodeInfo) -> _Rule:
    before = opcode.stack_before
    marked = pickletools.markobject in before
    count = before.index(pickletools.markobject) if marked else len(before)
    return _Rule(count, marked, len(opcode.stack_after), _MAKERS.get(opcode.name, _nothing))


_RULES = {opcode.name: _rule(opcode) for opcode in pickletools.opcodes}
