"""ImageNet's EfficientNet-Lite0, moved to Fashion-MNIST at 64 pixels: as it is, or under a strong shift."""

import torch

import normswap.finetune.data.digits as digits
from benchmarks.finetuning import fashion, pretrained, shift
from benchmarks.finetuning.evidence.settings.task import Examples, Task
from benchmarks.finetuning.shift import STRONG, render

SOURCES = (fashion, pretrained, shift, digits)
# Images of each set, drawn by the seed: the first two from the package's training images.
TRAIN, VALIDATION, TEST = 6400, 500, 2000


def plain(seed: int) -> Task:
    """Grey images, without a shift."""
    return _task(seed, None)


def shifted(seed: int) -> Task:
    """Images with other colours, texture, contrast and brightness."""
    return _task(seed, STRONG)


def _task(seed: int, strength: digits.Shift | None) -> Task:
    generator = torch.Generator().manual_seed(seed)
    images, labels = fashion.load("train")
    order = torch.randperm(len(labels), generator=generator)
    test_images, test_labels = fashion.load("test")
    test_order = torch.randperm(len(test_labels), generator=generator)[:TEST]
    sets = [
        (images[order[:TRAIN]], labels[order[:TRAIN]]),
        (images[order[TRAIN : TRAIN + VALIDATION]], labels[order[TRAIN : TRAIN + VALIDATION]]),
        (test_images[test_order], test_labels[test_order]),
    ]
    rendered = [
        Examples(render(grey, seed=1000 * seed + draw, shift=strength), classes)
        for draw, (grey, classes) in enumerate(sets)
    ]
    network, _ = pretrained.load_efficientnet_lite0()
    torch.manual_seed(seed)
    network.reset_classifier(len(fashion.CLASSES))  # type: ignore[operator]
    return Task(network.eval(), *rendered, to_input=pretrained.to_input)
