"""Statistics of a whole sample, used for its tiles."""

import copy
import io
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normswap import (
    ArgumentError,
    LayerError,
    ModelError,
    SampleMoments,
    SwitchNorm2d,
    bake,
    calibrate,
    convert,
    fixed_sample_statistics,
    importance_weights,
    set_importance,
    switch_norm,
    use_backend,
)
from normswap.layers import functional
from tests.helpers import guarantees, zoo

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LIMIT = 1e-12
MIX = {"in": 0.5, "ln": 0.3, "bn": 0.2}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pointwise(rank: int = 2, norm: Callable[[int], nn.Module] | None = None) -> Any:
    """A network whose tiles see no other pixel than their own, so that only statistics can differ."""
    norm = norm or NORMS[rank]
    torch.manual_seed(0)
    model = nn.Sequential(CONVS[rank](3, 6, 1), norm(6), nn.ReLU(), CONVS[rank](6, 4, 1), norm(4))
    return zoo.randomise(model).double().eval()


def sample(rank: int = 2, samples: int = 1) -> Tensor:
    """A ramp with noise: each tile has other statistics."""
    torch.manual_seed(1)
    ramp = torch.linspace(-2, 2, 8, dtype=torch.float64)
    return torch.randn(samples, 3, *(8,) * rank, dtype=torch.float64) + ramp * torch.arange(1, samples + 1).reshape(
        -1, *(1,) * (rank + 1)
    )


def converted(model: nn.Module | None = None, x: Tensor | None = None, weights: Any = None, **options: Any) -> Any:
    model = convert(model or pointwise(), sample() if x is None else x, **options).model.eval()
    mixes = {}
    for name, (mean, _) in importance_weights(model).items():
        total = sum(MIX[branch] for branch in mean)
        mixes[name] = weights or {branch: MIX[branch] / total for branch in mean}
    set_importance(model, mixes)
    return model


def halves(x: Tensor) -> Tensor:
    """The two halves of each sample as tiles: all first halves, then all second halves."""
    return torch.cat(x.chunk(2, dim=-1))


def joined(y: Tensor) -> Tensor:
    return torch.cat(y.chunk(2), dim=-1)


def assert_no_seams(model: nn.Module, x: Tensor, limit: float = LIMIT) -> None:
    """The tiles are those of the whole sample inside the block, and differ outside."""
    with torch.no_grad():
        whole = model(x)
        with fixed_sample_statistics(model, x):
            tiled = joined(model(halves(x)))
        assert guarantees.distance(whole, tiled) <= limit
        assert guarantees.distance(whole, joined(model(halves(x)))) > 1e-3
        assert torch.equal(model(x), whole)


# --- tiles equal the whole sample -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"gate": "softmax"}, {"match": False}, {"start": "gn", "num_groups": 2}], ids=str
)
def test_tiles_have_no_seams(rank: int, options: dict[str, Any]) -> None:
    assert_no_seams(converted(pointwise(rank), sample(rank), **options), sample(rank))


@pytest.mark.parametrize("branches", [("in",), ("ln",), ("in", "ln"), ("in", "bn"), ("ln", "bn")], ids=str)
@pytest.mark.parametrize("match", [True, False])
def test_every_set_of_branches(branches: tuple[str, ...], match: bool) -> None:
    start = {} if "bn" in branches else {"start": "uniform"}
    settings = {"*": {"branches": branches, **start}}
    model = converted(settings=settings, match=match)
    assert {layer.branches for layer in model if hasattr(layer, "branches")} == {branches}
    assert_no_seams(model, sample())


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.4
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [
        ("reference", torch.float64, LIMIT),
        ("native", torch.float64, LIMIT),
        ("reference", torch.float32, 1e-6),
        ("native", torch.float32, 1e-6),
        ("triton", torch.float32, 1e-6),
        ("native", torch.bfloat16, 2e-2),
    ],
)
def test_backends_and_dtypes(backend: str, dtype: torch.dtype, limit: float) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    with use_backend(backend):
        assert_no_seams(converted().to(dtype), sample().to(dtype), limit)


