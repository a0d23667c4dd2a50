"""How many steps a run takes, how many of them warm up, and what in its recipe does not fit that length."""

from normswap.errors import RecipeError
from normswap.finetune.recipe_tables import RunTable, TrainTable


def run_length(train: TrainTable, batches: int) -> int:
    """Return how many steps a run takes on data of so many batches per pass.

    Raises:
        RecipeError: not even one step comes of the epochs, or warm-up would take all of the steps.
    """
    if train.steps is not None:
        check_warmup(train, train.steps)
        return train.steps
    epochs = train.epochs or 0
    steps = epochs * batches // train.accumulation
    origin = f"train.epochs = {epochs} of {batches} batches"
    if not steps:
        enough = -(-train.accumulation // batches)
        raise RecipeError(
            f"train.accumulation: a step takes {train.accumulation} batches, and the run has {epochs * batches} "
            f"({origin}): choose a smaller accumulation, or train.epochs = {enough}"
        )
    shared = f", train.accumulation = {train.accumulation}" if train.accumulation > 1 else ""
    check_warmup(train, steps, f" ({origin}{shared})")
    return steps


def check_warmup(train: TrainTable, steps: int, origin: str = "") -> int:
    """Return how many of the steps of a run warm up.

    Args:
        origin: where the number of steps comes from, for the error.

    Raises:
        RecipeError: all of them would, so that the learning rate never reaches `train.lr`.
    """
    warmup = train.warmup_steps or int(train.warmup_share * steps)
    if warmup >= steps and warmup:
        raise RecipeError(
            f"train.warmup_steps: expected fewer than the {steps} steps{origin}, got {warmup}: the learning rate would "
            f"never reach train.lr; choose at most {steps - 1}, or a share of the run: train.warmup_share=0.05"
        )
    return warmup


def rare_events(run: RunTable, steps: int) -> str | None:
    """Return one sentence on what the recipe asks for more rarely than once in a run, or None if nothing is."""
    default = RunTable()
    effects = {
        "log_every": "the log gets one line of losses",
        "evaluate_every": "the model is evaluated at the start and the end only",
        "save_every": "the state is saved at the end only",
    }
    rare = {key: getattr(run, key) for key in effects if getattr(run, key) > steps}
    rare = {key: value for key, value in rare.items() if value != getattr(default, key)}
    if not rare:
        return None
    keys = ", ".join(f"run.{key} = {value}" for key, value in rare.items())
    return f"{keys}: more than the {steps} steps of the run: {', '.join(effects[key] for key in rare)}"
