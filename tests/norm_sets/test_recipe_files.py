"""The Python files of the recipes `federated` and `adaptation`: what their loops change, and what they leave."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import normswap

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
pytestmark = pytest.mark.slow


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, output_stride=8)
    return normswap.convert(model, torch.randn(2, 3, 32, 32), **options).model.train()


def own_run(folder: Path, epochs: int, **options: Any) -> Any:
    """What an own loop gets, with large batches."""
    return SimpleNamespace(
        recipe=SimpleNamespace(
            train=SimpleNamespace(seed=0, clip=1.0, epochs=epochs),
            data=SimpleNamespace(train_split="train", batch_size=50),
            output=folder,
        ),
        options=options,
        device="cpu",
        log=(records := []).append,
        records=records,
        build_optimizer=lambda model: torch.optim.SGD(normswap.param_groups(model, lr=0.05)),
        evaluation=[],
    )


@pytest.fixture(scope="module")
def federated() -> Any:
    return SimpleNamespace(**runpy.run_path(str(RECIPES / "federated.py")))


def test_each_client_has_its_own_images_and_classes_in_its_own_proportions(federated: Any) -> None:
    sets = {split: federated.open_data(split) for split in ("train", "validation", "test")}
    assert [len(data) for data in sets.values()] == [400, 147, 250]
    assert all(
        torch.equal(a, b) for a, b in zip(sets["test"].tensors, federated.open_data("test").tensors, strict=True)
    )
    pixels, labels, clients = sets["train"].tensors
    assert clients.unique().tolist() == [0, 1, 2, 3]
    # The second client's strokes are darker than the background, so its images are light.
    means = [float(pixels[clients == client].mean()) for client in range(4)]
    assert means[1] > max(means[0], means[2], means[3])
    tables = [
        torch.zeros(10, 4).index_put_((data.tensors[1], data.tensors[2]), torch.tensor(1.0), accumulate=True)
        for data in (sets["train"], sets["test"])
    ]
    shares = [table / table.sum(1, keepdim=True) for table in tables]
    assert float(shares[0].max(1).values.mean()) > 0.5  # of four: 0.25 if the classes were spread evenly
    assert float((shares[0] - shares[1]).abs().mean()) < 0.1
    assert len(labels) == len(pixels)


def test_local_norms_differ_and_all_other_weights_are_one_average(federated: Any, tmp_path: Path) -> None:
    model, run = network(), own_run(tmp_path, 2)
    before = normswap.split_state(model)
    federated.train_model(model, run)
    norm_sets = torch.load(tmp_path / "norm_sets.pt", weights_only=True)
    assert [record["step"] for record in run.records] == [1, 2]
    after = normswap.split_state(model)
    assert any(not torch.equal(before.shared[key], value) for key, value in after.shared.items())
    assert all(torch.equal(norm_sets[0][key], value) for key, value in after.local.items())
    assert not torch.equal(norm_sets[0]["conv1.1.weight"], norm_sets[1]["conv1.1.weight"])
    # Each client is evaluated with its own norms, and the network is left with those of the first.
    batch = federated.open_data("validation")[:]
    metrics = federated.build_metrics()
    with torch.no_grad():
        federated.update_metrics(metrics, model.eval(), batch)
        right = []
        for client, state in enumerate(norm_sets):
            normswap.load_norm_state(model, state)
            own = batch[2] == client
            right.append(float((model(batch[0][own]).argmax(1) == batch[1][own]).float().mean()))
    assert [float(metrics[f"client {client}"].compute()) for client in range(4)] == pytest.approx(right)
    assert float(metrics["mean accuracy of clients"].compute()) == pytest.approx(sum(right) / 4)


def test_pooled_norms_are_one_set_with_the_statistics_of_all_images(federated: Any, tmp_path: Path) -> None:
    model = network(bn_statistics="batch")
    federated.train_model(model, own_run(tmp_path, 1, norms="pooled"))
    first, *others = torch.load(tmp_path / "norm_sets.pt", weights_only=True)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    images = federated.open_data("train").tensors[0]
    inputs = model.conv1[0](images).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(first["conv1.1.running_var"], inputs.var(1), rtol=1e-4, atol=1e-6)


def test_adaptation_changes_the_norms_alone_and_leaves_out_uncertain_images(tmp_path: Path) -> None:
    adaptation = SimpleNamespace(**runpy.run_path(str(RECIPES / "adaptation.py")))
    images, labels = adaptation.open_data("validation")[:12]
    for margin, norms_change in ((2.0, True), (0.0, False)):
        model, run = network(start="ln"), own_run(tmp_path, 2, max_entropy=margin)
        run.evaluation = [(images[i : i + 1], labels[i : i + 1]) for i in range(12)]
        run.recipe.train.seed = 3
        before = normswap.split_state(model)
        adaptation.train_model(model, run)
        after = normswap.split_state(model)
        assert all(torch.equal(before.shared[key], value) for key, value in after.shared.items())
        assert any(not torch.equal(before.local[key], value) for key, value in after.local.items()) == norms_change
        assert [record["step"] for record in run.records] == [1, 2]
    with torch.no_grad():  # nothing was adapted, so the predictions of a pass are those of the network
        right = float((model(images).argmax(1) == labels).float().mean())
    assert run.records[-1]["accuracy of the pass"] == pytest.approx(right)
