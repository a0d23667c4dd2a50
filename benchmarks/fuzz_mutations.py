"""Mutations: bytes of a good file and random numbers in, bytes of a bad one out, or None where they do not fit.

Blind ones hit any file; others know zip archives, pickles, JSON records and the header of safetensors, and keep all the
rest right, so that the damage gets past the first look.
"""

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzz_files import Payloads
from fuzz_hostile import HOLES, configured, holes, numpy_object, record_beside


class Material(NamedTuple):
    """What a mutation may use: random numbers, another good file, payloads."""

    random: Random
    other: bytes
    payloads: Payloads


Mutation = Callable[[bytes, Material], bytes | None]

_EXTREMES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_NUMBERS = {"<B": 0xFF, "<H": 0xFFFF, "<I": 2**32 - 1, "<Q": 2**64 - 1}
_STRUCTURES = re.compile(rb"PK[\x01-\x07][\x02-\x08]")


# Blind.


def _bit_flips(data: bytes, use: Material) -> bytes:
    changed = bytearray(data)
    for _ in range(use.random.choice((1, 1, 3, 20))):
        changed[use.random.randrange(len(changed))] ^= 1 << use.random.randrange(8)
    return bytes(changed)


def _truncation(data: bytes, use: Material) -> bytes:
    return data[: use.random.randrange(len(data))]


def _chunk(data: bytes, use: Material) -> tuple[int, int]:
    start = use.random.randrange(len(data))
    return start, min(len(data), start + use.random.choice((1, 2, 4, 8, 64, 512, 4096)))


def _deletion(data: bytes, use: Material) -> bytes:
    start, end = _chunk(data, use)
    return data[:start] + data[end:]


def _duplication(data: bytes, use: Material) -> bytes:
    start, end = _chunk(data, use)
    return data[:end] + data[start:]


def _swap(data: bytes, use: Material) -> bytes:
    (a, b), (c, d) = sorted((_chunk(data, use), _chunk(data, use)))
    if b > c:
        return data[:a] + bytes(b - a) + data[b:]
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(data: bytes, use: Material) -> bytes:
    return data[: use.random.randrange(len(data))] + use.other[use.random.randrange(len(use.other)) :]


def _numbers(data: bytes, use: Material) -> bytes:
    """An extreme number where a number is: in a structure of the archive, or in the first bytes."""
    places = [match.start() + use.random.randrange(4, 46) for match in _STRUCTURES.finditer(data)]
    place = use.random.choice(places) if places and use.random.random() < 0.9 else use.random.randrange(64)
    form, most = use.random.choice(list(_NUMBERS.items()))
    packed = struct.pack(form, use.random.choice(_EXTREMES) & most)
    return data[:place] + packed + data[place + len(packed) :]


# Zip archives.


def _members(data: bytes) -> dict[str, bytes] | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        return None


