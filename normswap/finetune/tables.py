"""The tables of a recipe.

The dataclasses are the schema: each field states its type, its range or choices, and its default.
`docs/reference/recipes.md` explains all keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from normswap.renamed import renamed_fields
from normswap.schema import Range

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
    classes: Annotated[int, Range(2)] | None = None  # of the masks in a folder, with that of the background
    ignore_index: int = 255  # value of the pixels of a mask that do not count


@dataclass(frozen=True)
class OwnTable:
    """`[own]`: with `task = "own"`, the Python file that defines data, loss and metrics, and possibly the model."""

    file: str | None = None  # looked up in the folder of the recipe, then in the current folder
    # Keyword arguments of the functions in the file; each function gets those that it names.
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


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
    # "fsdp" distributes the parameters over the processes, for models of which several replicas need too much memory.
    sharding: Literal["none", "fsdp"] = "none"
    channels_last: bool = False  # memory format of images and weights; with sharding of images only
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of the image order, the augmentation and all other randomness


@dataclass(frozen=True)
class RunTable:
    """`[run]`: what a run writes, and how often."""

    output: str | None = None  # folder of the run; None: `runs/` and the recipe's name
    # Steps between two lines of the log. Several processes notice signals and losses that are not finite at these only.
    log_every: PositiveInt = 20
    evaluate_every: NonNegativeInt = 0  # steps between two evaluations; 0: at the start and the end only
    save_every: NonNegativeInt = 0  # steps between two saved states; 0: at the end, and if the run is interrupted