def test_a_branch_bn_without_running_statistics_uses_the_overview() -> None:
    layer = SwitchNorm2d(3, track_running_stats=False, dtype=torch.float64)
    for mode in (layer.train(), layer.eval()):
        assert_no_seams(mode, sample())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = pointwise()
        self.register_buffer("mean", torch.randn(4).double())
        self.register_buffer("var", torch.rand(4).double() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.first(x), self.mean, self.var)


def test_functional_sites_norms_with_an_activation_and_graphs() -> None:
    functional_model = converted(Functional())
    assert len(importance_weights(functional_model)) == 3
    assert_no_seams(functional_model, sample())
    assert_no_seams(converted(pointwise(norm=BatchNormAct2d)), sample())
    assert_no_seams(converted(Functional(), as_graph=True), sample())


class UNet(nn.Module):
    """Two levels in 3-D: an output voxel sees at most 8 voxels to each side."""

    def __init__(self) -> None:
        super().__init__()
        self.down = self.block(1, 4)
        self.middle = self.block(4, 8)
        self.up = nn.ConvTranspose3d(8, 4, 2, 2)
        self.out = nn.Sequential(self.block(8, 4), nn.Conv3d(4, 2, 1))

    def block(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = self.up(self.middle(F.max_pool3d(high, 2)))
        return self.out(torch.cat([high, low], 1))


def tiles_with_margin(model: nn.Module, x: Tensor, tile: int, margin: int) -> Tensor:
    """Predict tiles together with a margin of their neighbours, which is cut off again."""
    y = torch.zeros(1, 2, *x.shape[2:], dtype=x.dtype)
    size = x.shape[-1]
    for start in torch.cartesian_prod(*[torch.arange(0, size, tile)] * 3).tolist():
        outer = [slice(max(s - margin, 0), min(s + tile + margin, size)) for s in start]
        inner = [slice(s - o.start, s - o.start + tile) for s, o in zip(start, outer, strict=True)]
        target = [slice(s, s + tile) for s in start]
        y[(..., *target)] = model(x[(..., *outer)])[(..., *inner)]
    return y


def test_tiles_of_a_3d_u_net_with_a_margin_equal_the_whole_volume() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 24, 24, 24, dtype=torch.float64)
    x += torch.linspace(-2, 2, 24, dtype=torch.float64)
    model = converted(zoo.randomise(UNet()).double().eval(), x[..., :8])
    with torch.no_grad():
        whole = model(x)
        with fixed_sample_statistics(model, x):
            tiled = tiles_with_margin(model, x, 8, 8)
        own = tiles_with_margin(model, x, 8, 8)
    assert guarantees.distance(whole, tiled) <= LIMIT
    assert guarantees.distance(whole, own) > 1e-2


# --- several samples, several calls -----------------------------------------------------------------------------------


def test_tiles_of_several_samples_are_assigned() -> None:
    model, x = converted(), sample(samples=3)
    with torch.no_grad():
        whole = model(x)
        with fixed_sample_statistics(model, x) as statistics:
            assert statistics.samples == 3
            assert statistics.layers == ("1", "4")
            with pytest.raises(LayerError, match=r"moments of 3 samples and no rows for a batch of 6"):
                model(halves(x))
            statistics.assign_tiles([0, 1, 2, 0, 1, 2])
            assert guarantees.distance(whole, joined(model(halves(x)))) <= LIMIT
            statistics.assign_tiles(torch.tensor([2, 1]))
            assert guarantees.distance(whole[[2, 1]], model(x[[2, 1]])) <= LIMIT
            with pytest.raises(LayerError, match=r"3 samples and 2 rows for a batch of 3: pass rows="):
                model(x)


@pytest.mark.parametrize("rows", [[], [3], [-1], [0.5]])
def test_a_sample_that_does_not_exist_is_refused(rows: list[Any]) -> None:
    with (
        fixed_sample_statistics(converted(), sample(samples=3)) as statistics,
        pytest.raises(ArgumentError, match=r"expected for each tile an integer from 0 to 2, got \["),
    ):
        statistics.assign_tiles(rows)


