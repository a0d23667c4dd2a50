"""Every backend refuses tensors of a wrong size, dtype or device before it accesses memory."""

import importlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normswap
from normswap import SwitchNorm2d
from normswap.errors import ArgumentError, LayerError
from normswap.layers import sync
from normswap.layers.backends import cpu
from normswap.layers.backends.interface import Inputs
from normswap.layers.backends.selection import BACKENDS, fused_backend
from normswap.layers.functional import switch_norm
from normswap.layers.gating import BRANCHES, Mixing
from normswap.layers.matching import MATCHING_BUFFERS

SHAPE = (2, 64, 3, 3)
PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")
GATES = ("mean_weight", "var_weight")
NEEDS_C = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")


def arguments() -> dict[str, Any]:
    point = torch.tensor([0.2, 0.3, 0.5])
    tensors = {"running_mean": torch.zeros(64), "running_var": torch.ones(64)}
    return {
        "mean_weight": point,
        "var_weight": point.clone(),
        **tensors,
        "weight": torch.ones(64),
        "bias": torch.zeros(64),
    }


MISFITS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one element": (lambda t: t[:1], r"{} should contain 64 elements not 1"),
    "one too few": (lambda t: t[:63], r"{} should contain 64 elements not 63"),
    "one too many": (lambda t: torch.ones(65), r"{} should contain 64 elements not 65"),
    "no element": (lambda t: t[:0], r"{} should contain 64 elements not 0"),
    "another shape": (lambda t: t.view(1, 64), r"{} should have the shape \(64,\) not \(1, 64\)"),
    "integers": (lambda t: t.long(), r"{} should be a floating tensor not torch.int64"),
    "booleans": (lambda t: t.bool(), r"{} should be a floating tensor not torch.bool"),
    "complex": (lambda t: t.cfloat(), r"{} should be a floating tensor not torch.complex64"),
    "another device": (lambda t: t.to("meta"), r"{} should be on cpu, where the input is, not on meta"),
}


def backends() -> list[str]:
    return [name for name in BACKENDS if name != "triton"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("misfit", "message"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(
    name: str, misfit: Callable[[Tensor], Tensor], message: str, backend: str
) -> None:
    for training, statistics in itertools.product((True, False), ("batch", "running", "renorm")):
        given = arguments()
        given[name] = misfit(given[name])
        before = {key: tensor.clone() for key, tensor in given.items()}
        with normswap.use_backend(backend), pytest.raises(LayerError, match=message.format(name)):
            switch_norm(torch.randn(SHAPE), **given, training=training, gate="simplex", bn_statistics=statistics)
        assert all(given[key].equal(tensor) for key, tensor in before.items() if not tensor.is_meta)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_running_statistic_without_the_other_is_refused_as_by_batch_norm(name: str) -> None:
    """Regression: one of them was ignored silently, and evaluation used the moments of the batch."""
    for training in (True, False):
        with pytest.raises(LayerError, match="must either both be None or neither be None"):
            switch_norm(torch.randn(SHAPE), **{**arguments(), name: None}, training=training, gate="simplex")


def test_no_memory_behind_a_short_tensor_is_written() -> None:
    """Regression: with 64 channels and one variance, 63 numbers after it were overwritten."""
    for dtype, name in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), ("running_mean", "running_var")
    ):
        memory = torch.full((128,), 7.0, dtype=dtype)
        given = {**arguments(), name: memory[:1]}
        with pytest.raises(LayerError, match=f"{name} should contain 64 elements not 1"):
            switch_norm(torch.randn(SHAPE), **given, training=True, gate="simplex")
        assert (memory == 7).all()


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_does_not_fit_is_refused(name: str) -> None:
    point = torch.tensor([0.2, 0.3, 0.5])
    for bad, message in (
        (point[:2], r"expected gate parameters of shape \(3,\), got \(2,\)"),
        (torch.ones(4), r"expected gate parameters of shape \(3,\), got \(4,\)"),
        (torch.ones(3).long(), f"{name} should be a floating tensor not torch.int64"),
        (point.to("meta"), f"{name} should be on cpu, where the input is, not on meta"),
    ):
        with pytest.raises(LayerError, match=message):
            switch_norm(torch.randn(SHAPE), **{**arguments(), name: bad}, gate="simplex")


