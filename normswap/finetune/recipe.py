"""Recipes: a fine-tuning run as a TOML file of five tables, every key of which is known and checked.

A recipe is data: reading one imports nothing and runs nothing. What it leaves out has the default written here, which
`normswap recipes show` prints; what it misspells is refused with the nearest name.
"""

import difflib
import math
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from normswap.errors import RecipeError
from normswap.finetune.recipe_fields import ConvertTable, DataTable, ModelTable, Range, RunTable, TrainTable
from normswap.text import jsonable

# MERGED DOC: How many steps a run takes, how many of them warm up, and what in its recipe does not fit that length.


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


def describe_rare_events(run: RunTable, steps: int) -> str | None:
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


@dataclass(frozen=True)
class Recipe:
    """A complete fine-tuning run; the tables are described where they are defined.

    `written` are the keys that the user wrote, as `table.key`: all in a file of the user's and in `--set`, none of
    those in a recipe that came with normswap. None takes every key that differs from its default for one.
    """

    name: str
    model: ModelTable = field(default_factory=ModelTable)
    convert: ConvertTable = field(default_factory=ConvertTable)
    data: DataTable = field(default_factory=DataTable)
    train: TrainTable = field(default_factory=TrainTable)
    run: RunTable = field(default_factory=RunTable)
    written: frozenset[str] | None = field(default=None, compare=False)

    def is_set_by_user(self, dotted_key: str) -> bool:
        """Say whether the user wrote the key `place`, such as `model.architecture`."""
        if self.written is not None:
            return dotted_key in self.written
        table, _, key = dotted_key.partition(".")
        return bool(_get_value(self, dotted_key) != getattr(TABLES[table](), key))

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain data."""
        return {name: asdict(getattr(self, name)) for name in TABLES}

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output or f"runs/{self.name}")


class ShippedRecipe(NamedTuple):
    """A recipe that came with normswap: its name, its first comment, its text."""

    name: str
    summary: str
    text: str


TABLES: Mapping[str, Any] = {f.name: f.default_factory for f in fields(Recipe) if f.name not in ("name", "written")}


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Return the recipes that come with normswap by name: those in the package, in a checkout those beside it."""
    package = files("normswap")
    folder = package / "recipes"
    if not folder.is_dir() and isinstance(package, Path):
        folder = package.parent / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            text = entry.read_text(encoding="utf-8")
            name = entry.name.removesuffix(".toml")
            found[name] = ShippedRecipe(name, first_comment(text), text)
    return found


def find_shipped(name: str) -> ShippedRecipe:
    """Return the recipe of that name in the package.

    Raises:
        RecipeError: there is none, with the nearest name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"no recipe {name!r}{_suggest_name(name, shipped)}: see normswap recipes ls, or name a .toml file"
        )
    return shipped[name]


def first_comment(text: str) -> str:
    """Return the comment that a recipe starts with, as one paragraph."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(filter(None, lines))


