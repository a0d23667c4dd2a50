"""--arch none: tensors converted by their names alone, settled by the model that they are loaded into."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.content.state_dict import plan_from_names
from normswap.cli import main
from normswap.errors import PlanError
from tests.helpers import files


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.net."])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_the_user_brings_the_model(tmp_path: Path, prefix: str, name: str) -> None:
    model = files.small_model()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    target = tmp_path / f"out-{name}"
    result = run("convert", str(tmp_path / "model.pt"), "--arch", "none", "--no-verify", "-o", str(target))
    assert result.exit_code == 0, result.output
    assert "architecture=your_model" in result.output
    loaded = normswap.load(target, architecture=files.small_model)
    assert {swap.fqn for swap in loaded.plan.swaps} == {s.fqn for s in normswap.plan_swaps(model).swaps}
    assert {swap.class_name for swap in loaded.plan.swaps} == {"torch.nn.modules.batchnorm.BatchNorm2d"}
    x = torch.randn(files.SHAPE)
    assert normswap.verify(model, loaded.model, [x]).passed


def test_frozen_norms_stay_frozen(tmp_path: Path) -> None:
    import torchvision

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = torchvision.ops.FrozenBatchNorm2d(8)
            self.norm.running_mean.normal_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x))

    model = Net()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert run("convert", str(tmp_path / "model.pt"), "--arch", "none", "--no-verify").exit_code == 0
    (swap,) = normswap.load(tmp_path / "model.normswap.pt", architecture=model).plan.swaps
    assert (swap.kind, swap.bn_statistics) == ("frozen bn", "running")


def test_patterns_choose(tmp_path: Path) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "model.pt")
    arguments = ("convert", str(tmp_path / "model.pt"), "--arch", "none", "--no-verify", "--force")
    assert run(*arguments, "--include", "layer1.*").exit_code == 0
    loaded = normswap.load(tmp_path / "model.normswap.pt", architecture=files.small_model)
    assert {swap.fqn.partition(".")[0] for swap in loaded.plan.swaps} == {"layer1"}
    assert "matches none of the 15 norm sites" in run(*arguments, "--include", "nowhere").stderr
    assert run(*arguments, "--exclude", "*").exit_code == 1


def test_what_is_no_group_is_no_site() -> None:
    c = torch.ones(4)
    state = {
        "a.running_mean": c, "a.running_var": c,
        "b.running_mean": c,
        "c.running_mean": c, "c.running_var": torch.ones(5),
        "d.running_mean": torch.ones(1, 4), "d.running_var": torch.ones(1, 4),
        "e.running_mean": torch.ones(1), "e.running_var": torch.ones(1),
        "f.running_mean": c, "f.running_var": c, "f.mean_weight": torch.ones(3),
    }  # fmt: skip
    assert {swap.fqn: swap.branches for swap in plan_from_names(state).swaps} == {
        "a": ("in", "ln", "bn"),
        "e": ("in", "bn"),
    }


def test_a_model_that_does_not_have_the_sites(tmp_path: Path) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "model.pt")
    assert run("convert", str(tmp_path / "model.pt"), "--arch", "none", "--no-verify").exit_code == 0
    with pytest.raises(PlanError, match="matches none of the"):
        normswap.load(tmp_path / "model.normswap.pt", architecture=files.TiedNet)


@pytest.mark.parametrize(
    "option",
    [("--input", "2x3x8x8"), ("--kinds", "bn,in"), ("--gate", "softmax"), ("--plan", "plan.json"), ("--synchronize",)],
)
def test_what_needs_a_model_is_refused(
    tmp_path: Path, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = files.small_model()
    torch.save(model.state_dict(), "model.pt")
    Path("plan.json").write_text(normswap.plan_swaps(model).to_json())
    result = run("convert", "model.pt", "--arch", "none", *option)
    message = f"error: --arch none converts tensors by their names only: leave {option[0]} out\n"
    assert (result.exit_code, result.stderr) == (2, message)