def test_an_input_with_other_channels_is_refused_as_by_batch_norm() -> None:
    x = torch.randn(2, 32, 3, 3)
    given = arguments()
    with pytest.raises(RuntimeError, match="running_mean should contain 32 elements not 64"):
        F.batch_norm(x, given["running_mean"], given["running_var"])
    expected = (
        "expected 64 channels in dimension 1, got an input of shape (2, 32, 3, 3): running_mean should contain 32"
    )
    with pytest.raises(LayerError, match=re.escape(expected)):
        switch_norm(x, **given)


def test_a_layer_whose_buffer_was_replaced_by_a_shorter_one_is_refused() -> None:
    layer = SwitchNorm2d(64)
    layer.running_var = torch.ones(1)
    for training in (True, False):
        with pytest.raises(LayerError, match="running_var should contain 64 elements not 1"):
            layer.train(training)(torch.randn(SHAPE))


def test_a_compiled_layer_refuses_what_an_eager_one_refuses() -> None:
    torch.compiler.reset()
    given = {**arguments(), "running_var": torch.ones(1)}
    function = torch.compile(lambda x: switch_norm(x, **given, training=True, gate="simplex"), backend="eager")
    with pytest.raises(LayerError, match="running_var should contain 64 elements not 1"):
        function(torch.randn(SHAPE))


def test_a_synchronized_layer_checks_before_it_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.layers.functional.process_count", lambda group: 2)
    monkeypatch.setattr(sync, "_gather", lambda *_: pytest.fail("an exchange took place"))
    with pytest.raises(LayerError, match="running_var should contain 64 elements not 1"):
        switch_norm(
            torch.randn(SHAPE), **{**arguments(), "running_var": torch.ones(1)}, training=True, synchronize=True
        )


# --- updates in place


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_expanded_are_read_but_not_updated(name: str, backend: str) -> None:
    given = {**arguments(), name: torch.ones(1).expand(64)}
    before = {key: tensor.clone() for key, tensor in given.items()}
    with normswap.use_backend(backend):
        for statistics in ("batch", "renorm"):
            with pytest.raises(LayerError, match=rf"{name} is an expanded tensor, .*{name}\.clone\(\)"):
                switch_norm(torch.randn(SHAPE), **given, training=True, gate="simplex", bn_statistics=statistics)
        assert all(given[key].equal(tensor) for key, tensor in before.items())
        x, dense = torch.randn(SHAPE), {**given, name: torch.ones(64)}
        y = switch_norm(x, **given, gate="simplex")
        assert y.equal(switch_norm(x, **dense, gate="simplex"))


def test_statistics_that_share_memory_are_not_updated() -> None:
    same, memory = torch.ones(64), torch.ones(200)
    for mean, var in (
        (same, same),
        (same, same.view(64)),
        (memory[:64], memory[63:127]),
        (memory[0:128:2], memory[2:130:2]),
        (memory[:64], memory[0:128:2]),
    ):
        given = {**arguments(), "running_mean": mean, "running_var": var}
        with pytest.raises(LayerError, match=r"running_mean and running_var share memory, .*clone"):
            switch_norm(torch.randn(SHAPE), **given, training=True, gate="simplex")
        assert (mean == 1).all()
        switch_norm(torch.randn(SHAPE), **given, gate="simplex")


def test_statistics_side_by_side_in_one_tensor_are_updated_as_others() -> None:
    x, expected = torch.randn(SHAPE), arguments()
    switch_norm(x, **expected, training=True, gate="simplex")
    rows, columns = torch.empty(2, 64), torch.empty(64, 2)
    for mean, var in ((rows[0], rows[1]), (columns[:, 0], columns[:, 1])):
        mean.zero_()
        var.fill_(1)
        given = {**arguments(), "running_mean": mean, "running_var": var}
        switch_norm(x, **given, training=True, gate="simplex")
        torch.testing.assert_close(mean, expected["running_mean"])
        torch.testing.assert_close(var, expected["running_var"])


