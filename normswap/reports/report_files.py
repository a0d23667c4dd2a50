"""`write_report`: a report of a converted file as an HTML page, a picture, and node data for Model Explorer."""

import json
from importlib.util import find_spec
from pathlib import Path

from normswap.checkpoints.io.atomic_files import atomic_write, check_writable
from normswap.errors import ArgumentError, CheckpointError
from normswap.reports.file_report import TOLERANCE, Report, check_tolerance, read_report
from normswap.reports.node_data import node_data
from normswap.reports.page.html_page import render_page
from normswap.reports.plots import importance_png


def write_report(
    file: str | Path,
    output: str | Path | None = None,
    *,
    png: str | Path | None = None,
    node_data_file: str | Path | None = None,
    graph: str | Path | None = None,
    against: str | Path | None = None,
    entry: str | None = None,
    trust: bool = False,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> Report:
    """Write a report of a converted file, as `normswap report` does; the same files give the same bytes.

    Args:
        file: a converted file, or a folder of shards.
        output: the HTML page to write, which contains everything it needs; None for none.
        png: a picture of the importance weights to write; needs matplotlib (`pip install 'normswap[report]'`).
        node_data_file: a JSON file to write, with the importance of `bn` by node of `graph`, for Model Explorer.
        graph: an exported program (.pt2) of the converted model, as `torch.export.export` makes it.
        against: a file to compare with, such as the one before fine-tuning.
        entry: which of several converted networks in the files.
        trust: unpickle objects that run code.
        tolerance: how far from 1 an importance weight may be, from 0 to 0.5, for its site to count as decided.
        overwrite: replace existing output files.

    Returns:
        The `Report` of `file`; `print` shows it as tables.

    Raises:
        ArgumentError: `tolerance` is not a number from 0 to 0.5, or only one of `graph` and
            `node_data_file` is given.
        CheckpointError: a file cannot be read or written, or is the same as another one; nothing is written then.
        NothingToDo: a file has no converted sites.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> normswap.save(result.model, "sn.pt", plan=result.plan)
        >>> normswap.write_report("sn.pt", "report.html", overwrite=True)
        Report('sn.pt', 1 site)
    """
    check_tolerance(tolerance)
    sources = [Path(path) for path in (file, against, graph) if path is not None]
    _check_outputs(sources, {"output": output, "png": png, "node_data_file": node_data_file}, overwrite=overwrite)
    if png is not None and find_spec("matplotlib") is None:
        raise ArgumentError("png= needs matplotlib, which is not installed: pip install 'normswap[report]'")
    if graph is not None and node_data_file is None:
        raise ArgumentError("graph= has no effect without node_data_file=: leave it out, or pass both")
    if node_data_file is not None and graph is None:
        raise ArgumentError(
            "node_data_file= needs graph=, an exported program (.pt2) of the converted model, whose nodes it names"
        )
    report = read_report(file, entry=entry, trust=trust, tolerance=tolerance)
    other = None if against is None else read_report(against, entry=entry, trust=trust, tolerance=tolerance)
    contents: dict[str | Path, bytes] = {}
    if output is not None:
        contents[output] = render_page(report, other).encode()
    if node_data_file is not None and graph is not None:
        nodes = node_data(report.weights, Path(graph))
        contents[node_data_file] = (json.dumps(nodes, indent=1) + "\n").encode()
    if png is not None:
        contents[png] = importance_png(report.weights)
    for path, content in contents.items():
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content)
    return report


def _check_outputs(sources: list[Path], outputs: dict[str, str | Path | None], *, overwrite: bool) -> None:
    """Refuse outputs that cannot be written, that are one of the sources, or that are given twice."""
    seen: dict[Path, str] = {}
    for name, value in outputs.items():
        if value is None:
            continue
        path = Path(value)
        resolved = path.resolve()
        if any(resolved == source.resolve() for source in sources):
            raise CheckpointError(f"{path}: is read and cannot be written too: choose another name for {name}=")
        if resolved in seen:
            raise CheckpointError(
                f"{path}: given as {seen[resolved]}= and {name}=: choose another name for one of them"
            )
        seen[resolved] = name
        check_writable(path, replace=overwrite)
