"""Plain data read into typed records: what fits, and the place, the expectation and the value of what does not."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from normswap.schema import Range, SchemaError, describe, read_record, read_value, suggest


class Options(TypedDict):
    gate: Literal["simplex", "softmax"]
    branches: NotRequired[Sequence[Literal["in", "ln", "bn"]]]


@dataclass(frozen=True)
class Site:
    fqn: str
    channels: int
    eps: float | None = None
    filters: tuple[str | Callable[[str], bool], ...] = ()


@dataclass(frozen=True)
class Document:
    sites: tuple[Site, ...]
    settings: Mapping[str, Options]
    size: tuple[int, int] = (224, 224)
    rate: Annotated[float, Range(0, 1)] = 0.1


DATA: dict[str, Any] = {
    "sites": [{"fqn": "a", "channels": 3, "eps": 1}, {"fqn": "b", "channels": 4, "filters": ["x"]}],
    "settings": {"layer4.*": {"gate": "softmax", "branches": ["ln", "bn"]}, "*": {"gate": "simplex"}},
    "size": [32, 64],
    "rate": 1,
}


def test_a_document_is_read_into_nested_records() -> None:
    document = read_record(Document, json.loads(json.dumps(DATA)), "")
    assert document.sites == (Site("a", 3, 1.0), Site("b", 4, filters=("x",)))
    assert type(document.sites[0].eps) is type(document.rate) is float
    assert document.settings == {
        "layer4.*": {"gate": "softmax", "branches": ("ln", "bn")},
        "*": {"gate": "simplex"},
    }
    assert document.size == (32, 64)


def test_fields_with_a_default_may_be_missing() -> None:
    assert read_record(Document, {"sites": [], "settings": {}}, "") == Document((), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": 3}, "sites: expected a list, each item a table of named values, got 3"),
        ({"sites": [3]}, "sites[0]: expected a table of named values, got 3"),
        ({"sites": [{"fqn": "a"}]}, "sites[0]: channels missing; expected channels, eps, filters, fqn"),
        (
            {"sites": [{"fqn": "a", "channels": True}]},
            "sites[0].channels: expected a whole number, got True",
        ),
        ({"sites": [{"fqn": "a", "channel": 1}]}, "sites[0]: unknown name 'channel'; did you mean 'channels'?"),
        ({"sites": [{"fqn": "a", "channels": 1, "eps": "x"}]}, "sites[0].eps: expected a number, got 'x'"),
        ({"sites": [{"fqn": "a", "channels": 1, "filters": [1]}]}, "sites[0].filters[0]: expected a string, got 1"),
        ({"settings": []}, "settings: expected a table of named values, got []"),
        ({"settings": {3: {}}}, "key of settings: expected a string, got 3"),
        ({"settings": {"layer4.*": {}}}, "settings['layer4.*']: gate missing; expected branches, gate"),
        (
            {"settings": {"*": {"gate": "simplx"}}},
            "settings['*'].gate: expected 'simplex' or 'softmax', got 'simplx'; did you mean 'simplex'?",
        ),
        (
            {"settings": {"*": {"gate": "softmax", "branches": "bn"}}},
            "settings['*'].branches: expected a list, each item 'in' or 'ln' or 'bn', got 'bn'",
        ),
        ({"size": [1, 2, 3]}, "size: expected a list of 2 values, got [1, 2, 3]"),
        ({"rate": 2}, "rate: expected 0 to 1, got 2"),
        ({"rate": float("nan")}, "rate: expected 0 to 1, got nan"),
        ({"rate": 10**400}, "rate: expected a number, got a whole number that is too large"),
        ({"zzz": 1}, "unknown name 'zzz'; expected one of rate, settings, sites, size"),
    ],
)
def test_an_error_gives_the_place_the_expectation_and_the_value(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_record(Document, DATA | changes, "")
    assert str(caught.value) == message


def test_a_named_record_starts_each_place_with_its_name() -> None:
    with pytest.raises(SchemaError, match=r"^the plan: expected a table of named values, got \[\]$"):
        read_record(Document, [], "the plan")
    with pytest.raises(SchemaError, match=r"^the plan\.size: expected"):
        read_record(Document, DATA | {"size": None}, "the plan")
    with pytest.raises(SchemaError, match=r"^expected a table of named values, got \[\]$"):
        read_record(Document, [], "")


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, 3), (float, 0.5), (str, "x"), (bool, False), (None, None), (Any, {1}), (int | None, None), (str | int, 3)],
)
def test_a_value_of_its_type_is_returned(kind: Any, value: Any) -> None:
    assert read_value(kind, value, "x") == value


@pytest.mark.parametrize(("kind", "value"), [(int, True), (int, 1.0), (float, False), (str, 1), (bool, 0), (str, None)])
def test_a_value_of_another_type_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(SchemaError, match=r"^x: expected "):
        read_value(kind, value, "x")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (str | Callable[[str], bool], "a string"),
        (tuple[str, ...], "a list of strings"),
        (Sequence[int], "a list of whole numbers"),
        (tuple[str | Callable[[str], bool], ...], "a list, each item a string"),
        (Literal["a", True], "'a' or true"),
        (Annotated[int, Range(1)], "a whole number (at least 1)"),
        (Annotated[float, Range()], "a number (a finite number)"),
    ],
)
def test_an_annotation_is_described_in_words(kind: Any, words: str) -> None:
    assert describe(kind) == words


def test_only_a_near_name_is_suggested() -> None:
    assert suggest("brnches", ["gate", "branches"]) == "; did you mean 'branches'?"
    assert suggest("zzz", ["gate", "branches"]) == ""


def test_numbers_of_any_size_are_read_or_refused() -> None:
    huge = 10**5000  # more digits than Python writes
    assert read_value(Annotated[int, Range(0)], huge, "seed") == huge
    for kind, value, text in (
        (Annotated[int, Range(0, 10)], 10**400, "seed: expected 0 to 10, got 1000"),
        (Annotated[int, Range(0, 10)], huge, "seed: expected 0 to 10, got a whole number that is too large"),
        (str, huge, "seed: expected a string, got a whole number that is too large"),
        (Annotated[float, Range(0)], float("inf"), "seed: expected a finite number, got inf"),
        (Annotated[float, Range(0, 1)], float("nan"), "seed: expected 0 to 1, got nan"),
        (Annotated[float, Range(maximum=5)], 6, "seed: expected at most 5, got 6"),
    ):
        with pytest.raises(SchemaError) as caught:
            read_value(kind, value, "seed")
        assert str(caught.value).startswith(text)


def test_deeply_nested_data_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SchemaError, match="size: expected a whole number, got a list that is nested too deeply"):
        read_value(int, deep, "size")
    while deep:  # Python frees deep nesting item by item only this way
        deep = deep.pop()