@pytest.mark.parametrize("size", [(0,), (2,)])
def test_a_count_of_batches_has_one_element(size: tuple[int, ...]) -> None:
    given = {**arguments(), "num_batches_tracked": torch.zeros(size, dtype=torch.long)}
    with pytest.raises(LayerError, match=f"num_batches_tracked should contain 1 element not {size[0]}"):
        switch_norm(torch.randn(SHAPE), **given, training=True, gate="simplex")


# --- direct calls of operators

OPTIONS = ("simplex", "in ln bn", 1e-5)


@pytest.mark.parametrize("name", ["weight", "bias", "bn_mean", "bn_var"])
def test_operators_check_their_arguments(name: str) -> None:
    point, x = torch.tensor([0.2, 0.3, 0.5]), torch.randn(SHAPE)
    given = {"weight": torch.ones(64), "bias": torch.ones(64)}
    given |= {"bn_mean": torch.zeros(1, 64), "bn_var": torch.ones(1, 64)}
    given[name] = given[name][..., :1]
    for operator in (torch.ops.normswap.switch_norm, torch.ops.normswap.switch_norm_constant):
        with pytest.raises(LayerError, match="should contain 64 elements not 1"):
            operator(x, point, point, *given.values(), *OPTIONS)
        with pytest.raises(LayerError, match="expected gate parameters of shape"):
            operator(x, point[:2], point, None, None, torch.zeros(1, 64), torch.ones(1, 64), *OPTIONS)


def test_the_operator_of_the_backward_pass_checks_its_arguments() -> None:
    point, x, table = torch.tensor([0.2, 0.3, 0.5]), torch.randn(SHAPE), torch.ones(2, 64)

    def backward(dy: Tensor, mean: Tensor, var: Tensor) -> Any:
        return torch.ops.normswap.switch_norm_backward(dy, x, point, point, None, None, None, mean, var, *OPTIONS)

    backward(x, table, table)
    for given, message in (
        ((x[:1], table, table), r"dy should have the shape \(2, 64, 3, 3\)"),
        ((x.double(), table, table), "dy should .* be torch.float32"),
        ((x, table[:1], table), r"mean should have the shape \(2, 64\)"),
        ((x, table, table[:, :1]), r"var should have the shape \(2, 64\)"),
        ((x, table.double(), table), "mean should .* be torch.float32 on cpu, got .* torch.float64"),
    ):
        with pytest.raises(LayerError, match=message):
            backward(*given)


@NEEDS_C
def test_the_operator_of_the_update_writes_within_bounds() -> None:
    memory = torch.full((128,), 7.0)
    row = torch.ones(1, 64)
    with pytest.raises(ValueError, match="running_var should contain 64 elements not 1"):
        torch.ops.normswap.update_running_stats(torch.zeros(64), memory[:1], None, 0.1, 18, row, row)
    assert (memory == 7).all()


# --- the C extension


def layer_arguments(x: Tensor, moments: Tensor, **changed: Any) -> dict[str, Any]:
    """Arguments of both passes for x (N, C, H, W) with moments (N, C), without constants.

    Tensors become buffers, and stay alive until the end of the test.
    """
    gate = torch.tensor([0.2, 0.3, 0.5])
    given: dict[str, Any] = {"dtype": 0, "samples": x.shape[0], "channels": x.shape[1], "positions": x[0, 0].numel()}
    given |= {"channels_last": False, "threads": 1, "softmax": False, "eps": 1e-5}
    given |= {
        "branch_order": cpu._options(Mixing("simplex", ("in", "ln", "bn"), 1e-5), torch.float32)["branch_order"],
        "x": x,
    }
    given |= {"mean": moments, "var": moments.clone(), "constant_mean": None, "constant_var": None}
    given |= {"weight": torch.ones(x.shape[1]), "bias": None, "mean_weight": gate, "var_weight": gate}
    given |= {"num_groups": 1, **dict.fromkeys(MATCHING_BUFFERS)}
    return as_buffers(given | changed)


