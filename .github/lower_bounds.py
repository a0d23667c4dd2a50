"""Print the oldest versions that pyproject.toml allows as constraints for pip: `lower_bounds.py > constraints.txt`.

A bound of two parts stands for its newest patch: `torch>=2.8` becomes `torch==2.8.*`.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BOUND = re.compile(r"([A-Za-z0-9._-]+)>=(\d+(?:\.\d+)*)")


def lower_bounds(requirements: list[str]) -> list[str]:
    """Return one constraint per requirement.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    found = []
    for requirement in requirements:
        bound = BOUND.match(requirement)
        if bound is None:
            raise ValueError(f"{PROJECT.name}: expected NAME>=VERSION, got {requirement!r}")
        name, version = bound.groups()
        parts = version.split(".")
        found.append(f"{name}=={version}" if len(parts) > 2 else f"{name}=={'.'.join((*parts, '0')[:2])}.*")
    return found


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    print("\n".join(lower_bounds([*project["dependencies"], *project["optional-dependencies"]["finetune"]])))
