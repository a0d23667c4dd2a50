"""Known failures become one line on stderr and their exit status; unknown ones keep their traceback."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import click

from normswap.cli.launched import print_error
from normswap.cli.wording import translate_arguments
from normswap.errors import NormswapError

P = ParamSpec("P")

_INTERRUPTED = 130  # what shells use for SIGINT


def one_line_failures(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap the function of a command so that it fails as the command line promises."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except NormswapError as error:
            _exit(translate_arguments(str(error)), error.exit_code)
        except OSError as error:
            if error.filename is None:
                raise
            _exit(f"{error.filename}: {error.strerror}", NormswapError.exit_code)
        except KeyboardInterrupt as stop:
            print_error(str(stop) or "interrupted")
            sys.exit(_INTERRUPTED)

    return run


def _exit(message: str, status: int) -> NoReturn:
    # Names from files may hold what rules a terminal, or what it cannot show.
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    print_error(click.style("error: ", fg="red") + shown)
    sys.exit(status)
