"""The record: what travels in a file beside the tensors - architecture, plan, proof, history.

Plain JSON: no tensor, no code, nothing that runs when it is read. What a record says is data from a file and is
checked like any other.
"""

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch

from normswap.errors import CheckpointError, PlanError
from normswap.renamed import old_names
from normswap.surgery.plan import SwapPlan
from normswap.verification.equivalence import Check, Verification, parse_floats
from normswap.verification.site_watch import SiteError

_VERSION = version("normswap")

# Of a record of one network it is 1, which older versions of normswap read.
RECORD_VERSION = 2

Payload = Literal["state dict", "module", "program"]


@dataclass(frozen=True)
class Step:
    """One thing that was done to a model: what, when (UTC), by which normswap, from which file of which SHA-256, and
    with what, such as the data.
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
        """Return a step of this moment, done by this version."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(action, date, _VERSION, _replace_unprintable(source), sha256, _replace_unprintable(detail))


@dataclass(frozen=True)
class OriginalNorm:
    """What a site was: its class, eps and momentum (None where the norm has none), and whether it was frozen."""

    class_name: str
    eps: float | None
    momentum: float | None
    frozen: bool


@dataclass(frozen=True)
class NetworkRecord:
    """What a record says of one network in a file of several; the fields are those of `Record`."""

    payload: Payload
    architecture: str | None = None
    plan: SwapPlan | None = None
    verification: Verification | None = None
    originals: Mapping[str, OriginalNorm] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a file says of the model in it.

    `payload` is what the tensors are held in, `architecture` what builds the model (`timm:resnet50`), `verification`
    the proof, `originals` what each site was, by fqn, `entry` where the converted weights lie in a file of several
    models, `stored_as` the name of a site in the file if that is another one than its fqn. `tied` maps a tensor's key
    to the key under which its value is stored, `channels_last` names the tensors of that memory format: only
    safetensors, which knows neither, needs them. `fingerprint` seals record and content. `networks` are further
    converted networks of the file by their entry.
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

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of all converted networks, `""` for the whole content."""
        own = (self.entry or "",) if self.plan is not None else ()
        return (*own, *self.networks)

    def for_entry(self, entry: str) -> Self:
        """Return the same record with this network as its own and the others in `networks`.

        A network that it does not know has no plan and no architecture.
        """
        if entry == (self.entry or ""):
            return self
        own = {field: getattr(self, field) for field in _NETWORK_FIELDS}
        networks = {**({self.entry or "": NetworkRecord(**own)} if self.plan is not None else {}), **self.networks}
        found = networks.pop(entry, None) or NetworkRecord("state dict")
        return replace(self, entry=entry or None, networks=networks, **{f: getattr(found, f) for f in _NETWORK_FIELDS})

    def to_json(self) -> str:
        """Return the record as JSON of one line."""
        plan = None if self.plan is None else self.plan.to_dict()
        verification = None if self.verification is None else self.verification.to_dict()
        data = {
            "version": RECORD_VERSION if self.networks else 1,
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
        return json.dumps(data, allow_nan=False)

    def sealed(self, content: str) -> Self:
        """Return the record with the fingerprint of itself and of a content, whose own fingerprint is `content`."""
        return replace(self, fingerprint=_compute_fingerprint(json.loads(self.to_json()), content))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record in a JSON text.

        Raises:
            CheckpointError: not a record, of a newer version, or a field is unknown or of the wrong kind.
        """
        try:
            data = _check_printable(json.loads(text))
            if data.pop("version") > RECORD_VERSION:
                raise CheckpointError(f"its record is of a newer version than {RECORD_VERSION}: update normswap")
            return cls(**{name: _FIELD_PARSERS[name](value) for name, value in data.items()})
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, PlanError) as error:
            raise CheckpointError(f"its record is damaged ({error}): convert the original file again") from error


def check_fingerprint(text: str, content: str) -> None:
    """Refuse a record whose own fingerprint does not seal it and a content; one without a fingerprint passes.

    Raises:
        CheckpointError: record or content are not what was written.
    """
    data = json.loads(text)
    fingerprint = data.get("fingerprint")
    if fingerprint is not None and fingerprint != _compute_fingerprint(data, content):
        raise CheckpointError(
            "not what normswap wrote: its tensors or its record were changed or damaged since: copy or convert it again"
        )


