"""The folders of the repository that the programs read and write."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "measured"
RESULTS = ROOT / "benchmarks" / "results"