class Shared(nn.Module):
    """One layer that is called twice, or as often as `times` says."""

    times = 2
    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.body = pointwise()
        self.again = nn.Conv2d(4, 3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            y = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
            x = self.again(y)
        return x


def test_each_call_of_a_layer_has_its_own_moments() -> None:
    model = converted(Shared())
    assert_no_seams(model, sample())
    with fixed_sample_statistics(model, sample()):
        model.times = 3
        with pytest.raises(ModelError, match=r"layer 'body.1' ran 2 times on the overview, and runs more often"):
            model(halves(sample()))
        model.times = 1
        with pytest.raises(ModelError, match=r"layer 'body.1' ran 2 times on the overview, and 1 on a tile"):
            model(halves(sample()))
        model.times = 2
        model(halves(sample()))  # counts from the start after an error
        with pytest.raises(ModelError, match=r"runs 2 times per forward pass, and outside of one it is unknown"):
            model.body(halves(sample()))
        with pytest.raises(ModelError, match=r"pass tiles to model\.module"):
            model._replicate_for_data_parallel()(halves(sample()))
        model.recompute = True
        y = model(halves(sample()))
        with pytest.raises(ModelError, match=r"call the whole model, without activation checkpointing"):
            y.sum().backward()


def test_a_layer_that_runs_once_may_be_recomputed_and_called_alone() -> None:
    model, x = converted(Shared()), sample()
    model.times = 1
    plain, recomputed = [], []
    with fixed_sample_statistics(model, x):
        for recompute, gradients in ((False, plain), (True, recomputed)):
            model.recompute = recompute
            model.zero_grad()
            model(halves(x)).square().sum().backward()
            gradients += [p.grad.clone() for p in model.parameters()]
        alone = model.body(halves(x))
    assert guarantees.distance(joined(alone), model.body(x)) <= LIMIT
    assert all(torch.allclose(a, b, rtol=LIMIT) for a, b in zip(plain, recomputed, strict=True))


# --- training ---------------------------------------------------------------------------------------------------------


def oracle(layer: Any, x: Tensor, whole: Tensor) -> Tensor:
    """Normalize by constants of the whole sample and running statistics; differentiable in the parameters and x."""
    moments = {
        "in": (whole.mean((2, 3)), whole.var((2, 3), correction=0)),
        "ln": tuple(m.reshape(-1, 1) for m in (whole.mean((1, 2, 3)), whole.var((1, 2, 3), correction=0))),
        "bn": (layer.running_mean[None], layer.running_var[None]),
    }
    mean, var = (
        sum(w * moments[branch][i] for w, branch in zip(gate, layer.branches, strict=True))
        for i, gate in enumerate((layer.mean_weight.softmax(0), layer.var_weight.softmax(0)))
    )
    scale = layer.weight / (var + layer.normalising_eps).sqrt()
    return (x - mean[..., None, None]) * scale[..., None, None] + layer.bias.reshape(-1, 1, 1)


def test_gradients_of_tiles_have_the_statistics_as_constants() -> None:
    torch.manual_seed(0)
    layer: Any = zoo.randomise(SwitchNorm2d(3, dtype=torch.float64, bn_statistics="running"))
    layer.mean_weight.data.normal_()
    x, tile = sample(), sample()[..., :3].clone().requires_grad_()
    with fixed_sample_statistics(layer.train(), x):
        y = layer(tile)
    inputs = [tile, *layer.parameters()]
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, direction)
    expected = torch.autograd.grad(oracle(layer, tile, x), inputs, direction)
    for got, right in zip(found, expected, strict=True):
        assert guarantees.distance(right, got) <= LIMIT
        assert right.abs().max() > 1e-6


def test_batch_statistics_are_those_of_the_tiles_and_update_the_running_ones() -> None:
    for mode in ("batch", "renorm"):
        layer: Any = SwitchNorm2d(3, dtype=torch.float64, bn_statistics=mode).train()
        usual = copy.deepcopy(layer)
        x = sample()
        with fixed_sample_statistics(layer, x):
            assert layer.running_mean.eq(0).all()  # the overview updates nothing
            y = layer(halves(x))
        usual(halves(x))
        for name in ("running_mean", "running_var"):
            assert guarantees.distance(getattr(usual, name), getattr(layer, name)) <= LIMIT
        batch = halves(x) if mode == "batch" else None
        mean = layer.running_mean[None] if batch is None else batch.mean((0, 2, 3))[None]
        var = layer.running_var[None] if batch is None else batch.var((0, 2, 3), correction=0)[None]
        with torch.no_grad():
            layer.running_mean.copy_(mean[0]), layer.running_var.copy_(var[0])
        assert guarantees.distance(oracle(layer, halves(x), x), y) <= LIMIT


