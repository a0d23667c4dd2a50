"""The zoo proof: every model of timm, torchvision and transformers converted and put through the laws.

Run by `make zoo`. Each model has a process of its own with a limit of time and memory; results are appended to
zoo-output/records.jsonl and a later run goes on where this one stopped. `--report` writes docs/measured/coverage.md.
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
from benchmarks.zoo.laws import FLOAT64_PARAMETERS, blank, prove, smallest_of_each_family
from benchmarks.zoo.records import FAILED, NO_NORM, OUTPUT, Record, append_record, code_version, read_records
from benchmarks.zoo.report import write_report
from benchmarks.zoo.workers import Limits, run_all

# Which records are to be made again.
AGAIN: dict[str, Callable[[Record], bool]] = {
    "failed": lambda record: record.outcome == FAILED,
    "float32": lambda record: record.precision == "float32",
    "unproved": lambda record: record.is_unproved,
    "all": lambda _: True,
}


def main() -> None:
    """Run what is asked for and is not recorded yet, then write the report if asked."""
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
    parser.add_argument("--again", choices=AGAIN, help="repeat what is recorded so")
    parser.add_argument("--full-size", action="store_true", help="feed no slow model the smaller input")
    parser.add_argument("--quick", action="store_true", help="leave out laws 1 and 3, which take most of the time")
    parser.add_argument("--float64", metavar="MILLIONS", type=float, help="law 1 in float64 up to (%(default)g)")
    parser.set_defaults(float64=FLOAT64_PARAMETERS / 1e6)
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from the records")
    parser.add_argument("--sample", action="store_true", help="run nothing, print the smallest model of each family")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the records (default zoo-output)")
    return parser.parse_args()


def _run(options: argparse.Namespace, records_file: Path) -> None:
    done = read_records(records_file)
    # Those known to be quick first, so that a run that is cut short has proved the most.
    known = {key: record.seconds.get("total", 0.0) for key, record in done.items()}
    jobs = sorted(islice(_wanted(options, done), options.limit), key=lambda entry: known.get(entry.key, 0.0))
    commit, start = code_version(), time.monotonic()
    limits = Limits(options.seconds, options.gigabytes)
    scratch = options.output / "running"
    work = partial(prove, float64_parameters=int(options.float64 * 1e6), quick_above=0 if options.quick else inf)
    results = run_all(work, jobs, workers=options.workers, limits=limits, scratch=scratch, blank=blank)
    for number, record in enumerate(results, 1):
        record.commit = commit
        append_record(records_file, record)
        if record.outcome != NO_NORM:
            print(_line(record, f"{number}/{len(jobs)} {time.monotonic() - start:.0f} s"), flush=True)


def _wanted(options: argparse.Namespace, done: dict[str, Record]) -> Iterator[Entry]:
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
