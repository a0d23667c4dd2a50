"""The golden files, unpacked, and what tests need to load them; see `tests/golden/README.md`."""

import importlib.util
import lzma
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NETWORKS = "golden_networks"


def load_networks() -> Any:
    """`networks.py` as the module that the pickles name; one and the same for all tests of a process."""
    if NETWORKS not in sys.modules:
        spec = importlib.util.spec_from_file_location(NETWORKS, GOLDEN / "networks.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NETWORKS] = module
        spec.loader.exec_module(module)
    return sys.modules[NETWORKS]


def unpack(folder: Path) -> Path:
    """Copy the golden files to `folder`, unpacked, with `networks.py` beside the files that name it."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted(folder.rglob("*.xz")):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    for name in ("files", "run"):
        shutil.copy(folder / "networks.py", folder / name)
    return folder


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """Let pass that an old name of normswap is deprecated; every other warning is an error, as in all tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*normswap", category=DeprecationWarning)
        yield
