"""Run all programs of `make bench` in turn, and print the minutes of each.

Each runs in a new process, because each changes the settings of torch.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.paths import ROOT

PROGRAMS = ("run", "conversion_cost", "file_cost", "compile_cost")


def main() -> None:
    """Run the programs; stop at the first that fails, with its exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    minutes = {}
    for program in PROGRAMS:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.speed.{program}"], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        minutes[program] = (time.perf_counter() - start) / 60
    for program, spent in minutes.items():
        print(f"{program}: {spent:.1f} minutes")
    print(f"together: {sum(minutes.values()):.1f} minutes")


if __name__ == "__main__":
    main()
