"""The record that a file carries next to the tensors: architecture, plan, verification result, history.

A record is plain JSON: it has no tensor and no code, so reading one runs nothing. It comes from a file, so
`Record.from_json` checks every field against its annotation, as `normswap.schema` does for recipes and plans.
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Literal, Self, TypeVar

import torch

from normswap.baking.bake_plan import BakePlan
from normswap.errors import CheckpointError
from normswap.renamed import old_names
from normswap.schema import read_record, read_value
from normswap.surgery.plan import SwapPlan
from normswap.verification.distance import Distance
from normswap.verification.equivalence import Check, Verification, parse_floats
from normswap.verification.site_watch import SiteError

_VERSION = version("normswap")

# A record of one network is written as version 1, which older versions of normswap read; one of several networks as
# version 2, and one of a baked network as version 3.
RECORD_VERSION = 3

Payload = Literal["state dict", "module", "program"]
_AnyRecord = TypeVar("_AnyRecord", bound="Record | NetworkRecord")


@dataclass(frozen=True)
class Step:
    """One operation on a model.

    Attributes:
        action: what was done, such as `"converted"`.
        date: when, in UTC, as ISO 8601.
        normswap: the version of normswap.
        source: the name of the file that was read.
        sha256: the SHA-256 of that file, as hexadecimal digits.
        detail: what else was used, such as the data.
    """

    action: str
    date: str
    normswap: str
    source: str | None = None
    sha256: str | None = None
    detail: str | None = None

    @classmethod
    def now(
        cls, action: str, *, source: str | None = None, sha256: str | None = None, detail: str | None = None
    ) -> Self:
        """Return a step with the present time and version; unprintable characters become `?`."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(action, date, _VERSION, _replace_unprintable(source), sha256, _replace_unprintable(detail))


@dataclass(frozen=True)
class OriginalNorm:
    """The norm that a site had: class, eps and momentum (None if the norm has none), and whether it was frozen."""

    class_name: str
    eps: float | None
    momentum: float | None
    frozen: bool


@dataclass(frozen=True)
class NetworkRecord:
    """The record of one further network in a file with several; the fields are those of `Record`."""

    payload: Payload
    architecture: str | None = None
    plan: SwapPlan | None = None
    verification: Verification | None = None
    originals: Mapping[str, OriginalNorm] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)
    distance: Distance | None = None


@dataclass(frozen=True)
class Record:
    """The metadata of a converted model that a checkpoint file carries.

    Attributes:
        payload: what the file contains: a state dict, a pickled module or an exported program.
        architecture: what builds the model, such as `timm:resnet50`.
        plan: the swaps and skips of the conversion.
        verification: how the converted model compared with the original.
        history: the operations, oldest first.
        tied: for safetensors, which has no tied tensors: the key of a tensor -> the key that stores its value.
        channels_last: for safetensors, which has no memory formats: the keys of tensors in this format.
        originals: the norm that each site had, by fqn.
        entry: the key path of the converted weights in a file with several networks.
        stored_as: the name of a site in the file, by fqn, if the two differ.
        fingerprint: a SHA-256 of record and content; `check_fingerprint` compares it.
        normswap, torch: the versions that wrote the file.
        networks: further converted networks in the file, by entry.
        distance: how far the model is from the original, if it starts without `bn` and so computes another function.
        baked: what each site became after the conversion, if the network was baked.
    """

    payload: Payload
    architecture: str | None = None
    plan: SwapPlan | None = None
    verification: Verification | None = None
    history: tuple[Step, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()
    originals: Mapping[str, OriginalNorm] = field(default_factory=dict)
    entry: str | None = None
    stored_as: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    normswap: str = _VERSION
    torch: str = str(torch.__version__)
    networks: Mapping[str, NetworkRecord] = field(default_factory=dict)
    distance: Distance | None = None
    baked: BakePlan | None = None

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of all converted networks; `""` is the whole content."""
        own = (self.entry or "",) if self.plan is not None else ()
        return (*own, *self.networks)

    def for_entry(self, entry: str) -> Self:
        """Return the same record with the network at `entry` in the top-level fields and the others in `networks`.

        If the record has no such network, the top-level fields have neither plan nor architecture.
        """
        if entry == (self.entry or ""):
            return self
        own = {field: getattr(self, field) for field in _NETWORK_FIELDS}
        networks = {**({self.entry or "": NetworkRecord(**own)} if self.plan is not None else {}), **self.networks}
        found = networks.pop(entry, None) or NetworkRecord("state dict")
        return replace(self, entry=entry or None, networks=networks, **{f: getattr(found, f) for f in _NETWORK_FIELDS})

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        plan = None if self.plan is None else self.plan.to_dict()
        verification = None if self.verification is None else self.verification.to_dict()
        data = {
            "version": RECORD_VERSION if self.baked else 2 if self.networks else 1,
            **asdict(self),
            "plan": plan,
            "verification": verification,
        }
        for entry, part in self.networks.items():
            data["networks"][entry] |= {
                "plan": None if part.plan is None else part.plan.to_dict(),
                "verification": None if part.verification is None else part.verification.to_dict(),
            }
        if not self.networks:
            del data["networks"]
        if self.baked is None:
            del data["baked"]
        for part in (data, *data.get("networks", {}).values()):
            if part["distance"] is None:  # left out, so that older versions read the record
                del part["distance"]
        return json.dumps(data, allow_nan=False)

    def sealed(self, content: str) -> Self:
        """Return the record with a fingerprint of itself and of a content, whose own fingerprint is `content`."""
        return replace(self, fingerprint=_compute_fingerprint(json.loads(self.to_json()), content))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record in a JSON text.

        Raises:
            CheckpointError: not a record, written by a newer version, or a field is unknown or has the wrong type.
        """
        try:
            data = read_value(Mapping[str, Any], _check_printable(json.loads(text)), "record")
            found = read_value(int, data.pop("version", None), "record.version")
            if found > RECORD_VERSION:
                raise CheckpointError(
                    f"its normswap record has version {found}, expected at most {RECORD_VERSION}: update normswap"
                )
            networks = read_value(Mapping[str, Mapping[str, Any]], data.pop("networks", {}), "record.networks")
            further = {
                entry: _read_network(NetworkRecord, part, f"record.networks.{entry}")
                for entry, part in networks.items()
            }
            return replace(_read_network(cls, data, "record"), networks=further)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"invalid normswap record ({error}): convert the original file again") from error


