"""Plain data in pickles: values are rebuilt from checked fields, and forged ones are refused."""

import argparse
import collections
import datetime
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normswap
from normswap.checkpoints.formats.formats import decode, detect_format
from normswap.checkpoints.formats.plain_values import plain_global_names, plain_globals, user_safe_globals
from normswap.errors import CheckpointError

# Every name that is allowed beyond torch's own list. A new one needs a line in HARMLESS or FORGED below.
ALLOWED = {
    *("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "Array"),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in "bytes frozenset range slice list dict int float str bool tuple".split()),  # noqa: SIM905
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PurePosixPath", "PureWindowsPath")),
    *("numpy.ndarray", "numpy.dtype"),
    *(
        f"{core}.{name}"
        for core in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
}


def test_the_allowed_names_are_these() -> None:
    assert plain_global_names() == ALLOWED


class Call:
    """Pickled as a call of `name` with `arguments`, and a state given to the result."""

    def __init__(self, name: str, *arguments: Any, state: Any = None) -> None:
        self.name, self.arguments, self.state = name, arguments, state

    def __reduce__(self) -> Any:
        return (_Named(self.name), self.arguments, *([self.state] if self.state is not None else []))


class _Named:
    """Pickled as a global, whatever it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> None: ...

    def __reduce__(self) -> str:
        return self.name


def _saved(path: Path, extra: Any, *, legacy: bool = False) -> Path:
    """A checkpoint with weights and `extra`, in which `Call` pickles a call of any name."""
    torch.save(
        {"state_dict": {"bn.weight": torch.ones(3), "bn.bias": torch.zeros(3)}, "extra": extra},
        path,
        pickle_module=_pickle_with_names(),
        _use_new_zipfile_serialization=not legacy,
    )
    return path


def _pickle_with_names() -> Any:
    import pickle

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
        def save_global(self, obj: Any, name: Any = None) -> None:
            if isinstance(obj, _Named):
                module, _, attribute = obj.name.rpartition(".")
                self.write(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")
            else:
                super().save_global(obj, name)

    module = types.ModuleType("pickle_with_names")
    module.__dict__.update({**vars(pickle), "Pickler": Pickler})
    return module


def _read(path: Path) -> Any:
    return decode(path, detect_format(path), trust=False)["extra"]


ARRAYS = {
    dtype: np.arange(6).astype(dtype).reshape(2, 3)
    for dtype in ("?", "i1", "<i2", ">i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", ">f8", "c8", "c16")
}
SHARED = np.arange(3)
WHOLE: dict[str, Any] = {
    **{f"an array of {dtype}": array for dtype, array in ARRAYS.items()},
    "an array by columns": np.asfortranarray(ARRAYS["f4"]),
    "an array without dimensions": np.array(3.0),
    "an empty array": np.zeros((0, 3)),
    "a number": np.float32(0.1),
    "a truth value": np.bool_(True),
    "a complex number": np.complex64(1j),
    "a type": np.dtype(">f4"),
    "the state of random numbers": np.random.RandomState(1).get_state(),
    "arrays in containers": {"a": [np.ones(2), (np.zeros(1), {"b": np.ones(3)})], "c": collections.defaultdict(list)},
    "options": argparse.Namespace(lr=np.float64(0.1), mean=np.ones(3), type=float, path=pathlib.PurePosixPath("a/b")),
    "a namespace": types.SimpleNamespace(a=np.ones(2)),
    "a date": datetime.date(2024, 2, 29),
    "a moment": datetime.datetime(2024, 2, 29, 12, 30, 15, 999999, fold=1),
    "a moment in a zone": datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-5), "x")),
    "a time that passed": datetime.timedelta(days=-1, microseconds=3),
    "a range": range(3, 100, 7),
    "a slice": slice(1, None, 2),
    "a frozen set": frozenset({1, 2}),
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return type(other) is np.ndarray and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, argparse.Namespace | types.SimpleNamespace):
        return type(one) is type(other) and _same(vars(one), vars(other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", WHOLE.values(), ids=WHOLE)
def test_plain_values_come_back_as_they_were(tmp_path: Path, value: Any, legacy: bool) -> None:
    torch.save({"bn.weight": torch.ones(3), "extra": value}, tmp_path / "a", _use_new_zipfile_serialization=not legacy)
    found = _read(tmp_path / "a")
    assert _same(value, found)
    if isinstance(found, np.ndarray):
        assert found.flags.writeable
        assert not found.size or found.flags.f_contiguous == value.flags.f_contiguous


def test_an_array_used_twice_is_one_array(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": SHARED, "b": [SHARED]}
    value["itself"] = value
    torch.save({"bn.weight": torch.ones(3), "extra": value}, tmp_path / "a")
    found = _read(tmp_path / "a")
    assert found["a"] is found["b"][0]
    assert found["itself"] is found


def _dtype(name: Any = "f8", state: Any = (3, "<", None, None, None, -1, -1, 0)) -> Call:
    return Call("numpy.dtype", name, False, True, state=state)


def _array(shape: Any = (1,), dtype: Any = None, data: Any = bytes(8), *, version: Any = 1, order: Any = False) -> Call:
    state = (version, shape, dtype or _dtype(), order, data)
    return Call("numpy.core.multiarray._reconstruct", _Named("numpy.ndarray"), (0,), b"b", state=state)


FORGED: dict[str, tuple[Callable[[], Any], str]] = {
    "objects without the flag": (
        lambda: _array(dtype=_dtype("V8", (3, "|", None, ("a",), {"a": (_dtype("O8"), 0)}, 8, 1, 0))),
        "the numpy dtype 'V8', which is not a plain number",
    ),
    "objects": (lambda: np.array([{}], dtype=object), "the numpy dtype 'O8'"),
    "objects by another name": (lambda: _array(dtype=_dtype("O")), "the numpy dtype 'O'"),
    "a structure": (lambda: np.zeros(1, [("a", "f4")]), "the numpy dtype 'V4'"),
    "raw bytes": (lambda: np.zeros(1, "V8"), "the numpy dtype 'V8'"),
    "texts": (lambda: np.array(["a"]), "the numpy dtype 'U1'"),
    "bytes": (lambda: np.array([b"a"]), "the numpy dtype 'S1'"),
    "dates": (lambda: np.array(["2024-01-01"], "M8[D]"), "the numpy dtype 'M8'"),
    "extended precision": (lambda: np.zeros(1, "g"), "the numpy dtype 'f16'"),
    "a type that is none": (lambda: _dtype(7), "the numpy dtype 7"),
    "a type with parts": (
        lambda: _dtype("f8", (3, "<", (_dtype(), (2,)), None, None, -1, -1, 0)),
        "with fields, a subarray or flags",
    ),
    "a type with fields": (
        lambda: _dtype("f8", (3, "<", None, ("a",), {}, -1, -1, 0)),
        "with fields, a subarray or flags",
    ),
    "a type with a size": (
        lambda: _dtype("f8", (3, "<", None, None, None, 4, -1, 0)),
        "with fields, a subarray or flags",
    ),
    "a type with flags": (
        lambda: _dtype("f8", (3, "<", None, None, None, -1, -1, 63)),
        "with fields, a subarray or flags",
    ),
    "a type of a new version": (
        lambda: _dtype("f8", (9, "<", None, None, None, -1, -1, 0)),
        "with fields, a subarray or flags",
    ),
    "a strange byte order": (lambda: _dtype("f8", (3, "x", None, None, None, -1, -1, 0)), "the unknown byte order 'x'"),
    "too few bytes": (lambda: _array((2,)), "and 8 bytes, expected"),
    "too many bytes": (lambda: _array((1,), data=bytes(16)), "and 16 bytes, expected 8"),
    "a shape that overflows": (lambda: _array((2**32, 2**32)), "and 8 bytes, expected"),
    "a negative shape": (lambda: _array((-1, -1)), "a numpy array with the invalid shape (-1, -1)"),
    "a shape of no numbers": (lambda: _array((1.0,)), "a numpy array with the invalid shape (1.0,)"),
    "many dimensions": (lambda: _array((1,) * 40), "a numpy array with the invalid shape"),
    "a list of values": (lambda: _array(data=[1]), "is not that of plain numbers"),
    "another type for its type": (lambda: _array(dtype="f8"), "is not that of plain numbers"),
    "another version": (lambda: _array(version=9), "is not that of plain numbers"),
    "truth values that are none": (
        lambda: _array((8,), _dtype("b1"), b"\2" * 8),
        "booleans with bytes other than 0 and 1",
    ),
    "no values": (
        lambda: Call("numpy.core.multiarray._reconstruct", _Named("numpy.ndarray"), (0,), b"b"),
        "a numpy array without values",
    ),
    "another class": (
        lambda: Call("numpy.core.multiarray._reconstruct", _Named("builtins.list"), (0,), b"b"),
        "a subclass of numpy.ndarray",
    ),
    "a call of the class": (lambda: Call("numpy.ndarray", (10**12,)), "a call of numpy.ndarray"),
    "an array where none fits": (
        lambda: Call("builtins.slice", _array(), 1, 2),
        "inside an object that cannot have one",
    ),
    "a number of objects": (lambda: Call("numpy.core.multiarray.scalar", _dtype("O"), b"A" * 8), "the numpy dtype 'O'"),
    "a number with few bytes": (lambda: Call("numpy._core.multiarray.scalar", _dtype(), b"A"), "do not fit its dtype"),
    "a number without a type": (lambda: Call("numpy._core.multiarray.scalar", "f8", b"A" * 8), "do not fit its dtype"),
    "a month of 99": (lambda: Call("datetime.datetime", b"\x07\xe8\x63\x01" + bytes(6)), "month must be in 1..12"),
    "an hour of 200": (lambda: Call("datetime.datetime", b"\x07\xe8\x01\x01\xc8" + bytes(5)), "hour must be in 0..23"),
    "a day of 0": (lambda: Call("datetime.date", b"\x07\xe8\x01\x00"), "day is out of range for month"),
    "a moment that is none": (lambda: Call("datetime.datetime", 2024, 1, 1), "not pickled as ten bytes"),
    "a zone that is none": (
        lambda: Call("datetime.datetime", b"\x07\xe8\x01\x01" + bytes(6), 3),
        "not a datetime.timezone",
    ),
    "a date of texts": (lambda: Call("datetime.date", "a", "b", "c"), "expected whole numbers"),
    "bytes without end": (lambda: Call("builtins.bytes", 10**12), "a call of bytes with arguments"),
    "an endless range": (
        lambda: Call("builtins.list", Call("builtins.range", 10**12)),
        "a range of more than 1,000,000",
    ),
    "a range of huge numbers": (lambda: Call("builtins.range", 0, 10**30, 1), "a range of more than 1,000,000"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "message"), FORGED.values(), ids=FORGED)
def test_a_forged_value_is_refused(tmp_path: Path, make: Callable[[], Any], message: str, legacy: bool) -> None:
    path = _saved(tmp_path / "a.pt", make(), legacy=legacy)
    with pytest.raises(CheckpointError) as caught:
        normswap.load(path, architecture="timm:test_resnet")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


STORAGE = torch.ones(4)


def _tensor(function: str, *arguments: Any) -> Call:
    return Call(f"torch._utils.{function}", *arguments)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "memory as it is": (lambda: Call("torch.FloatTensor", 1000), "calls torch.FloatTensor, which no state dict needs"),
    "memory of a tensor": (lambda: Call("torch.Tensor", 1000), "calls torch.Tensor, which no state dict needs"),
    "memory of a storage": (lambda: Call("torch.storage.UntypedStorage", 1000), "calls torch.storage.UntypedStorage"),
    "a nested tensor": (
        lambda: _tensor("_rebuild_nested_tensor", *map(torch.tensor, ([1.0], [[99]], [[1]], [0]))),
        "calls torch._utils._rebuild_nested_tensor",
    ),
    "a wrapper": (
        lambda: _tensor("_rebuild_wrapper_subclass", _Named("torch.Tensor"), None, (4,), (1,), 0, None, None, False),
        "calls torch._utils._rebuild_wrapper_subclass",
    ),
    "a tensor of numpy": (
        lambda: _tensor("_rebuild_device_tensor_from_numpy", _array(), torch.float64, "cpu", False),
        "calls torch._utils._rebuild_device_tensor_from_numpy",
    ),
    "an argument that is no tuple": (
        lambda: Call("torch._utils._rebuild_tensor_v2", Call("builtins.tuple", [1]), 0, (4,), (1,), False, None),
        "it computes the storage",
    ),
    "bytes without end": (lambda: Call("builtins.bytearray", 10**12), "would run builtins.bytearray"),
    "a view beyond its storage": (
        lambda: _tensor("_rebuild_tensor_v2", STORAGE._typed_storage(), 0, (4096,), (1,), False, None),
        "reaches beyond its storage",
    ),
    "a view beyond its storage with attributes": (
        lambda: Call(
            "torch._tensor._rebuild_from_type_v2",
            _Named("torch._utils._rebuild_tensor_v2"),
            _Named("torch.Tensor"),
            (STORAGE._typed_storage(), 9, (4,), (1,), False, None),
            {},
        ),
        "reaches beyond its storage",
    ),
    "a quantized view beyond its storage": (
        lambda: _tensor("_rebuild_qtensor", STORAGE._typed_storage(), 0, (4096,), (1,), (None, 1.0, 0), False, None),
        "reaches beyond its storage",
    ),
    "a tensor that is given another view": (
        lambda: Call(
            "torch._utils._rebuild_tensor",
            STORAGE._typed_storage(), 0, (4,), (1,),
            state=(STORAGE._typed_storage(), 0, (4096,), (1,)),
        ),
        "reaches beyond its storage",
    ),
    "a tensor that is given what is not written out": (
        lambda: Call(
            "torch._utils._rebuild_tensor",
            STORAGE._typed_storage(), 0, (4,), (1,),
            state=Call("builtins.tuple", [STORAGE._typed_storage(), 0, (4096,), (1,)]),
        ),
        "it computes the storage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "message"), CALLS.values(), ids=CALLS)
def test_no_pickle_reads_memory_that_is_not_the_files(
    tmp_path: Path, make: Callable[[], Any], message: str, legacy: bool
) -> None:
    path = _saved(tmp_path / "a.pt", make(), legacy=legacy)
    with pytest.raises(CheckpointError) as caught:
        decode(path, detect_format(path), trust=False)
    assert message in str(caught.value)


def test_the_contents_of_state_dicts_are_read(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    whole = {
        "a": shared,
        "view": shared.t()[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "set": {1, 2},
        "bytes": b"abc",
        "array of bytes": bytearray(b"abc"),
        "complex": 1j,
        "named": collections.OrderedDict(a=1),
        "counted": collections.Counter("aab"),
    }
    tagged = torch.ones(2)
    tagged.note = "x"  # type: ignore[attr-defined]
    torch.save({"bn.weight": torch.ones(3), "extra": {**whole, "tagged": tagged}}, tmp_path / "a")
    found = _read(tmp_path / "a")
    assert torch.equal(found["view"], whole["view"])
    assert found["tagged"].note == "x"
    assert all(
        found[key] == whole[key]
        for key in ("size", "device", "set", "bytes", "array of bytes", "complex", "named", "counted")
    )
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))


class Options:
    """A class that a user has called safe."""

    def __init__(self, lr: float) -> None:
        self.lr = lr


def test_what_a_user_calls_safe_stays_safe_and_nothing_else_does(tmp_path: Path) -> None:
    torch.save({"bn.weight": torch.ones(3), "extra": Options(0.5)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"would run .*Options"):
        _read(tmp_path / "a")
    before, known = set(map(str, torch.serialization.get_safe_globals())), user_safe_globals()
    reconstruct = np.empty(0).__reduce__()[0]
    kinds = [
        Options,
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        type(np.dtype("V8")),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(kinds):
        allowed = set(map(str, torch.serialization.get_safe_globals()))
        assert _read(tmp_path / "a").lr == 0.5
        assert set(map(str, torch.serialization.get_safe_globals())) == allowed
        assert user_safe_globals() - known == {f"{Options.__module__}.Options"}
        with pytest.raises(CheckpointError, match="the numpy dtype 'V8'"):
            _read(_saved(tmp_path / "b", FORGED["objects without the flag"][0]()))
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_a_failed_read_gives_the_list_of_torch_back(tmp_path: Path) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    with pytest.raises(ZeroDivisionError), plain_globals():
        raise ZeroDivisionError
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_a_tar_in_the_clothes_of_a_legacy_file_is_refused(tmp_path: Path) -> None:
    """Before 0.1.10 torch wrote archives of tar: the first name in one may be the magic number of what came later."""
    head = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e").ljust(257, b"\0") + b"ustar\0" + b"00"
    (tmp_path / "a").write_bytes(head.ljust(1536, b"\0"))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        normswap.load(tmp_path / "a", architecture="timm:test_resnet")
