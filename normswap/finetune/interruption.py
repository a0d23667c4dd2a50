"""SIGINT and SIGTERM as requests that a run answers where it can: after the step, once its state is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_REQUESTS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM while the block runs; the second one of a kind acts as it would have without the block.

    In a thread other than the main one, which may set no handlers, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _REQUESTS}

    def note(number: int, _frame: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in _REQUESTS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