def as_buffers(given: dict[str, Any]) -> dict[str, Any]:
    _kept.append(given)
    return {name: cpu.describe(value) if isinstance(value, Tensor) else value for name, value in given.items()}


def run_forward(first: dict[str, Any], **changed: Any) -> None:
    cpu._C.forward(
        first | as_buffers({"y": None, "batch_mean": None, "batch_var": None, "kept_constants": None} | changed)
    )


def run_backward(first: dict[str, Any], **changed: Any) -> None:
    gradients = ("dx", "mean_weight_gradient", "var_weight_gradient", "weight_gradient", "bias_gradient")
    cpu._C.backward(first | as_buffers(dict.fromkeys(("dy", *gradients)) | changed))


_kept: list[Any] = []


@pytest.fixture(autouse=True)
def _keep_for_one_test_only() -> Any:
    yield
    _kept.clear()


ORDER = "branch_order: expected a different index below K for each of the K branches"
BUFFERS: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"mean": torch.ones(2, 3)}, "mean should contain 8 elements not 6"),
    "var": ({"var": torch.ones(2, 5)}, "var should contain 8 elements not 10"),
    "no mean": ({"mean": None}, "mean: expected a buffer of 8 elements, got None|expected mean and var together"),
    "dtype of a table": ({"var": torch.ones(2, 4).double()}, "var: unexpected dtype code 1"),
    "int64": ({"weight": torch.ones(4, dtype=torch.int64)}, "weight: unexpected dtype code 4"),
    "constants": ({"constant_mean": torch.ones(3), "constant_var": torch.ones(4)}, "constant_mean should contain 4"),
    "one constant": ({"constant_mean": torch.ones(4)}, "expected constant_mean and constant_var together"),
    "weight": ({"weight": torch.ones(3)}, "weight should contain 4 elements not 3"),
    "bias": ({"bias": torch.ones(0)}, "bias should contain 4 elements not 0"),
    "negative": ({"bias": (0, 0, -1)}, "bias: expected a number of elements of at least 0, got -1"),
    "shift": ({"ln_mean_shift": torch.ones(3)}, "ln_mean_shift should contain 4 elements not 3"),
    "shift alone": ({"ln_mean_shift": torch.ones(4)}, "expected ln_mean_shift and ln_var_scale together"),
    "scale": ({"ln_var_scale": torch.ones(4, dtype=torch.int64)}, "ln_var_scale: unexpected dtype code 4"),
    "scale of in": ({"in_var_scale": torch.ones(5)}, "in_var_scale should contain 4 elements not 5"),
    "groups": ({"num_groups": 3}, "num_groups: expected a divisor of the number of channels"),
    "no groups": ({"num_groups": 0}, "num_groups: expected a divisor of the number of channels"),
    "negative groups": ({"num_groups": -2}, "num_groups: expected a divisor of the number of channels"),
    "gate": ({"mean_weight": torch.ones(2)}, "mean_weight should contain 3 elements not 2"),
    "another gate": ({"var_weight": torch.ones(4)}, "var_weight should contain 3 elements not 4"),
    "order": ({"branch_order": 0b111101}, ORDER),
    "no branches": ({"branch_order": 0}, ORDER),
    "gap in the order": ({"branch_order": 0b000011}, ORDER),
    "dtype": ({"dtype": 4}, "expected a floating dtype and a shape without zeros"),
    "no samples": ({"samples": 0}, "expected a floating dtype and a shape without zeros"),
    "overflow": ({"positions": 1 << 62}, "expected a floating dtype and a shape without zeros"),
}


