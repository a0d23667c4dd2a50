"""The errors that normswap raises on purpose.

Each message says what happened, what was expected and what to type. The command line prints it as one line on stderr
and exits with `exit_code`. Any other exception is a bug and keeps its traceback.
"""


class NormswapError(Exception):
    """Base class of all errors that normswap raises on purpose.

    Attributes:
        exit_code: the exit code of the command line.
    """

    __module__ = "normswap"

    exit_code = 2


class ArgumentError(NormswapError, TypeError):
    """An argument has a wrong type."""

    __module__ = "normswap"


class LayerError(NormswapError, ValueError):
    """A layer got an argument or an input that it does not support."""

    __module__ = "normswap"


class PlanError(NormswapError, ValueError):
    """A plan, a pattern or a setting does not fit the model."""

    __module__ = "normswap"


class SwapError(NormswapError):
    """A planned swap cannot be applied or reverted."""

    __module__ = "normswap"


class ModelError(NormswapError):
    """The forward pass of the model failed; the message quotes the model's own error."""

    __module__ = "normswap"


class OptimizerError(NormswapError, ValueError):
    """An optimizer, its parameter groups or a learning rate does not fit the model."""

    __module__ = "normswap"


class WatchError(NormswapError, ValueError):
    """`watch_importance` cannot log or switch what was requested: a gate, a step count or a setting is missing."""

    __module__ = "normswap"


class RecipeError(NormswapError, ValueError):
    """A recipe, or one of its values, is invalid."""

    __module__ = "normswap"


class DataError(NormswapError, ValueError):
    """Images or labels cannot be read, or do not fit the model."""

    __module__ = "normswap"


class TrainingError(NormswapError):
    """A training run cannot continue; the message names the last saved state."""

    __module__ = "normswap"


class RunInterrupted(TrainingError):  # noqa: N818 - a request, not an error
    """A signal stopped a run, which has saved its state.

    Args:
        message: the step, the folder, and how to continue.
        number: the number of the signal; None if it reached another process only.
    """

    __module__ = "normswap"

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message, number)  # both, since pickle calls the class with the arguments of the exception
        self.exit_code = 128 + (number or 0)  # as shells report a signal

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(NormswapError):
    """A file cannot be read, identified or written."""

    __module__ = "normswap"


class ArchitectureError(NormswapError):
    """An architecture is unknown, or does not fit the tensors.

    Attributes:
        convertible_by_names: whether the tensors could be converted by their names, without an architecture.
    """

    __module__ = "normswap"

    convertible_by_names = False


class AmbiguityError(ArchitectureError):
    """The tensors fit several architectures, or no known one: the user has to name it."""

    __module__ = "normswap"

    exit_code = 1
    convertible_by_names = True


class UnknownNormsError(ArchitectureError):
    """The file has norms that the architecture does not have."""

    __module__ = "normswap"

    convertible_by_names = True


class NothingToDo(NormswapError):  # noqa: N818 - a result, not a failure
    """There is nothing to convert, or the verification failed."""

    __module__ = "normswap"

    exit_code = 1
