"""Checks of archives, headers and pickles: malformed ones are refused with a reason, those of real libraries pass."""

import io
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import normswap
from normswap.checkpoints.formats import archive_checks
from normswap.checkpoints.formats.archive_checks import (
    check_archive,
    check_legacy_pickle,
    check_safetensors,
    check_zip_pickle,
)
from normswap.checkpoints.formats.pickle_opcodes import StorageClaim, summarize_pickle
from normswap.errors import CheckpointError
from tests.helpers import files

GOOD = {"m/data.pkl": b"\x80\x02}q\x00.", "m/data/0": bytes(100), "m/version": b"3\n"}


def archive(members: dict[str, bytes], **options: int) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as writer:
        for name, data in members.items():
            writer.writestr(name, data)
    return bytearray(buffer.getvalue())


def double() -> bytearray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        buffer = io.BytesIO(archive(GOOD))
        with zipfile.ZipFile(buffer, "a") as writer:
            writer.writestr("m/data.pkl", b"\x80\x02}q\x00.")
    return bytearray(buffer.getvalue())


def patched(at: Callable[[bytearray], int], value: bytes, **options: int) -> bytearray:
    data = archive(GOOD, **options)
    place = at(data)
    data[place : place + len(value)] = value
    return data


def in_directory(offset: int, index: int = 1) -> Callable[[bytearray], int]:
    """A place in the entry of a member in the directory at the end."""

    def find(data: bytearray) -> int:
        place = -1
        for _ in range(index + 1):
            place = data.find(b"PK\x01\x02", place + 1)
        return place + offset

    return find


def in_header(offset: int, index: int = 1) -> Callable[[bytearray], int]:
    """A place in the header in front of a member."""

    def find(data: bytearray) -> int:
        place = -1
        for _ in range(index + 1):
            place = data.find(b"PK\x03\x04", place + 1)
        return place + offset

    return find


def with_zip64_end(count: int, *, pointer: int | None = None, classic: int = 0xFFFF) -> bytearray:
    data = archive(GOOD)
    at = data.rfind(b"PK\x05\x06")
    directory = struct.unpack_from("<2I", data, at + 12)
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, *directory)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at if pointer is None else pointer, 1)
    tail = data[at:]
    struct.pack_into("<2H", tail, 8, classic, classic)
    return data[:at] + end + locator + tail


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "too many members": (lambda: with_zip64_end(300_000), "300,000 archive members, expected at most 250,000"),
    "two end records": (lambda: with_zip64_end(3, classic=2), "its two end records list 2 and 3 members"),
    "a lost end record": (lambda: with_zip64_end(3, pointer=7), "no 64-bit end record at its declared offset"),
    "an end far away": (lambda: with_zip64_end(3, pointer=2**64 - 1), "no 64-bit end record at its declared offset"),
    "a miscounted end": (
        lambda: patched(lambda d: d.rfind(b"PK\x05\x06") + 8, b"\x02\0\x02\0"),
        "3 archive members, its end record lists 2",
    ),
    "no end": (lambda: archive(GOOD)[:-30], "starts like a torch file and has no end record: truncated, copy it again"),
    "a damaged directory": (lambda: patched(in_directory(0), b"XX"), "truncated or damaged (Bad magic number for cent"),
    "two of a name": (double, "two members have the name 'm/data.pkl'"),
    "an absolute name": (
        lambda: archive(GOOD | {"/etc/x": b""}),
        "the name of the member '/etc/x' points outside the archive",
    ),
    "a drive": (lambda: archive(GOOD | {"C:/x": b""}), "the name of the member 'C:/x' points outside the archive"),
    "a parent": (
        lambda: archive(GOOD | {"m/../../x": b""}),
        "the name of the member 'm/../../x' points outside the archive",
    ),
    "a backslash": (
        lambda: archive(GOOD | {"m\\x": b""}),
        "the name of the member 'm\\\\x' points outside the archive",
    ),
    "a NUL": (lambda: patched(in_directory(46 + 4), b"\0"), "points outside the archive"),
    "a second folder": (lambda: archive(GOOD | {"n/data/1": b""}), "the member 'n/data/1' is outside its folder 'm'"),
    "encrypted": (lambda: patched(in_directory(8), b"\x01"), "the member 'm/data/0' is encrypted"),
    "another method": (lambda: patched(in_directory(10), b"\x0c"), "'m/data/0' has the unknown compression 12"),
    "two sizes": (
        lambda: patched(in_directory(24), b"\xff\xff"),
        "'m/data/0' is uncompressed and has two different sizes",
    ),
    "a bomb": (
        lambda: patched(in_directory(24), struct.pack("<I", 2**31), compression=zipfile.ZIP_DEFLATED),
        "a zip bomb, its 0.0 MB inflate to 2,147 MB",
    ),
    "overlapping": (
        lambda: patched(in_directory(42), bytes(4)),
        "the member 'm/data/0' overlaps the previous one",
    ),
    "beyond the file": (
        lambda: patched(in_directory(20, 2), struct.pack("<2I", 2**20, 2**20)),
        "the member 'm/version' has no data inside the file",
    ),
    "nowhere": (lambda: patched(in_directory(42, 2), b"\xff\xff\xff\x00"), "'m/version' has no data inside the file"),
    "no header": (lambda: patched(in_header(0), b"XX"), "the member 'm/data/0' has no data inside the file"),
    "two names": (
        lambda: patched(in_header(30), b"n"),
        "the header of the member 'm/data/0' has another name ('n/data/0')",
    ),
    "two methods": (lambda: patched(in_header(8), b"\x08"), "has another name ('m/data/0') or another compression"),
    "sizes that differ": (lambda: patched(in_header(18), b"\x05"), "contradicting sizes, (100, 100) and (5, 100)"),
}


