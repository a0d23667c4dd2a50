"""Mutations that know the structure of a file: zip archives, pickles, JSON documents and the header of safetensors."""

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

from benchmarks.robustness.files import Material, Mutation

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
        warnings.simplefilter("ignore", UserWarning)  # duplicate names are intended
        for name, content in members:
            # ZipInfo has a fixed date.
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def zip_edit(data: bytes, use: Material) -> bytes | None:
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


def planted_member(data: bytes, use: Material) -> bytes | None:
    """Replace a member by a payload, or add one: a pickle, or a torch file that contains it."""
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


# Pickles, as a file or as a member of an archive.


def in_pickle(edit: Mutation) -> Mutation:
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


def planted_call(data: bytes, use: Material) -> bytes:
    """Insert a payload; its value is dropped or kept."""
    call = use.random.choice(use.payloads.calls)
    places = [match.start() for match in re.finditer(rb"\x80[\x02-\x05]|}q|\(X|h.h", data)]
    place = use.random.choice(places) + 2
    return data[:place] + call + use.random.choice((b"0", b"0", b"")) + data[place:]


def other_global(data: bytes, use: Material) -> bytes | None:
    """Replace a global by that of a payload, or by a harmless one."""
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


def opcode_swap(data: bytes, use: Material) -> bytes:
    changed = bytearray(data)
    changed[use.random.randrange(min(len(changed), 3000))] = use.random.choice(
        b"().0123]}eusRbtcXKJMNhqrjQ\x81\x85\x86\x87\x8a\x94"
    )
    return bytes(changed)


def pickled_number(data: bytes, use: Material) -> bytes | None:
    """Replace a small number, such as a size, a stride or an offset, by an extreme one."""
    found = [match.start() for match in re.finditer(rb"K[\x00-\x40](?=[K\x85-\x87tq])", data)]
    if not found:
        return None
    place = use.random.choice(found)
    number = use.random.choice(
        (-(2**63), -1, 0, 1, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**61, 2**63 - 1, 2**63, 2**80)
    )
    packed = number.to_bytes(12, "little", signed=True)
    return data[:place] + b"\x8a" + bytes([len(packed)]) + packed + data[place + 2 :]


def bomb(data: bytes, use: Material) -> bytes:
    """Insert exponentially growing tuples as a key, or lists nested deeper than the stack allows."""
    pairs = b"".join(b"j" + struct.pack("<I", n) + b"\x86r" + struct.pack("<I", n + 1) for n in range(9000, 9060))
    tuples = b"}X\x01\0\0\0a\x85r" + struct.pack("<I", 9000) + pairs + b"K\x01s0"
    lists = b"]" * 5000 + b"a" * 4999 + b"0"
    place = data.find(b"\x80") + 2
    return data[:place] + use.random.choice((tuples, lists)) + data[place:]


# JSON: the record, the header of safetensors, the documents of a .pt2 archive.

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "bn", "../../x",
    "nul\0byte", "\ud800", "[/bold]", "\x1b[31m", "two\nlines", [], {}, [[]],
    {"version": 1}, "long" * 50_000, list(range(2000)),
)  # fmt: skip
_DEEP = '"deep"'


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every pair of a container and a key in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in entries:
        found += [(value, key), *_places(item)]
    return found


def _edited(text: str, use: Material) -> str | None:
    random = use.random
    document = json.loads(text)
    # Choose the top level often: most keys are in the lower levels.
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


def json_member(data: bytes, use: Material) -> bytes | None:
    members = _members(data)
    names = [name for name in members or () if name.endswith(".json")]
    if not members or not names:
        return None
    name = use.random.choice(names)
    edited = _edited(members[name].decode(), use)
    return (
        None if edited is None else _archive(list((members | {name: edited.encode("utf-8", "surrogatepass")}).items()))
    )


def json_file(data: bytes, use: Material) -> bytes | None:
    """Edit a JSON file, such as the index of a folder."""
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


def safetensors_header(data: bytes, use: Material) -> bytes | None:
    parts = _header(data)
    if parts is None:
        return None
    edited = _edited(json.dumps(parts[0]), use)
    return None if edited is None else _with_header(edited, parts[1])


def safetensors_record(data: bytes, use: Material) -> bytes | None:
    parts = _header(data)
    if parts is None or "normswap" not in parts[0].get("__metadata__", {}):
        return None
    header, rest = parts
    edited = _edited(header["__metadata__"]["normswap"], use)
    if edited is None:
        return None
    header["__metadata__"]["normswap"] = edited
    return _with_header(json.dumps(header), rest)


def added_record(data: bytes, use: Material) -> bytes | None:
    """Add a record that names an architecture of a payload."""
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
