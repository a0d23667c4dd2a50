"""Importance weights as node data of Model Explorer (google-ai-edge/model-explorer), which colours nodes of a graph.

The node ids are those of its adapter for PyTorch, which are the names of the nodes of an exported program. They are
read from the JSON text of the graph inside the archive, which runs no code.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normswap.checkpoints.formats.archive_checks import check_archive
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.errors import CheckpointError
from normswap.reports.plots import COLORS
from normswap.surgery.importance import SiteWeights

_GRAPH_SUFFIX = "models/model.json"
_MODULES = "nn_module_stack"


def node_data(weights: Mapping[str, SiteWeights], graph: Path) -> dict[str, Any]:
    """Return node data with the importance of `bn` for every node of a site: 1 where the site computes Batch Norm.

    Args:
        weights: the importance weights of every site, by fqn.
        graph: an exported program (.pt2) of the same network.

    Raises:
        CheckpointError: the file is not an exported program, or none of its nodes belongs to a site.
    """
    results = {}
    for node, modules in _read_nodes(graph).items():
        fqn = next((name for name in reversed(modules) if name in weights), None)
        if fqn is not None:
            results[node] = {"value": sum(side.get("bn", 0.0) for side in weights[fqn]) / len(weights[fqn])}
    if not results:
        raise CheckpointError(
            f"{graph}: no node of this program belongs to a converted site: export the converted model with "
            "torch.export.export, and save it with torch.export.save"
        )
    gradient = [{"stop": 0, "bgColor": COLORS["ln"]}, {"stop": 0.5, "bgColor": "#FFFFFF"}]
    gradient.append({"stop": 1, "bgColor": COLORS["bn"]})
    return {"graph": {"name": "importance of bn", "results": results, "gradient": gradient}}


def _read_nodes(path: Path) -> dict[str, list[str]]:
    """The fqns of the modules in which each node of an exported program is computed, outermost first."""
    check_readable(path)
    expected = f"{path}: expected an exported program of torch.export.save (.pt2)"
    if path.is_dir() or not zipfile.is_zipfile(path):
        raise CheckpointError(f"{expected}, got {'a folder' if path.is_dir() else 'another file'}")
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(_GRAPH_SUFFIX)]
        if not names:
            raise CheckpointError(f"{expected} of torch 2.9 or newer, got another archive")
        try:
            nodes = json.loads(archive.read(names[0]))["graph_module"]["graph"]["nodes"]
            return {
                output["as_tensor"]["name"]: _read_modules(node["metadata"].get(_MODULES, ""))
                for node in nodes
                for output in node["outputs"]
                if "as_tensor" in output
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its graph cannot be read ({type(error).__name__}): export it again"
            ) from error


def _read_modules(stack: str) -> list[str]:
    """The fqns in a text such as `L__self__,,Net;L__self__bn1,bn1,SwitchNorm2d`."""
    return [entry.split(",")[1] for entry in stack.split(";") if entry.count(",") >= 2]
