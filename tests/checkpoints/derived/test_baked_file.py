"""bake_file: a fresh load gives the baked network, and plain weights fit the original architecture."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import normswap
from normswap.checkpoints.reading import read_record
from normswap.errors import CheckpointError, NothingToDo, PlanError
from tests.baking.test_bake import VERTICES, Block, move
from tests.baking.test_compact_norm import relative
from tests.helpers import files

X = torch.randn(files.SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A converted network with moved gates, in the files sn.pt and plain.pt (gates as after the conversion)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    conversion = normswap.convert(files.small_model(), X)
    normswap.save(conversion.model, "plain.pt", plan=conversion.plan, architecture=files.ARCH)
    model = move(conversion.model, *VERTICES.values()).eval()
    normswap.save(model, "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    return model


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_a_baked_file_loads_as_the_baked_network(sn: nn.Module, fold: bool, output: str) -> None:
    result = normswap.bake_file("sn.pt", output, example_inputs=X, fold=fold)
    loaded = normswap.load(output)
    baked = normswap.bake(sn, X, fold=fold)
    assert torch.equal(loaded.model(X), baked.model(X))
    assert relative(loaded.model(X), sn(X)) < 1e-5
    assert [step.action for step in loaded.history] == ["saved", "baked"]
    assert result.plan.counts == baked.plan.counts
    record = read_record(Path(output))
    assert record is not None
    assert record.baked is not None
    assert record.baked.sites == result.plan.sites


def test_the_running_statistics_of_a_loaded_network_stay(sn: nn.Module) -> None:
    normswap.bake_file("plain.pt", example_inputs=X)
    model = normswap.load("plain.baked.pt").model.train()
    model(X)
    assert all(tensor == 0 for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_plain_weights_need_no_normswap(sn: nn.Module) -> None:
    result = normswap.bake_file("plain.pt", "out.safetensors", example_inputs=X)
    assert result.plan.is_plain
    code = (
        "import sys; sys.modules['normswap'] = None; import timm, safetensors.torch; "
        "m = timm.create_model('test_resnet', num_classes=7); "
        "m.load_state_dict(safetensors.torch.load_file('out.safetensors'), strict=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    original = files.small_model()
    original.load_state_dict(safetensors.torch.load_file("out.safetensors"))


def test_other_entries_are_left_out_and_pickled_modules_stay_modules(sn: nn.Module) -> None:
    torch.save({"state_dict": files.small_model().state_dict(), "epoch": 3}, "bn.pt")
    normswap.convert_file("bn.pt", "both.pt", architecture=files.ARCH, example_inputs=X)
    assert normswap.bake_file("both.pt", example_inputs=X).notes == (
        "epoch: left out, only the baked weights are written",
    )
    assert "weight" in next(iter(torch.load("both.baked.pt")))
    conversion = normswap.convert(files.scrambled(Block()).eval(), X)
    normswap.save(conversion.model, "module.pt", plan=conversion.plan, payload="module")
    normswap.bake_file("module.pt", example_inputs=X, fold=True, trust=True)
    assert relative(normswap.load("module.baked.pt", trust=True).model(X), conversion.model.eval()(X)) < 1e-5


def test_what_cannot_be_baked(sn: nn.Module) -> None:
    torch.save(files.small_model().state_dict(), "bn.pt")
    with pytest.raises(NothingToDo, match="nothing to bake, it is not converted"):
        normswap.bake_file("bn.pt")
    normswap.bake_file("sn.pt", "out.pt", example_inputs=X)
    with pytest.raises(NothingToDo, match="it was baked already"):
        normswap.bake_file("out.pt")
    with pytest.raises(CheckpointError, match="exists already"):
        normswap.bake_file("sn.pt", "out.pt")
    with pytest.raises(CheckpointError, match="it was baked, which cannot be undone"):
        normswap.revert_file("out.pt")
    with pytest.raises(NothingToDo, match="sites are converted already"):
        normswap.convert_file("out.pt", "again.pt")


def test_a_baked_model_is_saved_with_its_plan(sn: nn.Module) -> None:
    plan = normswap.load("sn.pt").plan
    baked = normswap.bake(sn, X)
    with pytest.raises(PlanError, match="the plan is that of another model"):
        normswap.save(baked.model, "out.pt", plan=plan)
    with pytest.raises(PlanError, match="baked after a conversion, whose plan is missing"):
        normswap.save(baked.model, "out.pt", baked=baked.plan)
    normswap.save(baked.model, "out.pt", plan=plan, baked=baked.plan, architecture=files.ARCH)
    assert torch.equal(normswap.load("out.pt").model(X), baked.model(X))
