"""Loading tensors into a model: heads may differ, norms and all other tensors may not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.checkpoints.content.weight_loading import LoadReport, load_weights
from normswap.cli import main
from normswap.errors import ArchitectureError
from normswap.layers.matching import MATCHING_BUFFERS
from tests.helpers import files

State = dict[str, Tensor]


class Net(nn.Module):
    """A body with a norm, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.stem(x)).mean((2, 3)))


def state() -> State:
    torch.manual_seed(5)
    return dict(Net().state_dict())


def without(*prefixes: str) -> State:
    return {key: value for key, value in state().items() if not key.startswith(prefixes)}


HEAD = ("classifier.0.weight", "classifier.0.bias", "classifier.2.weight", "classifier.2.bias")
TOLERATED: dict[str, tuple[State, LoadReport]] = {
    "nothing": (state(), LoadReport()),
    "heads beyond": (
        state() | {"head_aux.weight": torch.ones(3), "fc2.0.bias": torch.ones(3)},
        LoadReport(unexpected=("head_aux.weight", "fc2.0.bias")),
    ),
    "what tools leave": (state() | {"norm.total_ops": torch.ones(1)}, LoadReport(unexpected=("norm.total_ops",))),
    "no head": (without("classifier"), LoadReport(heads=HEAD)),
    "no counter": (without("norm.num"), LoadReport(counters=("norm.num_batches_tracked",))),
    "another head": (
        without("classifier") | {"head.weight": torch.ones(9, 4)},
        LoadReport(unexpected=("head.weight",), heads=HEAD),
    ),
}


@pytest.mark.parametrize(("given", "fit"), TOLERATED.values(), ids=TOLERATED)
def test_heads_and_counters_may_differ(given: State, fit: LoadReport) -> None:
    model = Net()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_weights(model, given, "Net") == fit
    for key, value in model.state_dict().items():
        assert torch.equal(value, given.get(key, own[key]))


REFUSED: dict[str, tuple[State, str]] = {
    "a norm's weight": (without("norm.weight"), "1 missing: norm.weight"),
    "a norm's statistics": (without("norm.running_mean"), "1 missing: norm.running_mean"),
    "a part of the head": (without("classifier.2"), "2 missing: classifier.2.weight, classifier.2.bias"),
    "a part of the body": (without("stem"), "2 missing: stem.weight, stem.bias"),
    "one that could take part": (state() | {"neck.weight": torch.ones(3)}, "1 unexpected: neck.weight"),
    "one inside the head": (state() | {"classifier.4.weight": torch.ones(3)}, "1 unexpected: classifier.4.weight"),
    "a norm beyond": (
        state() | {f"aux.1.running_{name}": torch.ones(3) for name in ("mean", "var")},
        "2 unexpected: aux.1.running_mean, aux.1.running_var; the file has norms that the model lacks (aux.1): pass "
        "the architecture with these norms",
    ),
    "mostly other heads": (
        state() | {f"head{number}.weight": torch.ones(3) for number in range(11)},
        "11 unexpected: head0.weight, ",
    ),
    "almost nothing": ({"stem.weight": torch.ones(4, 3, 1, 1)}, "10 missing: stem.bias, norm.weight, norm.bias, +7"),
    "another shape too": (
        without("classifier") | {"stem.bias": torch.ones(5)},
        "1 with another shape: stem.bias (is 5, expected 4)",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_norm_could_depend_on_must_be_there_and_nothing_more(given: State, message: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        load_weights(Net(), given, "Net")
    assert str(caught.value).startswith("the tensors do not fit Net: ")
    assert message in str(caught.value)


def test_tolerated_differences_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="normswap"):
        load_weights(Net(), state(), "net")
        assert caplog.messages == []
        load_weights(Net(), without("classifier"), "net")
    (message,) = caplog.messages
    assert message.startswith("loaded the tensors into net with tolerated differences: LoadReport(")
    assert "classifier.0.weight" in message


@pytest.fixture
def build(tmp_path: Path) -> Callable[[State], tuple[Path, str]]:
    """A function that converts a state dict of the small network and returns the output's path and the printed text."""

    def convert(given: State) -> tuple[Path, str]:
        torch.save(given, tmp_path / "model.pt")
        result = CliRunner().invoke(main, ["convert", str(tmp_path / "model.pt"), "--arch", files.ARCH])
        assert result.exit_code == 0, result.output
        return tmp_path / "model.normswap.pt", " ".join(result.output.split())

    return convert


def test_a_head_beyond_is_carried_untouched(build: Callable[[State], tuple[Path, str]]) -> None:
    given = files.small_model().state_dict() | {"module_head.weight": torch.full((3, 2), torch.nan)}
    path, output = build(given)
    assert f"note module_head.weight: not part of {files.ARCH}, copied unchanged" in output
    written = torch.load(path)
    assert written.keys() - given.keys() == {
        key for key in written if key.endswith(("mean_weight", "var_weight", *MATCHING_BUFFERS))
    }
    assert all(torch.equal(written[key].nan_to_num(), value.nan_to_num()) for key, value in given.items())
    assert "module_head" not in dict(normswap.load(path).model.named_children())


def test_a_head_that_is_missing_is_not_written(build: Callable[[State], tuple[Path, str]]) -> None:
    given = {key: value for key, value in files.small_model().state_dict().items() if not key.startswith("fc.")}
    path, output = build(given)
    assert "note fc.weight, fc.bias: missing from the file; verified with randomly initialized values" in output
    assert not {"fc.weight", "fc.bias"} & torch.load(path).keys()
    with pytest.warns(UserWarning, match=r"contains no fc\.weight, fc\.bias: this part of the model keeps its random"):
        assert normswap.load(path).model.fc.weight.shape == (7, 96)


def test_counters_that_are_missing_are_not_written(build: Callable[[State], tuple[Path, str]]) -> None:
    given = {key: value for key, value in files.small_model().state_dict().items() if "num_batches" not in key}
    path, output = build(given)
    assert "+12 more: missing from the file; counts from 0, not written" in output
    assert not any("num_batches" in key for key in torch.load(path))
    counts = [value for key, value in normswap.load(path).model.state_dict().items() if "num_batches" in key]
    assert counts == [0] * files.SITES
