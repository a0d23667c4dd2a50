"""The errors that normswap raises on purpose.

Every message says what was expected, what came, and what to type. The command line turns them into one line
on stderr and their `exit_code`; anything else is a defect and keeps its traceback.
"""


class NormswapError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command line exits with."""

    exit_code = 2


class ArgumentError(NormswapError, TypeError):
    """An argument is not of the type that a function takes."""


class LayerError(NormswapError, ValueError):
    """A layer was built with, or fed, something it cannot normalise."""


class PlanError(NormswapError, ValueError):
    """A plan, a pattern or a setting does not fit the model."""


class SwapError(NormswapError):
    """A planned swap cannot be carried out or undone."""


class ModelError(NormswapError):
    """The model's own forward pass failed; carries the model's message and the module that raised it."""


class OptimizerError(NormswapError, ValueError):
    """An optimizer, its parameter groups or a learning rate does not fit the model."""


class WatchError(NormswapError, ValueError):
    """What is to be watched in a training loop, or switched, is not there or cannot be counted."""


class RecipeError(NormswapError, ValueError):
    """A recipe, or one of its values, is not what fine-tuning can carry out."""


class DataError(NormswapError, ValueError):
    """Images or labels cannot be read, or do not fit the model."""


class TrainingError(NormswapError):
    """A training run cannot go on; says what was kept and where."""


class RunInterrupted(TrainingError):  # noqa: N818 - a request, not an error
    """A signal stopped a run, which has saved its state.

    Args:
        message: the step, the folder, and how to continue.
        number: the number of the signal; None if it reached another process only.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message, number)  # both, since pickle calls the class with the arguments of the exception
        self.exit_code = 128 + (number or 0)  # as shells report a signal

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(NormswapError):
    """A file cannot be read, identified or written."""


class ArchitectureError(NormswapError):
    """An architecture is unknown, or does not fit the tensors.

    `convertible_by_names`: the tensors could be converted by their names, without any architecture.
    """

    convertible_by_names = False


class AmbiguityError(ArchitectureError):
    """The tensors fit several architectures, or none that is known: the user has to say which."""

    exit_code = 1
    convertible_by_names = True


class UnknownNormsError(ArchitectureError):
    """The file has norms that the architecture does not have."""

    convertible_by_names = True


class NothingToDo(NormswapError):  # noqa: N818 - an answer, not a failure
    """The honest answer is "no": there is nothing to convert, or the proof failed."""

    exit_code = 1
