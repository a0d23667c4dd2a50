"""Files of measurements: JSON documents, replaced as a whole, and JSON lines, one record per line.

A program that measures for hours writes after each measurement, and skips what the file contains when it runs again.
"""

import json
import os
import re
from pathlib import Path
from typing import Any


def read_document(path: Path) -> Any | None:
    """Return the content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_document(path: Path, content: Any) -> None:
    """Write a JSON file. An interrupted run leaves the previous file."""
    draft = path.with_suffix(".draft")
    text = json.dumps(content, indent=1)
    # Objects without nested ones take one line. A newline is never part of a string in JSON.
    text = re.sub(r"\{\n[^{}\[\]]*\}", lambda match: re.sub(r"\n *", " ", match[0]), text)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_lines(path: Path, *, key: str) -> dict[str, dict[str, Any]]:
    """Return the last record for each value of the field `key`, in the order of the file.

    Lines that are not complete, as a crash leaves them, are skipped.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            found[record[key]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one record to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
