"""Tell a caller which check of a verification runs: a function of the caller is called with the name of each."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

# It may return a context manager, which is entered while the check runs.
CheckProgress = Callable[[str], AbstractContextManager[Any] | None]


class RunningCheck:
    """The check that runs now; the next one ends it, and so does the end of the `with` block.

    Args:
        progress: called with the name of each check when it begins; None tells nobody.
    """

    def __init__(self, progress: CheckProgress | None) -> None:
        self._progress = progress
        self._context = ExitStack()
        self._name: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def begin(self, name: str) -> None:
        """End the check before and begin `name`, unless it runs already."""
        if self._progress is None or name == self._name:
            return
        self._context.close()
        self._name = name
        context = self._progress(name)
        if context is not None:
            self._context.enter_context(context)
