"""Recipes: a fine-tuning run as a TOML file of five tables.

The dataclasses of the tables are the schema: each field states its type, its range or choices, and its default.
`docs/reference/recipes.md` explains all keys. Reading a recipe imports no torch and runs no code. An unknown key is
refused with the nearest known name; a renamed key still works with a `DeprecationWarning`.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from normswap.errors import RecipeError
from normswap.renamed import current_names, renamed_fields, warn_renamed
from normswap.schema import Range, SchemaError, nearest, read_record

# --- the tables -------------------------------------------------------------------------------------------------------

PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class ModelTable:
    """`[model]`: the model to train."""

    checkpoint: str | None = None  # file or folder that `normswap.load` reads; None: the weights of `architecture`
    architecture: str | None = None  # as `--arch`; required unless the checkpoint records one, and must agree with it
    entry: str | None = None  # which weights if the checkpoint has several, such as `state_dict_ema`
    pretrained: bool = False  # download the published weights of a timm architecture; not with `checkpoint`
    # True replaces the classifier (timm models) if its number of classes differs from that of the data.
    new_head: bool | Literal["always"] = False


@dataclass(frozen=True)
class ConvertTable:
    """`[convert]`: how a model without gates is converted before training; keys as in `normswap.convert`."""

    enabled: bool = True  # False trains the model without conversion, for a comparison
    gate: Literal["simplex", "softmax"] | None = None  # None: the default of `normswap.convert`
    bn_statistics: Literal["batch", "running", "renorm"] = "running"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[Literal["bn", "in", "gn1", "gn"], ...] = ("bn",)
    synchronize: bool = False
    start: Literal["ln", "gn", "uniform"] | None = None  # None: each site starts at its old norm
    num_groups: PositiveInt = 32  # with `start = "gn"`
    match: bool = True  # match `in` and `ln` to the running statistics
    # Sites whose running statistics were never updated: compute these on images of the training split before training,
    # start the sites at `in` and `ln`, or keep them.
    untrained: Literal["calibrate", "uniform", "keep"] = "calibrate"
    # Values by pattern, as `settings` of `normswap.convert`; `normswap analyze` prints some.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    verify: bool = (
        True  # False also trains a converted model that computes another function, such as with softmax gates
    )


@dataclass(frozen=True)
class DataTable:
    """`[data]`: the images."""

    source: str = "digits"  # also `digits:shifted`, a folder (`folder:PATH`), or a timm data set (`torch/cifar10`)
    root: str | None = None  # folder of a timm data set
    download: bool = False  # download that data set if the folder does not contain it
    train_split: str = "train"
    evaluation_split: str = "validation"
    batch_size: PositiveInt = 2  # images per process and forward pass in training
    evaluation_batch_size: PositiveInt = 64  # the same in evaluation, where it does not change the result
    image_size: PositiveInt | None = None  # pixels per side; None: as the model's own configuration
    workers: NonNegativeInt = 0  # processes that load and augment; 0: the training process; results do not depend on it
    crop_scale: tuple[float, float] | None = None  # smallest and largest fraction of the area that a random crop keeps
    flip: Probability = 0.0  # of a horizontal flip
    color_jitter: NonNegative = 0.0  # strength of random brightness, contrast and saturation
    auto_augment: str | None = None  # timm's name of a policy, such as `rand-m9-mstd0.5`
    random_erase: Probability = 0.0  # that a rectangle is erased
    mixup: NonNegative = 0.0  # alpha; 0: off; needs an even `batch_size`
    cutmix: NonNegative = 0.0  # alpha; 0: off; needs an even `batch_size`
    label_smoothing: Annotated[float, Range(0, 0.99)] = 0.0  # fraction of a target that is spread over all classes


@renamed_fields(batch_price="batch_penalty")
@dataclass(frozen=True)
class TrainTable:
    """`[train]`: how the model is trained. A step is one update of the parameters."""

    steps: PositiveInt | None = None  # either this or `epochs`
    epochs: PositiveInt | None = None  # passes over the data
    optimizer: str = "momentum"  # timm's name: `sgd` (with Nesterov momentum), `momentum` (without), `adamw`, ...
    lr: NonNegative = 0.01
    momentum: Probability = 0.9
    weight_decay: NonNegative = 1e-4  # of all parameters but gates, norms and biases
    importance_lr: NonNegative | None = None  # learning rate of the gates; None: 100 times `lr`, at most 1.5 / sites
    # Largest change of an importance weight per step; None: 0.5 / sites, at most 0.1; 0: no limit.
    gate_max_step: Annotated[float, Range(0, 1)] | None = None
    gate_warmup_steps: NonNegativeInt = 100  # steps in which this limit rises from 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr: NonNegative = 0.0  # `lr` at the end; all other rates decay by the same factor
    warmup_steps: NonNegativeInt = 0  # steps in which the rates rise from 0; fewer than the run has
    warmup_share: Annotated[float, Range(0, 0.99)] = 0.0  # the same as a fraction of all steps
    clip: NonNegative = 1.0  # maximum gradient norm of all parameters but the gates; 0: off
    accumulation: PositiveInt = 1  # forward passes per step, each with a batch of its own
    precision: Literal["no", "bf16", "fp16"] = "no"  # autocast by accelerate
    # Of a moving average of the weights, which is then evaluated and saved; 0: off. The decay rises to this value over
    # the steps, so that the average follows short runs too.
    ema_decay: Annotated[float, Range(0, 0.99999999)] = 0.0
    batch_penalty: NonNegative = 0.0  # factor of `normswap.batch_dependence(model)` in the loss
    # Factor of `normswap.gate_impurity(model)` in the loss, in the second half of the run: gates go to one branch.
    one_hot_penalty: NonNegative = 0.0
    channels_last: bool = False  # memory format of images and weights
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of the image order, the augmentation and all other randomness


@dataclass(frozen=True)
class RunTable:
    """`[run]`: what a run writes, and how often."""

    output: str | None = None  # folder of the run; None: `runs/` and the recipe's name
    # Steps between two lines of the log. Several processes notice signals and losses that are not finite at these only.
    log_every: PositiveInt = 20
    evaluate_every: NonNegativeInt = 0  # steps between two evaluations; 0: at the start and the end only
    save_every: NonNegativeInt = 0  # steps between two saved states; 0: at the end, and if the run is interrupted


@dataclass(frozen=True)
class Recipe:
    """A complete fine-tuning run, as `normswap.read_recipe` returns it.

    Args:
        name: the name of the recipe; by default also that of the folder of the run.
        model, convert, data, train, run: the tables; `docs/reference/recipes.md` lists their keys.
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
    train: TrainTable = field(default_factory=TrainTable)
    run: RunTable = field(default_factory=RunTable)
    written: frozenset[str] | None = field(default=None, compare=False)

    def is_set_by_user(self, dotted_key: str) -> bool:
        """Return whether the user set a key, such as `model.architecture`."""
        dotted_key = _rename_key(dotted_key)
        if self.written is not None:
            return dotted_key in self.written
        table, _, key = dotted_key.partition(".")
        return bool(getattr(getattr(self, table), key) != getattr(TABLES[table](), key))

    def is_written(self, dotted_key: str) -> bool:
        """Return `is_set_by_user(dotted_key)`; the old name of that method."""
        warn_renamed("Recipe.is_written", "is_set_by_user")
        return self.is_set_by_user(dotted_key)

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain data."""
        return {name: asdict(getattr(self, name)) for name in TABLES}

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.run.output or f"runs/{self.name}")


TABLES: Mapping[str, Any] = {f.name: f.default_factory for f in fields(Recipe) if f.name not in ("name", "written")}
_RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {"train": {"batch_price": "batch_penalty"}}

# --- recipes that come with normswap ----------------------------------------------------------------------------------


class ShippedRecipe(NamedTuple):
    """A recipe that comes with normswap: its name, its first comment, its text."""

    name: str
    summary: str
    text: str


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """Return the recipes that come with normswap by name, from the package or, in a checkout, from its `recipes/`."""
    package = files("normswap")
    folder = package / "recipes"
    if not folder.is_dir() and isinstance(package, Path):
        folder = package.parent / "recipes"
    paths = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    texts = {path.name.removesuffix(".toml"): path.read_text(encoding="utf-8") for path in paths}
    return {name: ShippedRecipe(name, first_comment(text), text) for name, text in sorted(texts.items())}


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
    name, text, is_shipped = _read_text(source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError that is no TOMLDecodeError: a number of 4301 digits
        raise RecipeError(f"{source}: not TOML: {error}") from None
    try:
        _check_names(data)
        data = rename_keys(data)
        set_by_user = set() if is_shipped else _dotted_keys(data)
        replaced = dict(_parse_override(override) for override in overrides)
        for dotted_key, value in replaced.items():
            _apply_override(data, dotted_key, value)
        _drop_alternatives(data, replaced)
        recipe = parse_recipe(name, data)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return replace(recipe, written=frozenset((set_by_user | {*replaced}) & _dotted_keys(data)))


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """Return the recipe in plain data: a mapping of tables, each a mapping of keys.

    Raises:
        RecipeError: as `read_recipe`.
    """
    _check_names(data)
    data = rename_keys(data)
    try:
        tables = {table: read_record(kind, data.get(table, {}), table) for table, kind in TABLES.items()}
    except SchemaError as error:
        raise RecipeError(str(error)) from None
    recipe = Recipe(name, **tables, written=frozenset(_dotted_keys(data)))
    for check in (_check_model, _check_schedule, _check_images):
        check(recipe)
    return recipe


def rename_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with renamed keys under their new names; raises RecipeError if a key is set under both."""
    try:
        return {table: current_names(_RENAMED_KEYS.get(table, {}), keys, table) for table, keys in data.items()}
    except TypeError as error:
        raise RecipeError(str(error)) from None


