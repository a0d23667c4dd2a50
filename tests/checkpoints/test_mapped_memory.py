"""Released pages of mapped files: all values stay the same, in files and in memory."""

import re
from pathlib import Path

import pytest
import torch

from normswap.checkpoints.io import memory
from normswap.checkpoints.io.memory import release_mapped_pages

MAPS = Path("/proc/self/status")


def _resident_file_pages() -> int:
    found = re.search(r"RssFile:\s+(\d+)", MAPS.read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not MAPS.exists(), reason="the system has no /proc")
def test_pages_of_a_file_go_and_come_again(tmp_path: Path) -> None:
    saved = {"a": torch.arange(2**21), "b": torch.arange(12.0).view(3, 4).t()}
    torch.save(saved, tmp_path / "file.pt")
    mapped = torch.load(tmp_path / "file.pt", mmap=True)
    assert mapped["a"].sum() == saved["a"].sum()
    before = _resident_file_pages()
    release_mapped_pages(mapped.values())
    assert before - _resident_file_pages() > 0.9 * saved["a"].nbytes
    assert all(torch.equal(mapped[key], saved[key]) for key in saved)


def test_without_a_list_of_mapped_files_nothing_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(2**12)}, tmp_path / "file.pt")
    mapped = torch.load(tmp_path / "file.pt", mmap=True)
    monkeypatch.setattr(memory, "_PROC_MAPS", tmp_path / "nowhere")
    release_mapped_pages(mapped.values())
    assert mapped["a"].equal(torch.arange(2**12))


def test_what_is_in_no_file_stays() -> None:
    own, sparse = torch.ones(2**20), torch.eye(2).to_sparse()
    release_mapped_pages([own, own[5:], sparse, torch.empty(0), torch.ones(2, device="meta"), "no tensor"])
    assert own.sum() == 2**20