@NEEDS_C
@pytest.mark.parametrize(("changed", "message"), BUFFERS.values(), ids=BUFFERS)
def test_the_extension_checks_every_buffer(changed: dict[str, Any], message: str) -> None:
    x, table = torch.randn(2, 4, 3, 3), torch.ones(2, 4)
    y, dx = torch.full_like(x, 7), torch.full_like(x, 7)
    first = layer_arguments(x, table, **changed)
    with pytest.raises(ValueError, match=message):
        run_forward(first, y=y)
    with pytest.raises(ValueError, match=message):
        run_backward(first, dy=x, dx=dx)
    assert (y == 7).all()
    assert (dx == 7).all()
    assert (table == 1).all()


@NEEDS_C
def test_the_extension_checks_what_it_writes() -> None:
    x, table = torch.randn(2, 4, 3, 3), torch.ones(2, 4)
    first = layer_arguments(x, table)
    y, short = torch.empty_like(x), torch.empty(71)
    for changed, message in (
        ({"y": short}, "y should contain 72 elements not 71"),
        ({"y": x}, "y and x share memory"),
        ({"y": x.double()}, "y: unexpected dtype code 1"),
        ({"y": None}, "y: expected a buffer of 72 elements, got None"),
        ({"y": y, "batch_mean": torch.empty(3)}, "batch_mean should contain 4 elements not 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_forward(first, **changed)
    with pytest.raises(ValueError, match="x should contain 72 elements not 71"):
        run_forward(first | as_buffers({"x": short}), y=y)
    for name in ("dx", "mean_weight_gradient", "var_weight_gradient", "weight_gradient", "bias_gradient"):
        with pytest.raises(ValueError, match=f"{name} should contain"):
            run_backward(first, dy=x, **{name: torch.empty(5)})
    with pytest.raises(ValueError, match="dy should contain 72 elements not 71"):
        run_backward(first, dy=short)
    with pytest.raises(ValueError, match="dx and x share memory"):
        run_backward(first, dy=y, dx=x)


@NEEDS_C
def test_the_extension_takes_arguments_by_name() -> None:
    x, table = torch.randn(2, 4, 3, 3), torch.ones(2, 4)
    first = layer_arguments(x, table)
    y, again = torch.empty_like(x), torch.empty_like(x)
    run_forward(first, y=y)
    run_forward(dict(reversed(first.items())), y=again)
    assert again.equal(y)
    with pytest.raises(TypeError, match="missing argument 'eps'"):
        run_forward({"epsilon" if name == "eps" else name: value for name, value in first.items()}, y=y)
    with pytest.raises(TypeError, match="expected a dict of 26 arguments"):
        run_forward({name: value for name, value in first.items() if name != "eps"}, y=y)
    with pytest.raises(TypeError, match=r"x: expected a tuple \(address, dtype, number of elements\) or None"):
        run_forward(first | {"x": x.data_ptr()}, y=y)
    with pytest.raises(TypeError):
        run_forward(first | {"eps": "small"}, y=y)
    with pytest.raises(TypeError):
        run_forward(first | {"samples": 2.0}, y=y)


@NEEDS_C
def test_a_tensor_with_freed_memory_is_refused() -> None:
    """Sharding frees the memory of parameters between uses and keeps their shape."""
    x, freed = torch.randn(2, 4, 3, 3), torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="bias has no memory for its 4 elements"):
        switch_norm(x, torch.ones(3), torch.ones(3), bias=freed)


@NEEDS_C
def test_the_update_of_the_extension_writes_within_bounds() -> None:
    row, mean, var, memory = torch.ones(4), torch.zeros(4), torch.ones(4), torch.full((8,), 7.0)
    count = torch.tensor([0, 0])

    def update(*tensors: Tensor, counts: Tensor = count[:1]) -> None:
        buffers = dict(zip(("mean", "var", "running_mean", "running_var"), tensors, strict=True))
        options = {"channels": 4, "momentum": 0.1, "var_factor": 1.0}
        cpu._C.update_running(options | as_buffers(buffers | {"num_batches_tracked": counts}))

    for tensors, message in (
        ((row, row, mean, memory[:1]), "running_var should contain 4 elements not 1"),
        ((row, row, memory[:3], var), "running_mean should contain 4 elements not 3"),
        ((row[:2], row, mean, var), "mean should contain 4 elements not 2"),
        ((row, row, memory[:4], memory[3:7]), "running_mean and running_var share memory"),
        ((row, row, row, var), "share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            update(*tensors)
    with pytest.raises(ValueError, match="num_batches_tracked should contain 1 element not 2"):
        update(row, row, mean, var, counts=count)
    with pytest.raises(ValueError, match="num_batches_tracked: unexpected dtype code 0"):
        update(row, row, mean, var, counts=row[:1])
    assert (memory == 7).all()
    assert mean.equal(torch.zeros(4))
    assert count.equal(torch.tensor([0, 0]))


@NEEDS_C
def test_the_compiled_passes_take_no_other_layout() -> None:
    x = torch.randn(2, 3, 4, 5).transpose(1, 3)
    inputs = Inputs(x, torch.ones(3), torch.ones(3), None, None, None, Mixing("softmax", BRANCHES, 1e-5))
    with pytest.raises(LayerError, match="expected a contiguous or channels_last input, got strides"):
        cpu.extension_forward(inputs)
    backend = fused_backend(x)
    assert backend is not None
    backend.forward(inputs)  # lays it out first


@NEEDS_C
def test_an_extension_of_another_interface_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu._C, "INTERFACE", 1)
    try:
        assert not importlib.reload(cpu).AVAILABLE
    finally:
        monkeypatch.undo()
        assert importlib.reload(cpu).AVAILABLE


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": [1.0, 2.0]}, "x: expected a tensor, got a value of type list: pass torch.tensor(x)"),
        (
            {"x": torch.zeros(2, 3, 4, 4).numpy()},
            "x: expected a tensor, got a value of type ndarray: pass torch.from_numpy",
        ),
        ({"x": None}, "x: expected a tensor, got None"),
        ({"mean_weight": [1.0, 1.0, 1.0]}, "mean_weight: expected a tensor, got a value of type list"),
        ({"var_weight": [1.0, 1.0, 1.0]}, "var_weight: expected a tensor, got a value of type list"),
        ({"running_mean": 3 * [0.0]}, "running_mean: expected a tensor, got a value of type list"),
        ({"running_var": 3 * [0.0]}, "running_var: expected a tensor, got a value of type list"),
        ({"weight": (1.0, 1.0, 1.0)}, "weight: expected a tensor, got a value of type tuple"),
        ({"bias": 1.0}, "bias: expected a tensor, got a value of type float"),
        ({"num_batches_tracked": 3}, "num_batches_tracked: expected a tensor, got a value of type int"),
    ],
)
def test_an_argument_that_is_no_tensor_is_refused_by_name(arguments: dict[str, Any], text: str) -> None:
    gate = torch.ones(3)
    given = {
        "x": torch.zeros(2, 3, 4, 4),
        "mean_weight": gate,
        "var_weight": gate,
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
    }
    with pytest.raises(ArgumentError, match=re.escape(text)):
        switch_norm(**{**given, **arguments}, training=True)


@pytest.mark.parametrize("branches", [3, None, [["bn"]], ["bn", "bn"], []])
def test_branches_of_any_wrong_type_are_refused(branches: Any) -> None:
    gate = torch.ones(3)
    for build in (
        lambda: SwitchNorm2d(3, branches=branches),
        lambda: switch_norm(torch.zeros(2, 3, 4, 4), gate, gate, branches=branches),
    ):
        with pytest.raises(LayerError, match=re.escape(f"got {branches!r}")):
            build()


def test_a_layer_refuses_an_input_that_is_no_tensor() -> None:
    with pytest.raises(ArgumentError, match=re.escape("input: expected a tensor, got a value of type list")):
        SwitchNorm2d(3)([1.0])
