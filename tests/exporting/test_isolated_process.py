"""The process that runs exported files cannot import normswap."""

import importlib
import sys
from pathlib import Path

import pytest

from normswap.exporting import isolated_process


@pytest.fixture(autouse=True)
def finders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "colorsys"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_blocked_package_cannot_be_imported() -> None:
    isolated_process.block("colorsys")
    with pytest.raises(ImportError, match="colorsys is blocked in this process"):
        importlib.import_module("colorsys")
    assert importlib.import_module("json")


def test_a_package_that_is_loaded_already_is_noticed() -> None:
    with pytest.raises(SystemExit, match="json could be imported"):
        isolated_process.block("json")


def test_the_program_imports_nothing_of_normswap() -> None:
    lines = Path(isolated_process.__file__).read_text().splitlines()
    assert not [line for line in lines if line.strip().startswith(("import normswap", "from normswap"))]