def _replace_unprintable(text: str | None) -> str | None:
    # A file may be called anything; a record holds what can be printed.
    return text and "".join(letter if letter.isprintable() else "?" for letter in text)


def _compute_fingerprint(data: dict[str, Any], content: str) -> str:
    # Over the JSON as it is stored, so that a version with more fields finds the same.
    text = json.dumps({**data, "fingerprint": content}, sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _check_printable(value: Any) -> Any:
    """Refuse texts that could rule a terminal or that no terminal can show."""
    for part in value.items() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_printable(list(part) if isinstance(part, tuple) else part)
    if isinstance(value, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise ValueError(f"a text with control characters: {value!a:.80}")
    return value


def _parse_payload(value: Any) -> Payload:
    if value not in get_args(Payload):
        raise ValueError(f"payload: unexpected {value!r:.80}")
    return value  # type: ignore[no-any-return]


def _instance_of(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise ValueError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.80}")
        return value

    return check


def _field_checker(record: type) -> Callable[[Any], dict[str, Any]]:
    """What checks the fields of a flat dataclass against their annotations; lists are left to others."""
    hints = get_type_hints(record)

    def check(value: Any) -> dict[str, Any]:
        for name, item in _instance_of(dict)(value).items():
            if get_origin(hints[name]) is tuple:
                continue
            kinds = get_args(hints[name]) or (hints[name],)
            if isinstance(item, bool) and bool not in kinds:
                raise ValueError(f"{name}: unexpected {item!r}")
            _instance_of(*kinds, *((int,) if float in kinds else ()))(item)
            if isinstance(item, int):
                float(item)  # which a number of 400 digits overflows
        return dict(value)

    return check


def _parse_verification(value: Any) -> Verification | None:
    if value is None:
        return None
    data = _field_checker(Verification)(parse_floats(Verification, _instance_of(dict)(value)))
    data["notes"] = [_instance_of(str)(note) for note in _instance_of(list, tuple)(data.get("notes", ()))]
    for part, kind in (("checks", Check), ("sites", SiteError)):
        data[part] = [
            _field_checker(kind)(parse_floats(kind, _instance_of(dict)(item)))
            for item in _instance_of(list, tuple)(data[part])
        ]
    return Verification.from_dict(data)


def _parse_networks(value: Any) -> dict[str, NetworkRecord]:
    parts = {_instance_of(str)(entry): _instance_of(dict)(part) for entry, part in _instance_of(dict)(value).items()}
    if any(part.keys() - set(_NETWORK_FIELDS) for part in parts.values()):
        raise ValueError("networks: an unknown field")
    return {
        entry: NetworkRecord(**{name: _FIELD_PARSERS[name](item) for name, item in part.items()})
        for entry, part in parts.items()
    }


_NETWORK_FIELDS = ("payload", "architecture", "plan", "verification", "originals", "stored_as")
_FIELD_PARSERS: dict[str, Callable[[Any], Any]] = {
    "payload": _parse_payload,
    "architecture": _instance_of(str, type(None)),
    "plan": lambda value: None if value is None else SwapPlan.from_dict(value),
    "verification": _parse_verification,
    "history": lambda value: tuple(Step(**_field_checker(Step)(step)) for step in _instance_of(list)(value)),
    "tied": lambda value: {
        _instance_of(str)(key): _instance_of(str)(kept) for key, kept in _instance_of(dict)(value).items()
    },
    "channels_last": lambda value: tuple(_instance_of(str)(key) for key in _instance_of(list)(value)),
    "originals": lambda value: {
        _instance_of(str)(fqn): OriginalNorm(**_field_checker(OriginalNorm)(item))
        for fqn, item in _instance_of(dict)(value).items()
    },
    "entry": _instance_of(str, type(None)),
    "stored_as": lambda value: {
        _instance_of(str)(fqn): _instance_of(str)(name) for fqn, name in _instance_of(dict)(value).items()
    },
    "fingerprint": _instance_of(str, type(None)),
    "normswap": _instance_of(str),
    "torch": _instance_of(str),
    "networks": _parse_networks,
}

__getattr__ = old_names("normswap.checkpoints.record")
