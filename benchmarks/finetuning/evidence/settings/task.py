"""What a setting gives to a run: a trained BN network, and images or series of the target in three disjoint sets."""

import hashlib
import io
import os
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetuning.fashion import cache_folder

# Tokens that do not change what a program does.
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_EVALUATION_BATCH = 50


class Examples(NamedTuple):
    """Inputs (N, ...), and targets: labels (N,), or masks (N, H, W)."""

    inputs: Tensor
    targets: Tensor


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * float((predictions == targets).double().mean())


def mean_iou(predictions: Tensor, targets: Tensor) -> float:
    """Return the intersection over union in percent, mean of the classes that occur."""
    ratios = []
    for label in targets.unique():
        predicted, true = predictions == label, targets == label
        ratios.append(float((predicted & true).sum()) / float((predicted | true).sum()))
    return 100 * sum(ratios) / len(ratios)


@dataclass(frozen=True)
class Task:
    """One setting with one seed.

    Args:
        network: the BN network to fine-tune, in evaluation mode, with the head for the target.
        train, validation, test: disjoint sets of the target.
        to_input: stored inputs -> inputs of the network.
        score: (predicted classes, targets) -> a score in percent.
    """

    network: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    to_input: Callable[[Tensor], Tensor] = Tensor.float
    score: Callable[[Tensor, Tensor], float] = accuracy

    def example(self, count: int = 2) -> Tensor:
        """Return the first inputs of the training set as the network expects them."""
        return self.to_input(self.train.inputs[:count])

    def evaluate(self, model: nn.Module, examples: Examples) -> float:
        """Return the score in evaluation mode. The mode of every module is restored."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
            chunks = examples.inputs.split(_EVALUATION_BATCH)
            predictions = torch.cat([model(self.to_input(chunk)).argmax(1) for chunk in chunks])
        for module, mode in modes.items():
            module.training = mode
        return self.score(predictions, examples.targets)


def code_digest(*modules: ModuleType) -> str:
    """Return a digest of the code of modules. Comments, docstrings and white space do not change it."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(_code(Path(str(module.__file__)).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _code(source: str) -> str:
    kept, starts_statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _NO_CODE:
            starts_statement = starts_statement or token.type not in (tokenize.COMMENT, tokenize.NL)
            continue
        if not (starts_statement and token.type == tokenize.STRING):
            kept.append(token.string)
        starts_statement = False
    return "".join("".join(kept).split())


def trained_once(model: nn.Module, name: str, train: Callable[[nn.Module], None]) -> nn.Module:
    """Return `model` in evaluation mode with trained weights, from the cache folder or by `train(model)`.

    Two processes may train the same network: they write the same weights, each all at once.
    """
    path = cache_folder() / "evidence" / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), draft)
    os.replace(draft, path)
    return model.eval()


def fit(model: nn.Module, examples: Examples, *, epochs: int, rate: float, seed: int, batch_size: int = 32) -> None:
    """Train `model` in place by AdamW with a one-cycle schedule, for the source networks."""
    generator = torch.Generator().manual_seed(seed)
    count = len(examples.targets) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * count)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(examples.targets), generator=generator)[: count * batch_size]
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(examples.inputs[batch]), examples.targets[batch]).backward()
            optimizer.step()
            schedule.step()
