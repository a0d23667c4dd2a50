"""What a recipe may say: the keys of its five tables, their kinds and their defaults."""

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class ModelTable:
    """`[model]`: what is trained.

    Args:
        checkpoint: a file or folder that `normswap.load` reads; without it the weights are those of `architecture`.
        architecture: as `--arch`; needed if the checkpoint does not name its own, which it may not contradict.
        entry: which weights of several in the checkpoint, such as `state_dict_ema`.
        pretrained: fetch the published weights of a timm architecture; not with `checkpoint`.
        new_head: true gives the model a new classifier (timm models) if its own has another number of classes than the
            data; false never does; "always" also replaces one that fits.
    """

    checkpoint: str | None = None
    architecture: str | None = None
    entry: str | None = None
    pretrained: bool = False
    new_head: bool | str = False


@dataclass(frozen=True)
class ConvertTable:
    """`[convert]`: what is done to a model without gates before it is trained.

    Args:
        enabled: false trains the model as it is, for a comparison.
        gate, bn_statistics, include, exclude, kinds, synchronize: as `normswap.convert`; None is its default.
    """

    enabled: bool = True
    gate: str | None = None
    bn_statistics: str = "batch"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("bn",)
    synchronize: bool = False


@dataclass(frozen=True)
class DataTable:
    """`[data]`: the images.

    Args:
        source: `digits`, `digits:shifted`, a folder of images (`folder:PATH`), or a data set of timm (`torch/cifar10`).
        root, download: where a data set of timm's lies, and whether it is fetched if it does not.
        train_split, evaluation_split: their names in the source.
        batch_size: images per process and forward pass in training.
        evaluation_batch_size: the same in evaluation, where it changes no result.
        image_size: pixels per side; None is what the model's own configuration says.
        workers: processes that load and augment; 0 does it in the training process. No result depends on it.
        crop_scale: share of an image's area that a random crop keeps; None: no random crop.
        flip: probability of a horizontal flip.
        color_jitter: strength of random brightness, contrast and saturation.
        auto_augment: timm's name of a policy, such as `rand-m9-mstd0.5`.
        random_erase: probability that a rectangle is erased.
        mixup, cutmix: alpha of each; 0 is off. Both need an even `batch_size`.
        label_smoothing: share of a target that is spread over all classes.
    """

    source: str = "digits"
    root: str | None = None
    download: bool = False
    train_split: str = "train"
    evaluation_split: str = "validation"
    batch_size: int = 2
    evaluation_batch_size: int = 64
    image_size: int | None = None
    workers: int = 0
    crop_scale: Range | None = None
    flip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TrainTable:
    """`[train]`: how it is trained. A step is one update of the parameters.

    Args:
        steps: how many, or
        epochs: how many times through the data; one of the two.
        optimizer: timm's name: `sgd` (with Nesterov momentum), `momentum` (without), `adamw`, ...
        lr, momentum, weight_decay: of the optimizer; gates, norms and biases do not decay.
        importance_lr: learning rate of the gates; None is `lr`.
        schedule: how the rates fall: `constant`, `linear` or `cosine`.
        min_lr: what `lr` has fallen to at the end; all other rates fall by the same factor.
        warmup_steps: steps in which the rate rises from 0; fewer than the run has.
        warmup_share: the same as a share of all steps, such as 0.05; one of the two.
        clip: largest norm of the gradient of everything but the gates; 0 is off.
        accumulation: forward passes per step; each gets a batch of its own.
        precision: `no`, `bf16` or `fp16`: autocast, by accelerate.
        ema_decay: of a moving average of the weights, which is then what is evaluated and kept; 0 is off. The decay
            rises to this value over the steps, so that a short run is averaged too.
        batch_price: what the BN share of all sites costs in the loss (`normswap.batch_dependence`).
        channels_last: keep images and weights in that memory format.
        seed: of the order of the images, their augmentation, and all other randomness.
    """

    steps: int | None = None
    epochs: int | None = None
    optimizer: str = "momentum"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    importance_lr: float | None = None
    schedule: str = "cosine"
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_share: float = 0.0
    clip: float = 1.0
    accumulation: int = 1
    precision: str = "no"
    ema_decay: float = 0.0
    batch_price: float = 0.03
    channels_last: bool = False
    seed: int = 0


@dataclass(frozen=True)
class RunTable:
    """`[run]`: what is written, and how often.

    Args:
        output: the folder of the run; None is the recipe's name under `runs/`.
        log_every: steps between two lines of the log, each with the importance weights; what else is to be noticed in
            many processes (a signal, a loss that is no number) is noticed there too.
        evaluate_every: steps between two evaluations; 0 evaluates at the start and the end only.
        save_every: steps between two saved states; 0 saves at the end, and when the run is interrupted.
    """

    output: str | None = None
    log_every: int = 20
    evaluate_every: int = 0
    save_every: int = 0