def test_synchronized_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "process_count", lambda _group: 2)
    layer = SwitchNorm2d(3, dtype=torch.float64, synchronize=True).train()
    with fixed_sample_statistics(layer, sample()), pytest.raises(LayerError, match=r"set synchronize=False, or let"):
        layer(sample())


# --- shapes with one position -----------------------------------------------------------------------------------------


def test_the_overview_decides_whether_in_has_a_variance() -> None:
    x, gate = sample(), torch.ones(2, dtype=torch.float64)
    options: Any = {"branches": ("in", "ln")}
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    pixel = switch_norm(x[..., :1, :1], gate, gate, sample_moments=SampleMoments(mean, var, 64), **options)
    assert guarantees.distance(switch_norm(x, gate, gate, **options)[..., :1, :1], pixel) <= LIMIT
    point = x[..., :1, :1]
    of_point = SampleMoments(point[..., 0, 0], torch.zeros(1, 3), 1)
    found = switch_norm(point.expand_as(x), gate, gate, sample_moments=of_point, **options)
    assert guarantees.distance(switch_norm(point, gate, gate, **options).expand_as(x), found) <= LIMIT


# --- wrappers, copies, files ------------------------------------------------------------------------------------------


def test_wrapped_and_compiled_models() -> None:
    assert_no_seams(nn.DataParallel(converted()), sample())
    compiled: Any = torch.compile(converted(), backend="eager")
    assert_no_seams(compiled, sample())


def test_copies_and_pickles_inside_the_block_have_no_fixed_statistics() -> None:
    model, x = converted(Shared()), sample()
    expected = model(x[..., :2])
    with fixed_sample_statistics(model, x):
        inside = model(x[..., :2])
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x[..., :2]), expected)
        assert torch.equal(model(x[..., :2]), inside)
    assert not torch.allclose(inside, expected)


# --- the model is restored; bad input ---------------------------------------------------------------------------------


def scrambled(model: nn.Module) -> nn.Module:
    for number, module in enumerate(model.modules()):
        module.training = bool(number % 2)
    return model