def _archive(members: Sequence[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of double names, which are what is wanted
        for name, content in members:
            # With the date of ZipInfo, which is always the same.
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def _zip_edit(data: bytes, use: Material) -> bytes | None:
    members = list((_members(data) or {}).items())
    if not members:
        return None
    random = use.random
    index = random.randrange(len(members))
    name, content = members[index]
    root, _, rest = name.partition("/")
    another = random.choice(members)
    changed = random.choice(
        (
            [(f"{root}/{random.choice(('x', 'data/9', 'normswap.json', 'constants.pkl'))}", content)],
            [
                (
                    random.choice(
                        ("/" + name, "../" + name, f"{root}/../{rest}", name.replace("/", "\\"), "other/" + rest)
                    ),
                    content,
                )
            ],
            [(name, content), (name, content)],
            [(name, content), (name, another[1])],
            [],
            [(name, another[1])],
            [(name, content[: random.randrange(len(content) + 1)])],
            [(name, content + bytes(random.choice((1, 100, 100_000))))],
            [(name, random.randbytes(len(content)))],
            [(name, b"")],
            [(name, content), (f"{root}/bomb", bytes(80_000_000))],
        )
    )
    packed = random.random() < 0.1 or any(len(content) > 10**7 for _, content in changed)
    members[index : index + 1] = changed
    if random.random() < 0.1:
        random.shuffle(members)
    return _archive(members, compression=zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)


def _planted_member(data: bytes, use: Material) -> bytes | None:
    """A payload in place of a member: a pickle as it is, or in a torch file of its own."""
    members = _members(data)
    if not members:
        return None
    likely = [name for name in members if re.search(r"pkl|constants|\.pt$|sample_inputs|json$", name)] or list(members)
    name = use.random.choice(likely)
    pickled = use.random.choice(use.payloads.pickles)
    nested = _archive([("a/data.pkl", pickled), ("a/version", b"3\n")])
    new = {name: use.random.choice((pickled, nested))}
    if use.random.random() < 0.3:
        new = {
            name: members[name],
            f"{name.partition('/')[0]}/{use.random.choice(('data.pkl', 'constants.pkl'))}": pickled,
        }
    return _archive(list((members | new).items()))


# Pickles: alone, or in an archive.


def _in_pickle(edit: Mutation) -> Mutation:
    def mutate(data: bytes, use: Material) -> bytes | None:
        members = _members(data)
        if members is None:
            return edit(data, use) if data[:1] == b"\x80" else None
        names = [name for name in members if name.endswith(".pkl")]
        if not names:
            return None
        name = use.random.choice(names)
        changed = edit(members[name], use)
        return None if changed is None else _archive(list((members | {name: changed}).items()))

    return mutate


_GLOBAL = re.compile(rb"c[\w.]+\n[\w.]+\n")


def _planted_call(data: bytes, use: Material) -> bytes:
    """A payload that runs first, or in place of something: its value is dropped or kept."""
    call = use.random.choice(use.payloads.calls)
    places = [match.start() for match in re.finditer(rb"\x80[\x02-\x05]|}q|\(X|h.h", data)]
    place = use.random.choice(places) + 2
    return data[:place] + call + use.random.choice((b"0", b"0", b"")) + data[place:]


def _other_global(data: bytes, use: Material) -> bytes | None:
    """Another function where the pickle names one: of a payload, or a harmless one that is not meant."""
    found = list(_GLOBAL.finditer(data))
    if not found:
        return None
    payload = b"c" + use.random.choice(use.payloads.calls)[1:].split(b"X", 1)[0]
    names = (
        payload,
        payload,
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nIntStorage\n",
        b"ccollections\nOrderedDict\n",
    )
    match = use.random.choice(found)
    return data[: match.start()] + use.random.choice(names) + data[match.end() :]


def _opcode_swap(data: bytes, use: Material) -> bytes:
    changed = bytearray(data)
    changed[use.random.randrange(min(len(changed), 3000))] = use.random.choice(
        b"().0123]}eusRbtcXKJMNhqrjQ\x81\x85\x86\x87\x8a\x94"
    )
    return bytes(changed)


def _pickled_number(data: bytes, use: Material) -> bytes | None:
    """An extreme number in place of a small one: sizes, strides, offsets, numbers of elements."""
    found = [match.start() for match in re.finditer(rb"K[\x00-\x40](?=[K\x85-\x87tq])", data)]
    if not found:
        return None
    place = use.random.choice(found)
    number = use.random.choice(
        (-(2**63), -1, 0, 1, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**61, 2**63 - 1, 2**63, 2**80)
    )
    packed = number.to_bytes(12, "little", signed=True)
    return data[:place] + b"\x8a" + bytes([len(packed)]) + packed + data[place + 2 :]


def _bomb(data: bytes, use: Material) -> bytes:
    """Tuples of tuples, each used twice, as a key; or lists in lists, deeper than any stack."""
    pairs = b"".join(b"j" + struct.pack("<I", n) + b"\x86r" + struct.pack("<I", n + 1) for n in range(9000, 9060))
    tuples = b"}X\x01\0\0\0a\x85r" + struct.pack("<I", 9000) + pairs + b"K\x01s0"
    lists = b"]" * 5000 + b"a" * 4999 + b"0"
    place = data.find(b"\x80") + 2
    return data[:place] + use.random.choice((tuples, lists)) + data[place:]


# JSON: the record, the header of safetensors, the documents in a .pt2.

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "bn", "../../x",
    "nul\0byte", "\ud800", "[/bold]", "\x1b[31m", "two\nlines", [], {}, [[]],
    {"version": 1}, "long" * 50_000, list(range(2000)),
)  # fmt: skip
_DEEP = '"deep"'


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in entries:
        found += [(value, key), *_places(item)]
    return found


def _edited(text: str, use: Material) -> str | None:
    random = use.random
    document = json.loads(text)
    # The outer levels as often as the many small things deep inside.
    places = _places(document)
    near = [(document, key) for key in document] if isinstance(document, dict) else places
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        if not places:
            return None
        holder, key = random.choice(near if random.random() < 0.4 else places)
        if isinstance(holder, dict) and random.random() < 0.2:
            holder[random.choice(("", "x", "architecture", "version", "plan", "shape"))] = holder.pop(key, None)
        else:
            holder[key] = random.choice((*_VALUES, "deep"))
    if isinstance(document, dict) and "architecture" in document and random.random() < 0.3:
        document["architecture"] = random.choice(use.payloads.architectures)
    edited = json.dumps(document).replace(_DEEP, "[" * 100_000 + "]" * 100_000)
    if random.random() < 0.05:
        edited = edited[:-1] + ", " + edited[1:]  # every key twice
    return edited


def _json_member(data: bytes, use: Material) -> bytes | None:
    members = _members(data)
    names = [name for name in members or () if name.endswith(".json")]
    if not members or not names:
        return None
    name = use.random.choice(names)
    edited = _edited(members[name].decode(), use)
    return (
        None if edited is None else _archive(list((members | {name: edited.encode("utf-8", "surrogatepass")}).items()))
    )


def _json_file(data: bytes, use: Material) -> bytes | None:
    """A file that is JSON, such as the index of a folder."""
    try:
        edited = _edited(data.decode(), use)
    except ValueError:
        return None
    return None if edited is None else edited.encode("utf-8", "surrogatepass")


def _header(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > len(data) - 8:
        return None
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(text: str, rest: bytes) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + rest


def _safetensors_header(data: bytes, use: Material) -> bytes | None:
    parts = _header(data)
    if parts is None:
        return None
    edited = _edited(json.dumps(parts[0]), use)
    return None if edited is None else _with_header(edited, parts[1])


def _safetensors_record(data: bytes, use: Material) -> bytes | None:
    parts = _header(data)
    if parts is None or "normswap" not in parts[0].get("__metadata__", {}):
        return None
    header, rest = parts
    edited = _edited(header["__metadata__"]["normswap"], use)
    if edited is None:
        return None
    header["__metadata__"]["normswap"] = edited
    return _with_header(json.dumps(header), rest)


def _invented_record(data: bytes, use: Material) -> bytes | None:
    """A record where there is none, that names an architecture of its own."""
    record = json.dumps(
        {"version": 1, "payload": "state dict", "architecture": use.random.choice(use.payloads.architectures)}
    )
    members = _members(data)
    if members:
        return _archive([*members.items(), (f"{next(iter(members)).partition('/')[0]}/normswap.json", record.encode())])
    parts = _header(data)
    if parts is None:
        return None
    parts[0].setdefault("__metadata__", {})["normswap"] = record
    return _with_header(json.dumps(parts[0]), parts[1])


MUTATIONS: Mapping[str, Mutation] = {
    "bit flips": _bit_flips,
    "truncation": _truncation,
    "chunk deleted": _deletion,
    "chunk doubled": _duplication,
    "chunks swapped": _swap,
    "spliced with another file": _splice,
    "extreme numbers": _numbers,
    "zip members edited": _zip_edit,
    "payload as a member": _planted_member,
    "payload in a pickle": _in_pickle(_planted_call),
    "another global in a pickle": _in_pickle(_other_global),
    "opcode swapped": _in_pickle(_opcode_swap),
    "number in a pickle": _in_pickle(_pickled_number),
    "bomb in a pickle": _in_pickle(_bomb),
    "numpy object in a pickle": _in_pickle(numpy_object),
    "JSON member edited": _json_member,
    "JSON file edited": _json_file,
    "safetensors header edited": _safetensors_header,
    "record edited": _safetensors_record,
    "record invented": _invented_record,
}


# Folders.


def files_in(folder: Path) -> list[Path]:
    """The files in a folder that have something in them, in a fixed order."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def _removed(folder: Path, use: Material) -> None:
    use.random.choice(files_in(folder)).unlink()


def _emptied(folder: Path, use: Material) -> None:
    use.random.choice(files_in(folder)).write_bytes(b"")


def _exchanged(folder: Path, use: Material) -> None:
    first, second = use.random.sample(files_in(folder), 2)
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)


def _replaced(folder: Path, use: Material) -> None:
    use.random.choice(files_in(folder)).write_bytes(use.other)


def _folder_in_its_place(folder: Path, use: Material) -> None:
    file = use.random.choice(files_in(folder))
    file.unlink()
    file.mkdir()


def _linked_away(folder: Path, use: Material) -> None:
    file = use.random.choice(files_in(folder))
    file.unlink()
    file.symlink_to(use.random.choice((file.name, "nowhere", "/dev/null", "..", use.payloads.marker.parent)))


FOLDER_MUTATIONS: Mapping[str, Callable[[Path, Material], None]] = {
    "file removed": _removed,
    "file emptied": _emptied,
    "two files exchanged": _exchanged,
    "another kind of file": _replaced,
    "folder for a file": _folder_in_its_place,
    "link for a file": _linked_away,
    "record put beside": record_beside,
    "configuration put beside": configured,
    HOLES: holes,
}


def mutate_folder(folder: Path, use: Material) -> str:
    """Damage a folder as such, or one file in it; return the name of what was done."""
    if use.random.random() < 0.3:
        name = use.random.choice(list(FOLDER_MUTATIONS))
        FOLDER_MUTATIONS[name](folder, use)
        return name
    file = use.random.choice(files_in(folder))
    data = file.read_bytes()
    edited = _json_file(data, use) if use.random.random() < 0.6 else None  # or hardly any index would be edited
    name, changed = mutate(data, use) if edited is None else ("JSON file edited", edited)
    file.write_bytes(changed)
    return name


def mutate(data: bytes, use: Material) -> tuple[str, bytes]:
    """Return the name of a mutation that fits and what it makes of `data`."""
    while True:
        name = use.random.choice(list(MUTATIONS))
        changed = MUTATIONS[name](data, use)
        if changed is not None:
            return name, changed
