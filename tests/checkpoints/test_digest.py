"""Two contents have the same fingerprint if and only if a bitwise comparison finds them equal."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from normswap.checkpoints.io.digest import contents_equal, fingerprint
from normswap.checkpoints.saving import compute_sha256, sha256_in_background
from normswap.errors import CheckpointError


def content() -> dict[str, Any]:
    weights = {"a": torch.tensor([1.0, torch.nan, -0.0]), "b": torch.arange(200_000), "empty": torch.ones(0, 3)}
    return {"weights": weights, "list": [1, (2.0, "x")], "array": numpy.arange(3), "truth": True}


def changed(place: str, value: Any) -> dict[str, Any]:
    other = content()
    holder: Any = other
    *way, last = place.split(".")
    for key in way:
        holder = holder[key]
    holder[int(last) if isinstance(holder, list) else last] = value
    return other


def flipped() -> dict[str, Any]:
    other = content()
    other["weights"]["b"][199_999] += 1
    return other


DIFFERENT = {
    "the last number": flipped(),
    "a zero's sign": changed("weights.a", torch.tensor([1.0, torch.nan, 0.0])),
    "a type": changed("weights.a", content()["weights"]["a"].double()),
    "a shape": changed("weights.empty", torch.ones(3, 0)),
    "a tensor for none": changed("weights.a", None),
    "a number": changed("list.0", 2),
    "a number's type": changed("truth", 1),
    "an array": changed("array", numpy.arange(3)[::-1]),
    "a name more": changed("more", 1),
    "a name less": {key: value for key, value in content().items() if key != "truth"},
    "another name": {("lie" if key == "truth" else key): value for key, value in content().items()},
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
def test_whatever_differs_is_noticed_by_both(other: dict[str, Any]) -> None:
    assert fingerprint(content()) != fingerprint(other)
    for pair in ((content(), other), (other, content())):
        assert not contents_equal(*pair)


def test_the_same_bits_are_the_same_in_every_order_layout_and_holder() -> None:
    other = {key: content()[key] for key in ("truth", "array", "list", "weights")}
    other["weights"]["b"] = torch.stack([content()["weights"]["b"], torch.zeros(200_000).long()], 1)[:, 0]
    assert fingerprint(content()) == fingerprint(other)
    assert contents_equal(content(), other)
    model = nn.Linear(2, 2)
    assert contents_equal(model, dict(model.state_dict()))


def test_what_is_read_from_a_file_may_be_forgotten(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5_000_000)}, tmp_path / "a.pt")
    mapped = torch.load(tmp_path / "a.pt", mmap=True)
    assert contents_equal({"a": torch.arange(5_000_000)}, mapped, release_pages=True)
    assert contents_equal(mapped, {"a": torch.arange(5_000_000)})


def test_what_has_no_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="is nested more than 50 levels deep"):
        contents_equal(endless, endless)


def test_the_digest_in_the_background_is_that_of_the_file_or_its_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_in_background(tmp_path / "a").result() == compute_sha256(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        sha256_in_background(tmp_path / "none").result()
