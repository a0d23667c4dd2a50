"""The folders of the repository that the programs read and write."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "measured"  # written by the programs
RESULTS = ROOT / "benchmarks" / "results"  # records from which a program resumes and rewrites its page
