"""Signals that end the process, answered by unwinding what is under way first.

Python's own answer to SIGTERM and SIGHUP is to stop on the spot, so that no `finally` runs.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# Windows has the first only.
_ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Ended(BaseException):
    """A signal that ends the process has come; not for anybody to catch on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwound_first() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block before they end the process; handlers of the program itself stay."""
    ours: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
        ours = [number for number in _ENDINGS if signal.getsignal(number) == signal.SIG_DFL]
    if not ours:
        yield
        return
    for number in ours:
        signal.signal(number, _raise_ended)
    try:
        yield
    except _Ended as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        signal.raise_signal(ended.number)
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _raise_ended(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Ended(number)
