"""Scikit-learn's scanned digits: a small ResNet, moved to shifted digits, or to classes that it has not seen."""

from types import ModuleType

import torch
from torch import nn

import normswap.finetune.data.digits as data
from benchmarks.finetuning import training
from benchmarks.finetuning.evidence.settings.task import Examples, Task, code_digest, trained_once
from normswap.finetune.data.digits import Digits, Images, load_ink, prepare_digits, render_target, split_indices

SOURCES: tuple[ModuleType, ...] = (data, training)


def shifted(seed: int) -> Task:
    """From clean digits to digits with other colours, texture, contrast and noise.

    The scans that validate and test the source network are rendered as target images too, for larger sets.
    """
    digits = prepare_digits(seed=seed)
    ink, labels = load_ink()
    index = split_indices(len(labels), seed=seed)
    extra = {
        part: Images(render_target(ink[index["source", part]], seed=1000 * seed + draw), labels[index["source", part]])
        for draw, part in enumerate(("validation", "test"), 500)
    }
    return Task(
        network=_source_network("shifted", digits, seed),
        train=Examples(*digits.target.train),
        validation=_joined(digits.target.validation, extra["validation"]),
        test=_joined(digits.target.test, extra["test"]),
    )


def unseen_classes(seed: int) -> Task:
    """From clean digits 0 to 4 to clean digits 5 to 9, with a new head."""
    digits = training.prepare_transfer(seed=seed)
    network = _source_network("unseen", digits, seed)
    torch.manual_seed(seed)
    network.reset_classifier(5)  # type: ignore[operator]
    target = digits.target
    return Task(network, Examples(*target.train), Examples(*target.validation), Examples(*target.test))


def _joined(first: Images, second: Images) -> Examples:
    return Examples(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def _source_network(name: str, digits: Digits, seed: int) -> nn.Module:
    def train(model: nn.Module) -> None:
        model.load_state_dict(training.train_source(digits, seed=seed).state_dict())

    key = f"digits-{name}-{seed}-{code_digest(*SOURCES)}"
    return trained_once(training.build_network(seed=seed), key, train).eval()