@pytest.mark.parametrize(("make", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_not_safe_is_refused(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(make())
    with pytest.raises(CheckpointError) as caught:
        check_archive(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    with pytest.raises(CheckpointError, match=re.escape(str(caught.value))):
        normswap.load(path, architecture=files.TiedNet)


@pytest.mark.parametrize(
    "make",
    [
        lambda: archive(GOOD),
        lambda: archive(GOOD, compression=zipfile.ZIP_DEFLATED),
        lambda: archive(GOOD) + b"trailing data",
        lambda: with_zip64_end(3),
        lambda: with_zip64_end(3, classic=3),
        lambda: archive({"m/": b"", **GOOD}),
        lambda: archive({"word/a.xml": b"", "b.xml": b""}),
    ],
    ids=[
        "stored",
        "packed",
        "trailing data",
        "64 bits",
        "64 bits in both records",
        "a folder",
        "another kind of archive",
    ],
)
def test_an_honest_archive_passes(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "good.pt").write_bytes(make())
    check_archive(tmp_path / "good.pt")


def test_what_torch_writes_passes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {"net": net.state_dict(), "half": torch.ones(3).half(), "optimizer": optimizer.state_dict()}
    torch.save(
        content | {"empty": torch.ones(0), "view": torch.arange(9)[2:4], "c": torch.ones(2).cfloat()}, tmp_path / "a"
    )
    torch.save(net, tmp_path / "module")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(tmp_path / "script"))
        torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), tmp_path / "export.pt2")
    for path in tmp_path.iterdir():
        check_archive(path)
    for name in ("a", "module"):
        check_zip_pickle(tmp_path / name)
    torch.save(content, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    check_legacy_pickle(tmp_path / "legacy")


# safetensors.


def safetensors_file(path: Path, header: str) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    return path


_ENTRY = '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'
HEADERS = {
    "a tensor twice": (
        f'{{"a": {_ENTRY}, "a": {_ENTRY}}}',
        "its header has 'a' twice: the file is damaged or malicious",
    ),
    "metadata twice": (
        f'{{"__metadata__": {{"normswap": "1", "normswap": "2"}}, "a": {_ENTRY}}}',
        "its header has 'normswap' twice: the file is damaged or malicious",
    ),
    "an overflow": (
        f'{{"z": {{"dtype": "F32", "shape": [9223372036854775808, 0], "data_offsets": [0, 0]}}, "a": {_ENTRY}}}',
        "the shape of 'z' overflows 64 bits: the file is damaged or malicious",
    ),
    "an overflow around a zero": (
        f'{{"z": {{"dtype": "F32", "shape": [4294967296, 0, 4294967296], "data_offsets": [0, 0]}}, "a": {_ENTRY}}}',
        "the shape of 'z' overflows 64 bits: the file is damaged or malicious",
    ),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_its_own_reader_lets_pass_is_refused(tmp_path: Path, header: str, message: str) -> None:
    path = safetensors_file(tmp_path / "bad.safetensors", header)
    with safetensors.safe_open(path, framework="pt"):
        pass
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load(path, architecture=files.TiedNet)


OWN_REFUSALS = {
    "nested": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "an unknown type": f'{{"a": {_ENTRY.replace("F32", "X32")}}}',
    "a negative length": f'{{"a": {_ENTRY.replace("[4]", "[-4]")}}}',
    "an overflow of bytes": f'{{"a": {_ENTRY.replace("[4]", "[9223372036854775808, 4]")}}}',
    "a hole": f'{{"a": {_ENTRY.replace("[4]", "[2]").replace("0, 16", "8, 16")}}}',
    "an overlap": f'{{"a": {_ENTRY}, "b": {_ENTRY}}}',
    "beyond the file": f'{{"a": {_ENTRY.replace("[4]", "[8]").replace("16", "32")}}}',
    "metadata that is no text": f'{{"__metadata__": {{"normswap": 1}}, "a": {_ENTRY}}}',
}


@pytest.mark.parametrize("header", OWN_REFUSALS.values(), ids=OWN_REFUSALS)
def test_what_the_reader_of_safetensors_refuses_is_one_line(tmp_path: Path, header: str) -> None:
    path = safetensors_file(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(Error while deserializing header"):
        normswap.load(path, architecture=files.TiedNet)


def test_what_safetensors_writes_passes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "empty": torch.ones(0, 4), "number": torch.tensor(3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    check_safetensors(tmp_path / "a.safetensors")


# What a pickle declares.


def tensor_pickle(
    *, shape: bytes = b"K\x04", stride: bytes = b"K\x01", elements: bytes = b"K\x04", kind: bytes = b"FloatStorage"
) -> bytes:
    """A state dict of one tensor, as torch writes it; its numbers as opcodes."""
    return b"".join(
        (
            b"\x80\x02}q\x00X\x01\0\0\0aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\0\0\0storageq\x03",
            b"ctorch\n" + kind + b"\nq\x04X\x01\0\0\x000q\x05X\x03\0\0\0cpuq\x06" + elements + b"tq\x07QK\x00",
            shape + b"\x85q\x08" + stride + b"\x85q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds.",
        )
    )


def bomb(levels: int) -> bytes:
    """A dict whose key is a tuple of two equal tuples of two equal tuples ..."""
    pairs = b"".join(b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels))
    return b"\x80\x02}X\x01\0\0\0a\x85q\x00" + pairs + b"K\x01s."


CLAIMS = {
    "a storage larger than its record": (
        tensor_pickle(elements=b"K\x05"),
        "the storage '0' declares 20 bytes, its record has 16: the file is damaged or malicious",
    ),
    "a storage smaller than its record": (
        tensor_pickle(elements=b"K\x02", shape=b"K\x02"),
        "declares 8 bytes, its record has 16",
    ),
    "another type": (tensor_pickle(kind=b"DoubleStorage"), "declares 32 bytes, its record has 16"),
    "a negative storage": (
        tensor_pickle(elements=b"J\xfe\xff\xff\xff"),
        "the storage '0' declares -2 elements: damaged",
    ),
    "a repeated number": (
        tensor_pickle(shape=b"\x8a\x05\0\0\0\0\x40", stride=b"K\x00"),
        "a tensor declares the shape 274877906944, the file has ",
    ),
    "a view beyond its storage": (
        tensor_pickle(shape=b"K\x03", stride=b"K\x02"),
        "a tensor of the shape 3 reaches beyond its storage of 4 elements: the file is damaged or malicious",
    ),
    "a tuple of tuples": (bomb(60), "a nested tuple expands to 3,"),
}


@pytest.mark.parametrize(
    ("legacy", "name"),
    # torch reads the size of a legacy storage from its header, not from the pickle.
    [(legacy, name) for legacy in (False, True) for name in CLAIMS if not (legacy and "its record" in CLAIMS[name][1])],
)
def test_what_a_pickle_must_not_claim(tmp_path: Path, legacy: bool, name: str) -> None:
    pickle, message = CLAIMS[name]
    path = tmp_path / "bad.pt"
    if legacy:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"\x80\x02}q\x00.", pickle, 1))
        assert path.read_bytes().count(pickle) == 1
    else:
        path.write_bytes(archive({"m/data.pkl": pickle, "m/data/0": bytes(16), "m/version": b"3\n"}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load(path, architecture=files.TiedNet)


def test_the_unchanged_pickle_is_good(tmp_path: Path) -> None:
    """Else the tests above prove nothing."""
    (tmp_path / "a.pt").write_bytes(
        archive({"m/data.pkl": tensor_pickle(), "m/data/0": bytes(16), "m/byteorder": b"little", "m/version": b"3\n"})
    )
    check_zip_pickle(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["a"].tolist() == [0, 0, 0, 0]


def test_legacy_storages_that_claim_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    torch.save({"a": torch.ones(5000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"M\x88\x13", b"M\xff\xff"))
    with pytest.raises(CheckpointError, match=r"its tensors declare 262,140 bytes, the file has 20,\d+: truncated or"):
        normswap.load(path, architecture=files.TiedNet)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_opcodes_of_every_protocol_are_followed(tmp_path: Path, protocol: int) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5).double(), "n": [1, (2, 3), {"x": torch.ones(2).long()}]}
    torch.save(tensors, tmp_path / "a.pt", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "a.pt") as reader:
        summary = summarize_pickle(io.BytesIO(reader.read("a/data.pkl")))
    assert [(storage.kind, storage.elements) for storage in summary.storages] == [
        ("torch.FloatStorage", 12),
        ("torch.DoubleStorage", 5),
        ("torch.LongStorage", 2),
    ]
    assert [tensor.shape for tensor in summary.tensors] == [(3, 4), (5,), (2,)]


def test_a_damaged_pickle_is_followed_as_far_as_it_goes() -> None:
    whole = tensor_pickle()
    assert summarize_pickle(io.BytesIO(whole)).storages == (StorageClaim("torch.FloatStorage", "0", 4),)
    assert summarize_pickle(io.BytesIO(whole[: whole.index(b"QK")])).storages == ()
    for damaged in (b"", b"\x80\x02t.", b"\x80\x02R.", b"\x80\x02h\x07.", b"\xff\xff", b"\x80\x02)\x81R."):
        assert summarize_pickle(io.BytesIO(damaged)).storages == ()


def test_every_storage_class_of_torch_has_a_size() -> None:
    for dtype in (torch.uint8, torch.int8, torch.bool, torch.int16, torch.float16, torch.bfloat16, torch.int32):
        name = torch.storage._dtype_to_storage_type_map()[dtype]
        assert archive_checks._declared_bytes(StorageClaim(f"torch.{name}", "0", 3)) == 3 * dtype.itemsize
    for dtype in (torch.float32, torch.int64, torch.float64, torch.complex64, torch.complex128):
        name = torch.storage._dtype_to_storage_type_map()[dtype]
        assert archive_checks._declared_bytes(StorageClaim(f"torch.{name}", "0", 3)) == 3 * dtype.itemsize
    assert archive_checks._declared_bytes(StorageClaim("torch.storage.UntypedStorage", "0", 3)) == 3
    assert archive_checks._declared_bytes(StorageClaim("torch.NewStorage", "0", 3)) is None
