"""A real Trainer of transformers: resumed with gates far on their way, and after its folder was converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.cli import main
from tests.helpers import zoo

IMAGES = zoo.image(8, 3, 32, 32)().double()
pytestmark = pytest.mark.slow


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"pixel_values": IMAGES[number], "labels": number % 2}


class Trainer(transformers.Trainer):
    """As the how-to says it: the groups of the Trainer, with the gates behind them."""

    importance_lr: float | None = None

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args)
        groups = normswap.param_groups(self.model, like=made, importance_lr=self.importance_lr)
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config).double()


def trained(
    kind: type[transformers.Trainer], model: nn.Module, folder: Path, resumed: Path | None = None
) -> dict[str, Tensor]:
    """Three steps, each of them saved; in common clipping gates would change what all others get."""
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        weight_decay=0.01,
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = kind(model, arguments, train_dataset=Images())
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    assert trainer.state.global_step == 3
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a step has just moved gates far off the simplex, and the file has no note of their kind."""
    monkeypatch.setattr(Trainer, "importance_lr", 0.3)
    whole = trained(Trainer, normswap.convert(network(), IMAGES).model, tmp_path)
    moved = [value for name, value in whole.items() if name.endswith("mean_weight") and value[-1] < 0.9]
    assert moved
    part = trained(Trainer, normswap.convert(network(), IMAGES).model, tmp_path, tmp_path / "checkpoint-2")
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_run_with_bn_goes_on_from_its_converted_folder(tmp_path: Path) -> None:
    """The next step is the one that BN would have taken, momentum, decay and schedule included."""
    expected = trained(transformers.Trainer, network(), tmp_path / "bn")
    folder = tmp_path / "bn" / "checkpoint-2"
    result = CliRunner().invoke(main, ["convert", str(folder), "--input", "2x3x32x32", "--bn-statistics", "batch"])
    assert result.exit_code == 0, result.output
    folder = folder.with_name("checkpoint-2.normswap")
    found = trained(Trainer, normswap.load(folder).model, tmp_path / "sn", folder)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert any(value[-1] < 1 for name, value in found.items() if name.endswith("mean_weight"))
