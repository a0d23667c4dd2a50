"""Recipes: a fine-tuning run as a TOML file of a task and some tables.

Reading a recipe imports no torch and runs no code. An unknown key is refused with the nearest known name; a renamed
key still works with a `DeprecationWarning`.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from normswap.errors import RecipeError
from normswap.finetune.tables import ConvertTable, DataTable, ModelTable, OwnTable, RunTable, TrainTable
from normswap.renamed import current_names, warn_renamed
from normswap.schema import SchemaError, nearest, read_record
from normswap.text import pluralize

_TASK = "task"
TASK_NAMES = ("classification", "segmentation", "detection", "own")


@dataclass(frozen=True)
class Recipe:
    """A complete fine-tuning run, as `normswap.read_recipe` returns it.

    Args:
        name: the name of the recipe; by default also that of the folder of the run.
        model, convert, data, own, train, run: the tables; `docs/reference/recipes.md` lists their keys.
        task: `"classification"`, `"segmentation"`, `"detection"`, or `"own"`, which a Python file defines.
        folder: the folder of the recipe, where the Python files that it names are looked up first.
        written: the keys that the user set, as `table.key`: those in a file of the user's and in overrides, not those
            in a recipe that comes with normswap. None counts every key whose value is not its default.

    Examples:
        >>> import normswap
        >>> recipe = normswap.read_recipe("digits_small_batch", ["train.lr=0.003"])
        >>> recipe.data.batch_size, recipe.train.lr, str(recipe.output)
        (1, 0.003, 'runs/digits_small_batch')
        >>> recipe.is_set_by_user("train.lr"), recipe.is_set_by_user("data.batch_size")
        (True, False)
    """

    __module__ = "normswap"

    name: str
    model: ModelTable = field(default_factory=ModelTable)
    convert: ConvertTable = field(default_factory=ConvertTable)
    data: DataTable = field(default_factory=DataTable)
    own: OwnTable = field(default_factory=OwnTable)
    train: TrainTable = field(default_factory=TrainTable)
    run: RunTable = field(default_factory=RunTable)
    task: str = "classification"
    folder: Path | None = field(default=None, compare=False)
    written: frozenset[str] | None = field(default=None, compare=False)

    def is_set_by_user(self, dotted_key: str) -> bool:
        """Return whether the user set a key, such as `model.architecture`."""
        dotted_key = _rename_key(dotted_key)
        if self.written is not None:
            return dotted_key in self.written
        if dotted_key == _TASK:
            return self.task != "classification"
        table, _, key = dotted_key.partition(".")
        return bool(getattr(getattr(self, table), key) != getattr(TABLES[table](), key))

    def is_written(self, dotted_key: str) -> bool:
        """Return `is_set_by_user(dotted_key)`; the old name of that method."""
        warn_renamed("Recipe.is_written", "is_set_by_user")
        return self.is_set_by_user(dotted_key)

    def to_dict(self) -> dict[str, Any]:
        """Return the task and the tables as plain data."""
        return {_TASK: self.task, **{name: asdict(getattr(self, name)) for name in TABLES}}

    def find_file(self, path: str) -> Path:
        """Return where a file is that the recipe names: in the folder of the recipe, else in the current folder."""
        beside = self.folder / path if self.folder else Path(path)
        return beside if beside.is_file() else Path(path)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output or f"runs/{self.name}")


TABLES: Mapping[str, Any] = {f.name: f.default_factory for f in fields(Recipe) if callable(f.default_factory)}
_RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {"train": {"batch_price": "batch_penalty"}}

# --- recipes that come with normswap ----------------------------------------------------------------------------------


class ShippedRecipe(NamedTuple):
    """A recipe that comes with normswap: its name, its first comment, its text, and the Python files that it names."""

    name: str
    summary: str
    text: str
    companions: tuple[Path, ...]


def shipped_folder() -> Path:
    """Return the folder of the recipes that come with normswap: in the package or, in a checkout, beside it."""
    package = Path(str(files("normswap")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def is_shipped(path: Path) -> bool:
    """Return whether a Python file came with normswap, next to its recipes: it runs without consent."""
    return path.resolve().parent == shipped_folder().resolve()


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Return the recipes that come with normswap by name."""
    found = {}
    for path in sorted(shipped_folder().glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        companions = tuple(file for file in sorted(path.parent.glob("*.py")) if f'"{file.name}' in text)
        found[path.stem] = ShippedRecipe(path.stem, first_comment(text), text, companions)
    return found


def find_shipped(name: str) -> ShippedRecipe:
    """Return a recipe that comes with normswap; raises RecipeError with the nearest name if there is none."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"no recipe {name!r}{_suggest(name, shipped)}: list them with normswap recipes ls, or name a .toml file"
        )
    return shipped[name]


def first_comment(text: str) -> str:
    """Return the comment at the top of a recipe as one paragraph."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(filter(None, (line.lstrip("#").strip() for line in lines)))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe in a TOML file, or a recipe that comes with normswap, with some values replaced.

    Args:
        source: a path that ends in `.toml`, or a name that `normswap recipes ls` lists.
        overrides: values to replace, as `table.key=value`; the value `none` removes the key.

    Returns:
        The recipe. Keys that it leaves out have their defaults.

    Raises:
        RecipeError: there is no such recipe; the file is not TOML; a table or key is unknown; a value has another type,
            is out of range, or contradicts another value.

    Examples:
        >>> import normswap
        >>> recipe = normswap.read_recipe("digits_small_batch", ["train.seed=1", "convert.exclude=['layer1.*']"])
        >>> recipe.train.seed, recipe.convert.exclude
        (1, ('layer1.*',))
    """
    if not isinstance(source, str | Path):
        raise RecipeError(f"source: expected a path that ends in .toml or the name of a recipe, got {source!r:.80}")
    if not isinstance(overrides, Iterable) or isinstance(overrides, str | bytes | Mapping):
        raise RecipeError(f"overrides: expected a list such as ['train.lr=0.01'], got {overrides!r:.80}")
    name, text, folder = _read_text(source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError that is no TOMLDecodeError: a number of 4301 digits
        raise RecipeError(f"{source}: not TOML: {error}") from None
    try:
        _check_names(data)
        data = rename_keys(data)
        set_by_user = set() if folder == shipped_folder() else _dotted_keys(data)
        replaced = dict(_parse_override(override) for override in overrides)
        for dotted_key, value in replaced.items():
            _apply_override(data, dotted_key, value)
        _drop_alternatives(data, replaced)
        recipe = parse_recipe(name, data)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return replace(recipe, folder=folder, written=frozenset((set_by_user | {*replaced}) & _dotted_keys(data)))


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """Return the recipe in plain data: a mapping of tables, each a mapping of keys, and of the task.

    Raises:
        RecipeError: as `read_recipe`.
    """
    _check_names(data)
    data = rename_keys(data)
    try:
        tables = {table: read_record(kind, data.get(table, {}), table) for table, kind in TABLES.items()}
    except SchemaError as error:
        raise RecipeError(str(error)) from None
    recipe = Recipe(name, **tables, task=data.get(_TASK, "classification"), written=frozenset(_dotted_keys(data)))
    for check in (_check_task, _check_keys_of_task, _check_model, _check_schedule, _check_images):
        check(recipe)
    return recipe


def rename_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with renamed keys under their new names; raises RecipeError if a key is set under both."""
    try:
        return {
            table: keys if table == _TASK else current_names(_RENAMED_KEYS.get(table, {}), keys, table)
            for table, keys in data.items()
        }
    except TypeError as error:
        raise RecipeError(str(error)) from None


def _read_text(source: str | Path) -> tuple[str, str, Path]:
    """The name of a recipe, its text, and its folder."""
    path = Path(source)
    if path.suffix != ".toml":
        return str(source), find_shipped(str(source)).text, shipped_folder()
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; list the recipes that come with normswap: normswap recipes ls")
    try:
        return path.stem, path.read_text(encoding="utf-8"), path.parent
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def _rename_key(dotted_key: str) -> str:
    if dotted_key == _TASK:
        return dotted_key
    table, _, key = dotted_key.partition(".")
    return ".".join([table, *rename_keys({table: {key: None}})[table]])


def _dotted_keys(data: Mapping[str, Any]) -> set[str]:
    keys = {f"{table}.{key}" for table, keys in data.items() if isinstance(keys, Mapping) for key in keys}
    return keys | ({_TASK} & {*data})


def _check_names(data: Mapping[str, Any]) -> None:
    """Refuse unknown tables, unknown keys, and values in place of tables."""
    for table, keys in data.items():
        if table == _TASK:
            continue
        if table not in TABLES:
            raise RecipeError(f"unknown table [{table}]{_suggest(table, TABLES)}")
        if not isinstance(keys, Mapping):
            raise RecipeError(f"{table}: expected a table [{table}], got {keys!r}")
        for key in keys:
            _check_key(table, key)


def _check_key(table: str, key: str) -> None:
    own = [f.name for f in fields(TABLES[table])]
    if key in own or key in _RENAMED_KEYS.get(table, {}):
        return
    # The nearest name in any table; of equal names that in the key's own table.
    places = {f.name: name for name, kind in TABLES.items() for f in fields(kind)} | dict.fromkeys(own, table)
    near = nearest(key, places)
    hint = f"; did you mean {places[near]}.{near}?" if near else f"; [{table}] has the keys {', '.join(own)}"
    raise RecipeError(f"unknown key {table}.{key}{hint}")


def _suggest(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else f"; choose one of {', '.join(known)}"


def _parse_override(override: str) -> tuple[str, str]:
    """The present name of the key in `table.key=value`, and the text of its value."""
    if not isinstance(override, str):
        raise RecipeError(f"overrides: expected table.key=value such as train.lr=0.01, got {override!r:.80}")
    dotted_key, equals, text = override.partition("=")
    if dotted_key.strip() == _TASK and equals:
        return _TASK, text
    table, dot, key = dotted_key.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"overrides: expected table.key=value such as train.lr=0.01, got {override!r}")
    if table not in TABLES:
        raise RecipeError(f"overrides={override!r}: unknown table [{table}]{_suggest(table, TABLES)}")
    _check_key(table, key)
    return _rename_key(f"{table}.{key}"), text


def _apply_override(data: dict[str, Any], dotted_key: str, text: str) -> None:
    """Set a key to a value in TOML, or else to the text itself; `none` removes the key."""
    table, _, key = dotted_key.rpartition(".")
    keys = data.setdefault(table, {}) if table else data
    if text.strip().lower() == "none":
        keys.pop(key, None)
        return
    try:
        keys[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # as in `read_recipe`
        keys[key] = text


# Pairs of keys of which a recipe sets at most one. An override of one replaces the other in the recipe.
_ALTERNATIVES = (("train.steps", "train.epochs"), ("train.warmup_steps", "train.warmup_share"))


def _drop_alternatives(data: dict[str, Any], replaced: Iterable[str]) -> None:
    for pair in _ALTERNATIVES:
        chosen = {*pair} & {*replaced} & _dotted_keys(data)
        if len(chosen) == 1:
            table, _, key = ({*pair} - chosen).pop().partition(".")
            data[table].pop(key, None)


# --- checks of several keys -------------------------------------------------------------------------------------------


def check_warmup(train: TrainTable, steps: int, origin: str = "") -> int:
    """Return how many of the steps of a run are warm-up; `origin` explains the number of steps in the error.

    Raises:
        RecipeError: the learning rate would never reach `train.lr`.
    """
    warmup = train.warmup_steps or int(train.warmup_share * steps)
    if warmup >= steps and warmup:
        raise RecipeError(
            f"train.warmup_steps: expected fewer than the {steps} steps{origin}, got {warmup}: the learning rate would "
            f"never reach train.lr; choose at most {steps - 1}, or a fraction of the run: train.warmup_share=0.05"
        )
    return warmup


def _check_task(recipe: Recipe) -> None:
    if recipe.task not in TASK_NAMES:
        near = nearest(recipe.task, TASK_NAMES) if isinstance(recipe.task, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise RecipeError(f"task: expected one of {', '.join(TASK_NAMES)}, got {recipe.task!r}{hint}")
    if recipe.task == "own" and recipe.own.file is None:
        raise RecipeError('own.file: expected the Python file of the task, such as own.file = "task.py"')
    if recipe.task != "own" and recipe.own != OwnTable():
        raise RecipeError(f'own: used only with task = "own", got task = "{recipe.task}": set task, or remove [own]')


# Keys of [data] that a task does not use.
_CLASSIFICATION_KEYS = ("auto_augment", "random_erase", "mixup", "cutmix")
_SEGMENTATION_KEYS = ("classes", "ignore_index")
_UNUSED_KEYS: Mapping[str, tuple[str, ...]] = {
    "classification": _SEGMENTATION_KEYS,
    "segmentation": _CLASSIFICATION_KEYS,
    "detection": (*_CLASSIFICATION_KEYS, "label_smoothing", *_SEGMENTATION_KEYS),
    "own": (),
}


def _check_keys_of_task(recipe: Recipe) -> None:
    default = DataTable()
    unused = [key for key in _UNUSED_KEYS[recipe.task] if getattr(recipe.data, key) != getattr(default, key)]
    if unused:
        keys = ", ".join(f"data.{key}" for key in unused)
        raise RecipeError(f'{keys}: not used with task = "{recipe.task}": remove {pluralize(len(unused), "key")}')
    if recipe.model.new_head and recipe.task in ("segmentation", "detection"):
        raise RecipeError(
            f'model.new_head: replaces classifiers only: with task = "{recipe.task}" build the model for the classes '
            "of the data, such as model.architecture = 'torchvision:NAME,num_classes=5'"
        )


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    if model.checkpoint is None and model.architecture is None and recipe.task != "own":
        raise RecipeError("model: expected a checkpoint or an architecture, such as architecture = 'timm:resnet50'")
    if model.pretrained and model.checkpoint is not None:
        raise RecipeError("model.pretrained: the weights come from model.checkpoint; remove one of the two keys")
    if model.entry is not None and model.checkpoint is None:
        raise RecipeError("model.entry: selects weights in a checkpoint; set model.checkpoint too, or remove it")


def _check_schedule(recipe: Recipe) -> None:
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
    if train.sharding == "fsdp" and train.precision == "fp16":
        raise RecipeError(
            'train.precision: "fp16" scales the loss in each process by itself, which sharded gradients do not allow: '
            'use "bf16", or train.sharding = "none"'
        )
    if train.min_lr > train.lr:
        raise RecipeError(f"train.min_lr: expected at most train.lr ({train.lr:g}), got {train.min_lr:g}")


def _check_images(recipe: Recipe) -> None:
    data = recipe.data
    scale = data.crop_scale
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise RecipeError(f"data.crop_scale: expected 0 < smallest <= largest <= 1, got {list(scale)}")
    if (data.mixup or data.cutmix) and data.batch_size % 2:
        raise RecipeError(f"data.mixup, data.cutmix: expected an even data.batch_size, got {data.batch_size}")
