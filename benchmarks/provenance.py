"""The machine and the versions of a measurement, for the head of every generated page."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("normswap", "torch", "torchvision", "timm")


def provenance() -> str:
    """Return one Markdown sentence with date, machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Measured on {date.today().isoformat()} on {machine()}; Python {platform.python_version()}, {versions}."


def machine() -> str:
    """Return the processor's name and the number of cores available to this process."""
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
