"""Fine-tune BN networks in nine ways at small batch sizes (`make evidence BUDGET=150m`) -> docs/measured/evidence.md.

Runs what benchmarks/results/evidence.jsonl does not contain, for at most the budget, appends each run as it ends, and
writes the page. `--status` only prints what is left, `--rewrite` only writes the page.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.finetuning.evidence.campaign import Campaign, pool, status
from benchmarks.finetuning.evidence.plan import SETTINGS
from benchmarks.paths import PAGES, RESULTS
from benchmarks.records import read_lines

_UNITS = {"s": 1, "m": 60, "h": 3600}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code: 1 if a run failed."""
    options = _options(arguments)
    records = (RESULTS if options.output == PAGES else options.output) / "evidence.jsonl"
    campaign = Campaign(records, read_lines(records, key="key"), tuple(options.settings))
    if options.status:
        print(status(campaign))
        return 0
    if not options.rewrite:
        with pool(options.workers) as executor:
            done = campaign.run(budget=options.budget, executor=executor, workers=options.workers)
        print(f"{done} runs in {records}; {status(campaign).splitlines()[-1]}")
    from benchmarks.finetuning.evidence.report import write_report  # matplotlib takes a while

    write_report(campaign.records, options.output)
    print(f"wrote {options.output / 'evidence.md'}")
    return 1 if campaign.failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=seconds, default="150m", help="time, as 90s, 150m or 2h (default 150m)")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (default 2)")
    parser.add_argument("--status", action="store_true", help="print what is left and end")
    parser.add_argument("--rewrite", action="store_true", help="only write the page from the records")
    parser.add_argument("--output", type=Path, default=PAGES, help="existing folder (default docs/measured)")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        metavar="NAME",
        default=[*SETTINGS],
        help=f"settings to run, of {', '.join(SETTINGS)} (default: all)",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    if not options.output.is_dir():
        parser.error(f"--output: expected an existing folder, got {options.output}")
    return options


def seconds(text: str) -> float:
    """Return a time in seconds.

    Raises:
        argparse.ArgumentTypeError: it is not a number with the unit s, m or h.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 150m or 2h, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


if __name__ == "__main__":
    sys.exit(main())
