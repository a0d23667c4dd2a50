"""All mutations by name, and those that need no knowledge of the file format.

A mutation gets the bytes of a valid file and random numbers. It returns the bytes of a damaged file, or None if it does
not apply to this kind of file. Mutations with knowledge of the format keep everything else valid, so the damage passes
the first checks.
"""

import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.robustness.files import Material, Mutation
from benchmarks.robustness.hostile_mutations import HOLES, added_configuration, added_record, holes, numpy_object
from benchmarks.robustness.structured_mutations import (
    added_record as added_record_to_file,
)
from benchmarks.robustness.structured_mutations import (
    bomb,
    in_pickle,
    json_file,
    json_member,
    opcode_swap,
    other_global,
    pickled_number,
    planted_call,
    planted_member,
    safetensors_header,
    safetensors_record,
    zip_edit,
)

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


# Without knowledge of the format.


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
    """Write an extreme number into a structure of the archive or into the first bytes."""
    places = [match.start() + use.random.randrange(4, 46) for match in _STRUCTURES.finditer(data)]
    place = use.random.choice(places) if places and use.random.random() < 0.9 else use.random.randrange(64)
    form, most = use.random.choice(list(_NUMBERS.items()))
    packed = struct.pack(form, use.random.choice(_EXTREMES) & most)
    return data[:place] + packed + data[place + len(packed) :]


MUTATIONS: Mapping[str, Mutation] = {
    "bit flips": _bit_flips,
    "truncation": _truncation,
    "chunk deleted": _deletion,
    "chunk doubled": _duplication,
    "chunks swapped": _swap,
    "spliced with another file": _splice,
    "extreme numbers": _numbers,
    "zip members edited": zip_edit,
    "payload as a member": planted_member,
    "payload in a pickle": in_pickle(planted_call),
    "another global in a pickle": in_pickle(other_global),
    "opcode swapped": in_pickle(opcode_swap),
    "number in a pickle": in_pickle(pickled_number),
    "bomb in a pickle": in_pickle(bomb),
    "numpy object in a pickle": in_pickle(numpy_object),
    "JSON member edited": json_member,
    "JSON file edited": json_file,
    "safetensors header edited": safetensors_header,
    "record edited": safetensors_record,
    "record added to a file": added_record_to_file,
}


# Folders.


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder that are not empty, in a fixed order."""
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
    "record added": added_record,
    "configuration added": added_configuration,
    HOLES: holes,
}


def mutate_folder(folder: Path, use: Material) -> str:
    """Damage a folder or one of its files; return the name of the mutation."""
    if use.random.random() < 0.3:
        name = use.random.choice(list(FOLDER_MUTATIONS))
        FOLDER_MUTATIONS[name](folder, use)
        return name
    file = use.random.choice(files_in(folder))
    data = file.read_bytes()
    edited = json_file(data, use) if use.random.random() < 0.6 else None  # otherwise few mutations would edit the index
    name, changed = mutate(data, use) if edited is None else ("JSON file edited", edited)
    file.write_bytes(changed)
    return name


def mutate(data: bytes, use: Material) -> tuple[str, bytes]:
    """Apply a random mutation that fits; return its name and the damaged bytes."""
    while True:
        name = use.random.choice(list(MUTATIONS))
        changed = MUTATIONS[name](data, use)
        if changed is not None:
            return name, changed