def check_fingerprint(text: str, content: str) -> None:
    """Refuse a record and a content that changed since they were written; a record without a fingerprint passes.

    Args:
        text: the JSON of the record.
        content: the fingerprint of the content.

    Raises:
        CheckpointError: the record or the content was modified.
    """
    data = json.loads(text)
    fingerprint = data.get("fingerprint")
    if fingerprint is not None and fingerprint != _compute_fingerprint(data, content):
        raise CheckpointError(
            "its tensors or its record changed after normswap wrote the file: copy the file again, or convert it again"
        )


def _replace_unprintable(text: str | None) -> str | None:
    # The name of a file may have any characters; a record has printable ones only.
    return text and "".join(letter if letter.isprintable() else "?" for letter in text)


def _compute_fingerprint(data: dict[str, Any], content: str) -> str:
    # Computed over the JSON as stored, so that a later version with more fields gets the same value.
    text = json.dumps({**data, "fingerprint": content}, sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _check_printable(value: Any) -> Any:
    """Refuse strings with characters that control a terminal or that no terminal can show."""
    for part in value.items() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_printable(list(part) if isinstance(part, tuple) else part)
    if isinstance(value, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise ValueError(f"expected printable text, got control characters in {value!a:.80}")
    return value


def _read_network(kind: type[_AnyRecord], data: Mapping[str, Any], name: str) -> _AnyRecord:
    """Read a record of one network; its plan and its verification have readers of their own."""
    plan, verification = data.get("plan"), data.get("verification")
    flat = {key: value for key, value in data.items() if key not in ("plan", "verification")}
    return replace(
        read_record(kind, flat, name),
        plan=None if plan is None else SwapPlan.from_dict(plan),
        verification=None if verification is None else _read_verification(verification, f"{name}.verification"),
    )


def _read_verification(data: Any, name: str) -> Verification:
    """Read a verification result, in which infinity and NaN are strings, since JSON has neither."""
    values = parse_floats(Verification, read_value(Mapping[str, Any], data, name))
    for key, kind in (("checks", Check), ("sites", SiteError)):
        items = read_value(tuple[Mapping[str, Any], ...], values.get(key, ()), f"{name}.{key}")
        values[key] = [parse_floats(kind, item) for item in items]
    return read_record(Verification, values, name)


_NETWORK_FIELDS = ("payload", "architecture", "plan", "verification", "originals", "stored_as", "distance")

__getattr__ = old_names("normswap.checkpoints.record")
