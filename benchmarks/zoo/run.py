"""Convert and verify every model of timm, torchvision and transformers (`make zoo`) -> docs/measured/coverage.md.

Each model runs in a separate process with limits of time and memory. Results are appended to zoo-output/records.jsonl,
and an interrupted run resumes. `--report` only writes the page from the records.
"""

import argparse
import fnmatch
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks.zoo.catalog import ZOOS, Entry, entries
from benchmarks.zoo.checks import FLOAT64_PARAMETERS, blank, check_model, smallest_of_each_family
from benchmarks.zoo.records import FAILED, NO_NORM, OUTPUT, Record, append_record, code_version, read_records
from benchmarks.zoo.report import write_report
from benchmarks.zoo.workers import Limits, run_all

# Values of `--again`: the records to measure again.
AGAIN: dict[str, Callable[[Record], bool]] = {
    "failed": lambda record: record.outcome == FAILED,
    "float32": lambda record: record.precision == "float32",
    "unverified": lambda record: record.is_unverified,
    "all": lambda _: True,
}


def main() -> None:
    """Run the selected models that have no record, then write the page."""
    options = _options()
    torch.set_num_threads(1)
    records_file: Path = options.output / "records.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    if options.sample:
        for zoo in options.zoo or ZOOS:
            print(zoo, smallest_of_each_family(zoo))
        return
    if not options.report:
        _run(options, records_file)
    if options.output == OUTPUT:
        write_report(read_records(records_file))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=ZOOS, action="append", help="only this zoo; repeatable (default: all)")
    parser.add_argument("--only", metavar="PATTERN", help="only models whose name matches this glob pattern")
    parser.add_argument("--every", metavar="N", type=int, default=1, help="only every N-th model of each zoo")
    parser.add_argument("--limit", metavar="N", type=int, help="at most N models")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=900, help="time limit of one model (default 900)")
    parser.add_argument("--gigabytes", type=float, default=8, help="memory limit of one model (default 8)")
    parser.add_argument("--again", choices=AGAIN, help="repeat the models with these records")
    parser.add_argument(
        "--full-size", action="store_true", help="use the first input of each model, also if it is slow"
    )
    parser.add_argument(
        "--quick", action="store_true", help="skip verification and gate gradients, which take most of the time"
    )
    parser.add_argument(
        "--float64", metavar="MILLIONS", type=float, help="verify in float64 up to so many parameters (%(default)g)"
    )
    parser.set_defaults(float64=FLOAT64_PARAMETERS / 1e6)
    parser.add_argument("--report", action="store_true", help="only write docs/measured/coverage.md from the records")
    parser.add_argument("--sample", action="store_true", help="only print the smallest model of each family")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the records (default zoo-output)")
    return parser.parse_args()


def _run(options: argparse.Namespace, records_file: Path) -> None:
    done = read_records(records_file)
    # Models with short previous runs first, so an interrupted run has verified as many as possible.
    known = {key: record.seconds.get("total", 0.0) for key, record in done.items()}
    jobs = sorted(islice(_selected(options, done), options.limit), key=lambda entry: known.get(entry.key, 0.0))
    commit, start = code_version(), time.monotonic()
    limits = Limits(options.seconds, options.gigabytes)
    scratch = options.output / "running"
    work = partial(check_model, float64_parameters=int(options.float64 * 1e6), quick_above=0 if options.quick else inf)
    results = run_all(work, jobs, workers=options.workers, limits=limits, scratch=scratch, blank=blank)
    for number, record in enumerate(results, 1):
        record.commit = commit
        append_record(records_file, record)
        if record.outcome != NO_NORM:
            print(_line(record, f"{number}/{len(jobs)} {time.monotonic() - start:.0f} s"), flush=True)


def _selected(options: argparse.Namespace, done: dict[str, Record]) -> Iterator[Entry]:
    for zoo in options.zoo or ZOOS:
        for entry in islice(entries(zoo), None, None, options.every):
            if options.only and not fnmatch.fnmatchcase(entry.name, options.only):
                continue
            record = done.get(entry.key)
            if record is None or (options.again and AGAIN[options.again](record)):
                yield replace(entry, smaller=None) if options.full_size else entry


def _line(record: Record, progress: str) -> str:
    ratio = "" if record.ratio is None else f", ratio {record.ratio:.1f}"
    failures = "".join(f"\n    {failure}" for failure in record.failures)
    total = record.seconds.get("total", 0.0)
    counts = f"{record.swapped}/{record.sites} sites"
    return f"[{progress}] {record.key}: {record.outcome}, {counts}, {total:.1f} s{ratio}{failures}"


if __name__ == "__main__":
    main()
