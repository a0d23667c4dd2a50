"""Several processes of one launcher, such as torchrun: the first one prints, and an error is printed once.

Commands that work in one process alone do so in the first one, and the others have nothing to do.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any, TextIO

import click

# Set by torchrun, and by all that start processes through it, in each of them. RANK alone may be a leftover.
_LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
_MULTIPROCESS_COMMANDS = ("finetune",)
_STORE_TIMEOUT = timedelta(seconds=5)

# Where errors go while the other streams of this process are silent.
_errors: TextIO | None = None


def rank() -> int | None:
    """Return the number of this process among those of a launcher, or None if there is none."""
    return int(os.environ.get("RANK", "0")) if _LAUNCHER_VARIABLE in os.environ else None


class LauncherAwareGroup(click.Group):
    """The command line; in all processes of a launcher but the first it says nothing, or only that it does nothing."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Run the command, or only say so if it works in the first process alone."""
        args = list(sys.argv[1:] if args is None else args)
        if not rank():
            return super().main(args, *positional, **options)
        if not args or args[0] not in _MULTIPROCESS_COMMANDS:
            # Not for the launcher itself, whose processes all get the same command, but for a training script in one
            # of them that starts a command of its own and waits for its output.
            click.echo(
                f"process {rank()} of a launcher such as torchrun: nothing done, since only `normswap finetune` works "
                f"in all processes and everything else in process 0; to run it here all the same: env -u {_LAUNCHER_VARIABLE} "
                f"{' '.join(['normswap', *args[:1]])} ...",
                err=True,
            )
            return None
        with _silence_output():
            return super().main(args, *positional, **options)


@contextmanager
def _silence_output() -> Iterator[None]:
    """Print nothing while the block runs, but for errors; an unknown one leaves the block with its traceback."""
    global _errors
    streams = sys.stdout, sys.stderr
    _errors = sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        sys.stdout = sys.stderr = devnull
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            _errors = None


def print_error(message: str) -> None:
    """Print a message on stderr; in several processes once, however many of them have it, and with the rank."""
    number = rank()
    if number is None:
        click.echo(message, err=True)
    elif _is_first_to_report(message, os.environ):
        click.echo(f"[rank {number}] {message}", file=_errors or sys.stderr)


def _is_first_to_report(message: str, environment: Mapping[str, str]) -> bool:
    """Whether no process of this launcher has printed a message yet, by the store that the launcher keeps for them."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return True
    distributed: Any = importlib.import_module("torch.distributed")
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = distributed.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
        digest = sha256(message.encode()).hexdigest()
        number = store.add(
            f"normswap/{environment[_LAUNCHER_VARIABLE]}/{environment.get('TORCHELASTIC_RESTART_COUNT')}/{digest}", 1
        )
    except (RuntimeError, KeyError, ValueError):
        return True  # twice is better than not at all
    return bool(number == 1)
