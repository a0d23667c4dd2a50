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


def cpu_kind() -> str:
    """Return the processor's name, with family and model if known, since a hypervisor may shorten the name."""
    facts = _cpu_facts()
    fields = {"family": "cpu family", "model": "model"}
    numbers = ", ".join(f"{name} {facts[field]}" for name, field in fields.items() if field in facts)
    return f"{_processor()} ({numbers})" if numbers else _processor()


def _processor() -> str:
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def _cpu_facts() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty without the file."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
