"""What is said of a data set before it is opened: where it lies, what its images become, what they are for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Use = Literal["training", "calibration", "evaluation"]


@dataclass(frozen=True)
class Manner:
    """What a use asks of the data: images in random order, augmented, in whole batches only, with labels."""

    shuffled: bool
    augmented: bool
    whole_batches: bool
    labelled: bool


USES: Mapping[str, Manner] = {
    "training": Manner(shuffled=True, augmented=True, whole_batches=True, labelled=True),
    # Folders come class by class, and a batch of one class has statistics of its own.
    "calibration": Manner(shuffled=True, augmented=False, whole_batches=False, labelled=False),
    "evaluation": Manner(shuffled=False, augmented=False, whole_batches=False, labelled=True),
}


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they become batches. What is None is as the model's `pretrained_cfg` says.

    Attributes:
        source: `folder:PATH` with a folder per class, in PATH/SPLIT where there is one; `digits`, or
            `digits:shifted`, of another domain; or a name of timm's, `torch/cifar10`, `hfds/NAME`, `wds/NAME`.
        split: `train`, `validation`, `test`, or what the data set calls it.
        root: where a data set of timm's lies, or is put if `download` is set.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3.
        mean, std: per channel, of pixels from 0 to 1.
        crop_pct: the share of the resized image that is cut out of its middle.
        augmentation: for training, options of `timm.data.create_transform` such as `{"auto_augment": "rand-m9"}`.
        class_names: the folders of the classes in the order of their labels, as `Data.class_names` of the training
            split has them; by default those that are there.
    """

    source: str
    split: str = "train"
    root: str | None = None
    download: bool = False
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    batch_size: int = 32
    workers: int = 0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    seed: int = 0