def read_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe in a file, or the shipped one of that name, with `table.key=value` put over it.

    Raises:
        RecipeError: no such recipe; not TOML; an unknown table or key; a value of the wrong kind, out of its range, or
            at odds with another one.
    """
    name, text, is_shipped = _read_text(source)
    overrides = tuple(overrides)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not TOML: {error}") from None
    written = set() if is_shipped else _dotted_keys(data)
    for override in overrides:
        _apply_override(data, override)
    written |= {override.partition("=")[0].strip() for override in overrides}
    _replace_alternatives(data, overrides)
    try:
        return replace(parse_recipe(name, data), written=frozenset(written & _dotted_keys(data)))
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """Return the recipe in plain data: tables of keys.

    Raises:
        RecipeError: as `read_recipe`.
    """
    for table, keys in data.items():
        if table not in TABLES:
            raise RecipeError(f"unknown table [{table}]{_suggest_name(table, TABLES)}")
        if not isinstance(keys, Mapping):
            raise RecipeError(f"{table}: expected a table [{table}], got {keys!r}")
    tables = {table: _parse_table(table, build, data.get(table, {})) for table, build in TABLES.items()}
    recipe = Recipe(name, **tables, written=frozenset(_dotted_keys(data)))
    for check in _CHECKS:
        check(recipe)
    return recipe


def differing_keys(recipe: Recipe, other: Mapping[str, Any]) -> list[str]:
    """Return the keys, as `table.key`, whose values differ between a recipe and another's `to_dict()`.

    A key that the other does not have, since an older version wrote it, has its default there.
    """
    own_values, default = recipe.to_dict(), {name: asdict(build()) for name, build in TABLES.items()}
    return [
        f"{table}.{key}"
        for table, keys in own_values.items()
        for key, value in keys.items()
        if jsonable(value) != jsonable(other.get(table, {}).get(key, default[table][key]))
    ]


def _read_text(source: str | Path) -> tuple[str, str, bool]:
    """The name of a recipe, its text, and whether it came with normswap."""
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"{path}: no such file: see what there is with normswap recipes ls")
        try:
            return path.stem, path.read_text(encoding="utf-8"), False
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not TOML: {error}") from None
    return str(source), find_shipped(str(source)).text, True


def _dotted_keys(data: Mapping[str, Any]) -> set[str]:
    return {f"{table}.{key}" for table, keys in data.items() if isinstance(keys, Mapping) for key in keys}


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Put `table.key=value` over plain data; the value is TOML, or else a string."""
    dotted_key, equals, text = override.partition("=")
    table, dot, key = dotted_key.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"overrides: expected table.key=value such as train.lr=0.01, got {override!r}")
    if table not in TABLES:
        raise RecipeError(f"overrides={override!r}: unknown table [{table}]{_suggest_name(table, TABLES)}")
    keys = data.setdefault(table, {})
    if text.strip().lower() == "none":
        keys.pop(key, None)
        _check_key(table, key, get_type_hints(TABLES[table]))
        return
    try:
        keys[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        keys[key] = text


# Keys of which a recipe has one at most. One that is put over a recipe takes the place of the other one in it.
_ALTERNATIVES = (("train.steps", "train.epochs"), ("train.warmup_steps", "train.warmup_share"))


def _replace_alternatives(data: dict[str, Any], overrides: Iterable[str]) -> None:
    overridden = {override.partition("=")[0].strip() for override in overrides}
    for pair in _ALTERNATIVES:
        chosen = [dotted_key for dotted_key in pair if dotted_key in overridden and dotted_key in _dotted_keys(data)]
        if len(chosen) == 1:
            (other,) = {*pair} - {*chosen}
            table, _, key = other.partition(".")
            data[table].pop(key, None)


def _parse_table(name: str, build: Callable[..., Any], data: Mapping[str, Any]) -> Any:
    hints = get_type_hints(build)
    values = {}
    for key, value in data.items():
        _check_key(name, key, hints)
        values[key] = _read_value(f"{name}.{key}", value, hints[key])
    return build(**values)


def _check_key(table: str, key: str, keys: Mapping[str, Any]) -> None:
    if key not in keys:
        elsewhere = [f"{other}.{key}" for other, build in TABLES.items() if key in get_type_hints(build)]
        near = f"; did you mean {elsewhere[0]}?" if elsewhere else _suggest_name(key, keys)
        raise RecipeError(f"unknown key {table}.{key}{near}")


def _read_value(dotted_key: str, value: Any, kind: Any) -> Any:
    """The value as its annotation wants it: a number, a text, a flag, or a tuple of one of them."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for expected_type in kinds:
        if get_origin(expected_type) is tuple and isinstance(value, list | tuple):
            item_types = get_args(expected_type)
            if item_types[-1] is Ellipsis or len(item_types) == len(value):
                return tuple(_read_value(dotted_key, item, item_types[0]) for item in value)
        if expected_type is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(expected_type, type) and type(value) is expected_type:
            return value
    expected = " or ".join(
        _TYPE_NAMES.get(expected_type, "a list of two numbers")
        for expected_type in kinds
        if expected_type is not type(None)
    )
    raise RecipeError(f"{dotted_key}: expected {expected}, got {value!r}")


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
}


def _suggest_name(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


# Smallest and largest value of each number; a key that may be left out is not looked at where it is.
_INFINITE = math.inf
_RANGES: Mapping[str, Range] = {
    "data.batch_size": (1, _INFINITE),
    "data.evaluation_batch_size": (1, _INFINITE),
    "data.image_size": (1, _INFINITE),
    "data.workers": (0, _INFINITE),
    "data.flip": (0, 1),
    "data.color_jitter": (0, _INFINITE),
    "data.random_erase": (0, 1),
    "data.mixup": (0, _INFINITE),
    "data.cutmix": (0, _INFINITE),
    "data.label_smoothing": (0, 0.99),
    "train.steps": (1, _INFINITE),
    "train.epochs": (1, _INFINITE),
    "train.lr": (0, _INFINITE),
    "train.importance_lr": (0, _INFINITE),
    "train.momentum": (0, 1),
    "train.weight_decay": (0, _INFINITE),
    "train.min_lr": (0, _INFINITE),
    "train.warmup_steps": (0, _INFINITE),
    "train.warmup_share": (0, 0.99),
    "train.clip": (0, _INFINITE),
    "train.accumulation": (1, _INFINITE),
    "train.ema_decay": (0, 0.99999999),
    "train.batch_price": (0, _INFINITE),
    "train.seed": (0, 2**32 - 1),
    "run.log_every": (1, _INFINITE),
    "run.evaluate_every": (0, _INFINITE),
    "run.save_every": (0, _INFINITE),
}
_CHOICES: Mapping[str, tuple[str | bool | None, ...]] = {
    "model.new_head": (True, False, "always"),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.precision": ("no", "bf16", "fp16"),
    "convert.gate": (None, "simplex", "softmax"),
    "convert.bn_statistics": ("batch", "running", "renorm"),
}


def _get_value(recipe: Recipe, dotted_key: str) -> Any:
    table, _, key = dotted_key.partition(".")
    return getattr(getattr(recipe, table), key)


def _check_ranges(recipe: Recipe) -> None:
    for dotted_key, (minimum, maximum) in _RANGES.items():
        value = _get_value(recipe, dotted_key)
        if value is not None and not (minimum <= value <= maximum and math.isfinite(value)):
            expected = f"at least {minimum:g}" if math.isinf(maximum) else f"{minimum:g} to {maximum:g}"
            raise RecipeError(f"{dotted_key}: expected {expected}, got {value!r}")


def _check_choices(recipe: Recipe) -> None:
    for dotted_key, known in _CHOICES.items():
        value = _get_value(recipe, dotted_key)
        if value not in known:
            expected = [str(choice).lower() for choice in known if choice is not None]
            raise RecipeError(f"{dotted_key}: expected one of {', '.join(expected)}, got {value!r}")


def _check_source(recipe: Recipe) -> None:
    model = recipe.model
    if model.checkpoint is None and model.architecture is None:
        raise RecipeError("model: expected a checkpoint or an architecture such as architecture = 'timm:resnet50'")
    if model.pretrained and model.checkpoint is not None:
        raise RecipeError("model.pretrained: the weights come from model.checkpoint: leave one of the two out")
    if model.entry is not None and model.checkpoint is None:
        raise RecipeError("model.entry: names weights in a checkpoint: give model.checkpoint too")


def _check_length(recipe: Recipe) -> None:
    train = recipe.train
    if (train.steps is None) == (train.epochs is None):
        raise RecipeError("train: expected either steps or epochs, such as epochs = 10")
    if train.warmup_steps and train.warmup_share:
        raise RecipeError(
            f"train.warmup_steps, train.warmup_share: expected one of the two, got {train.warmup_steps} and "
            f"{train.warmup_share}"
        )
    if train.steps is not None:
        check_warmup(train, train.steps)


def _check_rates(recipe: Recipe) -> None:
    train = recipe.train
    if train.min_lr > train.lr:
        raise RecipeError(f"train.min_lr: expected at most the {train.lr:g} of train.lr, got {train.min_lr:g}")


def _check_crop(recipe: Recipe) -> None:
    scale = recipe.data.crop_scale
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise RecipeError(f"data.crop_scale: expected shares 0 < least <= most <= 1, got {list(scale)}")


def _check_mixing(recipe: Recipe) -> None:
    data = recipe.data
    if (data.mixup or data.cutmix) and data.batch_size % 2:
        raise RecipeError(f"data.mixup, data.cutmix: expected an even data.batch_size, got {data.batch_size}")


_CHECKS = (_check_ranges, _check_choices, _check_source, _check_length, _check_rates, _check_crop, _check_mixing)