def _read_text(source: str | Path) -> tuple[str, str, bool]:
    """The name of a recipe, its text, and whether it comes with normswap."""
    path = Path(source)
    if path.suffix != ".toml":
        return str(source), find_shipped(str(source)).text, True
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; list the recipes that come with normswap: normswap recipes ls")
    try:
        return path.stem, path.read_text(encoding="utf-8"), False
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def _rename_key(dotted_key: str) -> str:
    table, _, key = dotted_key.partition(".")
    return ".".join([table, *rename_keys({table: {key: None}})[table]])


def _dotted_keys(data: Mapping[str, Any]) -> set[str]:
    return {f"{table}.{key}" for table, keys in data.items() if isinstance(keys, Mapping) for key in keys}


def _check_names(data: Mapping[str, Any]) -> None:
    """Refuse unknown tables, unknown keys, and values in place of tables."""
    for table, keys in data.items():
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
    table, dot, key = dotted_key.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"overrides: expected table.key=value such as train.lr=0.01, got {override!r}")
    if table not in TABLES:
        raise RecipeError(f"overrides={override!r}: unknown table [{table}]{_suggest(table, TABLES)}")
    _check_key(table, key)
    return _rename_key(f"{table}.{key}"), text


def _apply_override(data: dict[str, Any], dotted_key: str, text: str) -> None:
    """Set a key to a value in TOML, or else to the text itself; `none` removes the key."""
    table, _, key = dotted_key.partition(".")
    keys = data.setdefault(table, {})
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


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    if model.checkpoint is None and model.architecture is None:
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
    if train.min_lr > train.lr:
        raise RecipeError(f"train.min_lr: expected at most train.lr ({train.lr:g}), got {train.min_lr:g}")


def _check_images(recipe: Recipe) -> None:
    data = recipe.data
    scale = data.crop_scale
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise RecipeError(f"data.crop_scale: expected 0 < smallest <= largest <= 1, got {list(scale)}")
    if (data.mixup or data.cutmix) and data.batch_size % 2:
        raise RecipeError(f"data.mixup, data.cutmix: expected an even data.batch_size, got {data.batch_size}")
