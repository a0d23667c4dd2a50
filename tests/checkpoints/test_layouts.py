"""Checkpoints in the layout of each library: read, converted, written in the same layout, read back."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.checkpoints.reading import read_checkpoint
from normswap.cli import main
from normswap.layers.matching import MATCHING_BUFFERS
from tests.helpers import checkpoint_makers, files
from tests.helpers.checkpoint_makers import LAYOUTS, Layout, Trained

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "checkpoints.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    return checkpoint_makers.trained()


def ok(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Everything in a content by its place."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {name: leaf for key, inner in items for name, leaf in flat(inner, f"{place}/{key}").items()}
    return {place: value}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_everything_is_carried(layout: Layout, trained: Trained, tmp_path: Path) -> None:
    source = layout.make(trained, tmp_path)
    trust = ["--trust"] if layout.trust else []
    arch = [] if layout.trust or layout.tells else ["--arch", files.ARCH]
    output = ok("convert", str(source), *arch, *trust, "--input", "2x3x64x64")
    target = next(entry for entry in tmp_path.iterdir() if ".normswap" in entry.name)
    assert str(target) in output.replace("\n", "")

    before = read_checkpoint(source, trust=layout.trust)
    after = read_checkpoint(target, trust=layout.trust)
    assert (before.contents.kind, before.file_format) == (layout.kind, layout.container)
    assert (after.contents.kind, after.file_format) == (layout.kind, layout.written or layout.container)

    # All that was there is there, bit for bit, and what came are gates, their group, and constants of matched branches.
    old, new = flat(before.content), flat(after.content)
    changed = [place for place in old if not same(old[place], new.get(place))]
    assert all("scheduler" in place for place in changed), changed
    added = new.keys() - old.keys()
    copies = 1 + (layout.ema is not None)
    gates = {place for place in added if place.endswith(("mean_weight", "var_weight"))}
    assert len(gates) == 2 * files.SITES * copies
    constants = {place for place in added if place.endswith(tuple(MATCHING_BUFFERS))}
    assert len(constants) == 3 * files.SITES * copies
    assert all("param_groups" in place or "scheduler" in place for place in added - gates - constants)
    assert any("param_groups" in place for place in added) == (layout.optimizer is not None)

    _loads(layout, trained, target)


def _loads(layout: Layout, trained: Trained, target: Path) -> None:
    """The model in the converted file, and its moving average, compute what the original ones do."""
    x = torch.randn(files.SHAPE)
    originals = {None: trained.model} | ({layout.ema: trained.average.module} if layout.ema else {})
    for entry, original in originals.items():
        loaded = normswap.load(target, entry=entry, trust=layout.trust)
        assert set(normswap.importance_weights(loaded.model)) == {swap.fqn for swap in loaded.plan.swaps}
        for key, value in original.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], value)
        with torch.no_grad():
            expected = original.eval()(x)
            original.train()
        torch.testing.assert_close(loaded.model.eval()(x).detach(), expected, rtol=1e-4, atol=1e-4)
        assert set(layout.rest) <= loaded.rest.keys()


def test_a_folder_of_transformers_reports_its_model(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        num_labels=5, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    model = files.scrambled(transformers.ResNetForImageClassification(config)).eval()
    model.save_pretrained(tmp_path / "resnet")
    output = ok("convert", str(tmp_path / "resnet"), "--input", "2x3x32x32")
    assert f"hf:{tmp_path / 'resnet'}" in "".join(output.split("\n", 9)[:9]).replace(" ", "")
    shutil.rmtree(tmp_path / "resnet")  # the converted folder stands alone
    loaded = normswap.load(tmp_path / "resnet.normswap").model
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    assert "hf:." in ok("inspect", str(tmp_path / "resnet.normswap"))


def test_the_table_in_the_docs_names_every_layout() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert set(LAYOUTS) <= set(rows)