def snapshot(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        yield [len(value) for value in vars(module).values() if isinstance(value, dict)]
    yield [(key, value.clone()) for key, value in model.state_dict().items()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(fails: bool) -> None:
    model = scrambled(converted(bn_statistics="batch"))
    before = repr([*snapshot(model)])
    random = torch.get_rng_state()
    try:
        with fixed_sample_statistics(model, sample()):
            assert repr([*snapshot(model)]) != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert repr([*snapshot(model)]) == before
    assert torch.equal(random, torch.get_rng_state())


def test_a_failed_overview_restores_the_model() -> None:
    model = converted()
    before = repr([*snapshot(model)])
    with (
        pytest.raises(ModelError, match=r"overview: the model fails on an input of 1x5x8x8"),
        fixed_sample_statistics(model, torch.ones(1, 5, 8, 8).double()),
    ):
        pass
    with (
        pytest.raises(ModelError, match=r"layer '1' got NaN or infinite values"),
        fixed_sample_statistics(model, sample() / 0),
    ):
        pass
    assert repr([*snapshot(model)]) == before


def test_blocks_are_not_nested() -> None:
    model, x = converted(), sample()
    with fixed_sample_statistics(model, x):
        with pytest.raises(ModelError, match=r"fixed already: leave the first"), fixed_sample_statistics(model, x):
            pass
        assert guarantees.distance(model(x)[..., :4], model(x[..., :4])) <= LIMIT
    with fixed_sample_statistics(model, x):
        pass


def test_models_without_sn_layers_are_refused() -> None:
    baked = bake(converted(), sample()).model
    for model in (pointwise(), baked):
        with (
            pytest.raises(ModelError, match=r"has no SN layer .* convert it with normswap\.convert"),
            fixed_sample_statistics(model, sample()),
        ):
            pass
    with (
        pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module"),
        fixed_sample_statistics(None, sample()),
    ):  # type: ignore[arg-type]
        pass


class Branching(nn.Module):
    """Runs its second layer on small inputs only, and folds columns into the batch if asked."""

    def __init__(self, *, folds: bool = False, runs_first: bool = True) -> None:
        super().__init__()
        self.first, self.second = pointwise(), pointwise()
        self.folds, self.runs_first = folds, runs_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if self.runs_first else x
        if self.folds:
            x = x.reshape(2, 3, 8, 4)
        return self.second(x) if self.folds or x.shape[-1] < 8 else y


def test_other_paths_than_that_of_the_overview_are_refused() -> None:
    model = converted(Branching(), sample()[..., :4])
    with fixed_sample_statistics(model, sample()) as statistics:
        assert statistics.layers == ("first.1", "first.4")
        with pytest.raises(ModelError, match=r"layer 'second.1' ran 0 times on the overview, and runs more often on a"):
            model(sample()[..., :4])
    model.folds = True
    with (
        pytest.raises(ModelError, match=r"'first.1' got a batch of 1, but 'second.1' \(2\), 'second.4' \(2\) another"),
        fixed_sample_statistics(model, sample()),
    ):
        pass
    model.folds = model.runs_first = False
    with pytest.raises(ModelError, match=r"overview: no SN layer ran on it"), fixed_sample_statistics(model, sample()):
        pass


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (SampleMoments(torch.zeros(1, 2), torch.ones(1, 2), 4), r"one shape \(N, 3\), got \(1, 2\) and \(1, 2\)"),
        (SampleMoments(torch.zeros(3), torch.ones(3), 4), r"one shape \(N, 3\), got \(3,\) and \(3,\)"),
        (SampleMoments(torch.zeros(2, 3), torch.ones(1, 3), 4), r"got \(2, 3\) and \(1, 3\)"),
    ],
)
def test_moments_of_another_shape_are_refused(moments: SampleMoments, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        switch_norm(sample(), torch.ones(3).double(), torch.ones(3).double(), sample_moments=moments)


# --- seams of a U-Net -------------------------------------------------------------------------------------------------


def jumps(y: Tensor, tile: int) -> Tensor:
    """The differences between neighbouring voxels of two tiles, as one vector."""
    pairs = [(dim, face) for dim in (2, 3, 4) for face in range(tile, y.shape[dim], tile)]
    return torch.cat([(y.narrow(dim, face, 1) - y.narrow(dim, face - 1, 1)).flatten() for dim, face in pairs])


def by_monai(model: nn.Module, x: Tensor, tile: int) -> Tensor:
    from monai.inferers import sliding_window_inference  # imports a module that Windows lacks

    return sliding_window_inference(x, (tile, tile, tile), 4, model, overlap=0)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("predict", [by_monai, partial(tiles_with_margin, margin=0)], ids=["monai", "own loop"])
def test_seam_energy_beyond_that_of_bn_falls_tenfold(predict: Callable[..., Tensor]) -> None:
    """The padding of tiles leaves seams with BN too; what own statistics add to them disappears."""
    torch.manual_seed(0)
    volume = runpy.run_path(str(RECIPES / "volume.py"))["make_volume"](0, 32, "target")[0][None]
    volume += torch.linspace(-6, 6, 32)
    from monai.networks.nets import UNet as MonaiUNet

    bn = MonaiUNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1, norm="batch")
    calibrate(bn, [volume], layer_by_layer=True)
    sn = converted(bn.eval(), volume)

    def seam_energy(model: nn.Module) -> float:
        tiled, whole = predict(model, volume, 16), model(volume)
        return float(jumps(tiled - whole, 16).square().mean() / whole.var())

    with torch.no_grad():
        of_bn, own = seam_energy(bn), seam_energy(sn)
        whole = sn(volume)
        with fixed_sample_statistics(sn, volume):
            tiled = predict(sn, volume, 16)
        fixed = float(jumps(tiled - whole, 16).square().mean() / whole.var())
    assert own - of_bn > 0.01
    assert abs(fixed - of_bn) < 0.1 * (own - of_bn)
