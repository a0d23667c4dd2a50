"""Wrapped models: converted inside their wrappers, which stay what they were, or refused with the way out."""

import copy
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import normswap
from normswap import (
    SwapPlan,
    SwitchNorm2d,
    apply_plan,
    find_norm_sites,
    importance_weights,
    load,
    plan_swaps,
    revert,
    save,
    verify,
)
from normswap.errors import SwapError
from normswap.surgery.wrappers import check_wrapping, rewrap, unwrap
from tests.helpers import guarantees, zoo


def convert(model: Any, *inputs: Any, **options: Any) -> normswap.Conversion:
    """Convert with the batch statistics of the original, so that training can be compared with it."""
    return normswap.convert(model, *inputs, **({} if "plan" in options else {"bn_statistics": "batch"}), **options)


NOTHING = SwapPlan((), (), "")
X = zoo.image(4, 3, 9, 9)().double()


class Net(nn.Module):
    """A module site, a functional one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.block, self.head = zoo.conv(), zoo.bn(), zoo.FunctionalBlock(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.bn(self.conv(x)).relu()).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(5)
    return zoo.randomise(Net()).double().train()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="eager", **options)


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def ddp(model: nn.Module, **options: Any) -> Any:
    return DistributedDataParallel(model, **options)


WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "DDP": ddp,
    "compiled DDP of compiled": lambda model: compiled(ddp(compiled(model))),
}
STAYING: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "compiled DataParallel of compiled": lambda model: compiled(nn.DataParallel(compiled(model))),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch.compiler.reset()  # which other tests may have brought to the limit where it gives up compiling


def chain(model: nn.Module) -> list[type]:
    """The classes of the wrappers from the outermost in."""
    found = []
    while type(model).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        found.append(type(model))
        model = next(iter(model._modules.values()))  # type: ignore[assignment]
    return found


Pass = dict[str, dict[str, Tensor]]


def step(model: nn.Module, x: Tensor, *, training: bool) -> Pass:
    """What one pass gives: the output, in training also gradients, and buffers, by names of the inside."""
    inside = unwrap(model).train(training)
    inside.zero_grad()
    y = model(x)
    if training:
        y.square().sum().backward()
    return {
        "outputs": {"y": y.detach()},
        "gradients": {name: p.grad.clone() for name, p in inside.named_parameters() if p.grad is not None},
        "buffers": {name: b.clone() for name, b in inside.named_buffers()},
    }


def same(first: Pass, second: Pass) -> None:
    """Compare two passes by the limit of guarantee 1; gradients as one vector, since some are exactly 0."""
    for kind, tensors in first.items():
        for names in [[*tensors]] if kind == "gradients" else [[name] for name in tensors]:
            vectors = [torch.cat([found[kind][name].flatten() for name in names]) for found in (first, second) if names]
            assert not vectors or guarantees.distance(*vectors) <= guarantees.LIMIT, names


def moved(model: nn.Module) -> nn.Module:
    """Away from BN at every site."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(guarantees.GATES):
                parameter.copy_(torch.tensor([0.25, 0.25, 0.5]))
    return model


# --- around a copy ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_wrapped_model_is_converted_inside_its_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    bare = convert(net(), X)
    model = wrap(net())
    step(model, X, training=True)  # what was compiled, bucketed or hooked until now must not be seen
    record = guarantees.Record.of(model)
    inside = guarantees.Record.of(unwrap(model))
    result = convert(model, X)
    guarantees.nothing_else_changed(record, model, NOTHING, same_objects=True)
    assert chain(result.model) == chain(model) != []
    assert (result.plan, list(result.replaced)) == (bare.plan, list(bare.replaced))
    guarantees.nothing_else_changed(inside, unwrap(result.model), result.plan, same_objects=False)
    for training in (False, True):
        same(step(model, X, training=training), step(result.model, X, training=training))
    assert unwrap(moved(result.model)).bn.mean_weight.grad is not None
    eager = copy.deepcopy(unwrap(result.model))
    same(step(result.model, X, training=False), step(eager, X, training=False))


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_everything_speaks_of_the_model_inside(wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    original, model = net(), wrap(net())
    assert find_norm_sites(model, X) == find_norm_sites(original, X)
    plan = plan_swaps(original, X, bn_statistics="batch")
    assert plan_swaps(model, X, bn_statistics="batch") == plan
    converted = convert(model, plan=plan).model
    assert verify(model, converted, [X]).passed
    assert verify(model, converted, [X]) == verify(original, unwrap(converted), [X])
    assert importance_weights(converted) == importance_weights(unwrap(converted))
    assert sorted(importance_weights(converted)) == ["block.batch_norm", "bn"]
    save(converted, tmp_path / "model.pt", plan=plan, payload="module")
    guarantees.same_function(original, load(tmp_path / "model.pt", trust=True).model, X)


def test_the_mode_of_a_wrapper_stays() -> None:
    model = nn.DataParallel(net())
    model.training = False
    result = convert(model).model
    assert (result.training, result.module.training) == (False, True)


def test_data_parallel_keeps_devices_and_dimension() -> None:
    model = nn.DataParallel(net())
    model.__dict__ |= {"device_ids": [1, 0], "output_device": 1, "dim": 1, "src_device_obj": torch.device("cuda", 1)}
    again = convert(model).model
    settings = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert {name: vars(again)[name] for name in settings} == settings
    assert again.module is not model.module


def plain(model: Any) -> dict[str, Any]:
    """All settings of a DDP: its plain attributes, and those of its reducer."""
    kinds = bool | int | str | list | torch.device | distributed.ProcessGroup | None
    kept = {name: value for name, value in vars(model).items() if isinstance(value, kinds)}
    logged = model._get_ddp_logging_data()
    sizes = ("num_parameter_tensors", "total_parameter_size_bytes", "bucket_sizes", "rebuilt_bucket_sizes")
    tensors = ("_module_parameters", "modules_buffers", "_delay_all_reduce_params")
    return {name: v for name, v in (kept | logged).items() if name not in (*tensors, *sizes)}


PARAMETERS = inspect.signature(DistributedDataParallel).parameters
DDP_OPTIONS: dict[str, Any] = {
    "dim": 1,
    "bucket_cap_mb": 3,
    "bucket_cap_mb_list": [1, 2],
    "find_unused_parameters": True,
    "gradient_as_bucket_view": True,
    "static_graph": True,
    "forward_sync_buffers": False,
    "skip_all_reduce_unused_params": True,
    "batched_grad_copy": True,
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", [None, *(name for name in DDP_OPTIONS if name in PARAMETERS)])
def test_ddp_is_built_again_with_its_options(name: str | None) -> None:
    model = ddp(net(), **({} if name is None else {name: DDP_OPTIONS[name]}))
    again = convert(model).model
    assert plain(again) == plain(model)
    assert (name is None) == (plain(model) == plain(ddp(net())))
    assert {id(p) for p in again._module_parameters} == {id(p) for p in again.module.parameters()}
    assert again._get_ddp_logging_data()["num_parameter_tensors"] == len(list(again.parameters()))


# Only asked for where torch still has it under that name; forward_sync_buffers is the same setting.
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
@pytest.mark.usefixtures("one_process")
def test_ddp_keeps_its_group_and_what_it_broadcasts() -> None:
    group = distributed.new_group([0])
    again = convert(ddp(net(), process_group=group, broadcast_buffers=False)).model
    assert (again.process_group, again.broadcast_buffers) == (group, False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dynamic": True}, {"fullgraph": True}, {"options": {"trace.enabled": True}}, {}])
def test_a_model_is_compiled_again_as_it_was(options: dict[str, Any]) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _inputs: Any, **given: Any) -> Any:
        graphs.append(graph)
        assert given == ({"options": options["options"]} if "options" in options else {})
        return graph.forward

    model = torch.compile(net(), backend=backend, **options)
    again: Any = convert(model).model
    assert (again.dynamo_ctx, graphs) == (model.dynamo_ctx, [])
    again(X)
    assert graphs


def test_what_was_not_to_compile_is_marked_so_again() -> None:
    model = torch._dynamo.disable(net())
    again = convert(model).model
    assert type(again.dynamo_ctx) is type(model.dynamo_ctx)
    same(step(model, X, training=True), step(again, X, training=True))


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wrap", STAYING.values(), ids=STAYING)
def test_in_place_the_wrapper_stays_and_sees_the_change(wrap: Callable[[nn.Module], Any]) -> None:
    model, original = wrap(net()), net()
    model.register_forward_hook(lambda *_: None)
    before = step(model, X, training=True)
    inside, record = unwrap(model), guarantees.Record.of(unwrap(model))
    hooks = model._forward_hooks.copy()
    result = convert(model, X, inplace=True)
    assert (result.model, unwrap(model), model._forward_hooks) == (model, inside, hooks)
    guarantees.nothing_else_changed(record, inside, result.plan, same_objects=True)
    same(before, step(original, X, training=True))
    same(step(original, X, training=True), step(model, X, training=True))
    eager = copy.deepcopy(moved(inside))
    for training in (True, False):
        same(step(eager, X, training=training), step(model, X, training=training))
    assert revert(model, discard=True) is model
    same(step(copy.deepcopy(inside), X, training=True), step(model, X, training=True))
    assert list(apply_plan(model, result.plan)) == list(result.replaced)
    assert type(inside.bn) is SwitchNorm2d


def test_a_graph_in_place_comes_in_new_wrappers() -> None:
    model = compiled(nn.DataParallel(net()))
    result = convert(model, X, as_graph=True, inplace=True).model
    assert chain(result) == chain(model)
    assert isinstance(unwrap(result), fx.GraphModule)
    assert unwrap(result).bn is unwrap(model).bn
    same(step(net(), X, training=True), step(result, X, training=True))


def test_a_model_that_compiles_itself_is_copied_as_torch_copies_it_and_stays_compiled_in_place() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = net()
    model.compile(backend=backend)
    same(step(net(), X, training=True), step(model, X, training=True))
    seen = len(graphs)
    result = convert(model).model
    same(step(copy.deepcopy(model), X, training=True), step(result, X, training=True))
    assert len(graphs) == seen
    convert(model, inplace=True)
    eager = copy.deepcopy(moved(model))
    same(step(eager, X, training=True), step(model, X, training=True))
    assert len(graphs) > seen


# --- refused ----------------------------------------------------------------------------------------------------------


def stand_in(name: str) -> nn.Module:
    """A wrapper by the name of its class: torch's own needs several processes."""
    return type(name, (nn.Module,), {})()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP": (
        lambda: stand_in("FullyShardedDataParallel"),
        "model is wrapped in FullyShardedDataParallel: convert model.module, then wrap the result again",
    ),
    "fully_shard": (
        lambda: stand_in("FSDPModule"),
        "model is sharded by fully_shard: convert model first, then shard it with the gates in ignored_params",
    ),
    "inside": (
        lambda: nn.Sequential(nn.ReLU(), nn.DataParallel(zoo.Chain(zoo.bn()))),
        "model.1 is wrapped in DataParallel: convert model.1.module, then wrap the result again",
    ),
    "inside wrappers": (
        lambda: compiled(nn.DataParallel(nn.Sequential(nn.ReLU(), compiled(zoo.bn())))),
        "model._orig_mod.module.1 is compiled: convert model._orig_mod.module.1._orig_mod, then compile the result",
    ),
    "a class derived from one": (
        lambda: type("Theirs", (nn.DataParallel,), {})(zoo.bn()),
        "model is wrapped in DataParallel: convert model.module, then wrap the result again",
    ),
    "TorchScript": (
        lambda: zoo.BY_NAME["TorchScript inside"].model().part,
        "the model is TorchScript, whose code is fixed: convert the Python model, then trace or export it",
    ),
    "wrapped TorchScript": (
        lambda: nn.DataParallel(zoo.BY_NAME["TorchScript inside"].model().part),
        "the model is TorchScript, whose code is fixed: convert the Python model, then trace or export it",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_inside_its_wrapper_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    for call in (convert, lambda model: convert(model, inplace=True), lambda model: apply_plan(model, NOTHING)):
        with pytest.raises(SwapError, match=f"^{re.escape(message)}"):
            call(model)
    with pytest.raises(SwapError, match=f"^{re.escape(message.replace('convert', 'revert'))}"):
        revert(model)


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda *_: None)
    return model


def with_child(model: nn.Module) -> nn.Module:
    model.add_module("teacher", nn.ReLU())
    return model


def with_tensor(model: nn.Module) -> nn.Module:
    model.register_buffer("steps", torch.tensor(0))
    return model


def with_hook(model: Any) -> Any:
    model.register_comm_hook(None, allreduce_hook)
    return model


def with_builtin_hook(model: Any) -> Any:
    model._register_builtin_comm_hook(distributed.BuiltinCommHookType.ALLREDUCE)
    return model


def with_buffer_hook(model: Any) -> Any:
    model._register_buffer_comm_hook(None, lambda *_: None)
    return model


def delaying() -> Any:
    model = net()
    return ddp(
        model,
        delay_all_reduce_named_params=[("head.bias", model.head.bias)],
        param_to_hook_all_reduce=model.head.weight,
    )


def mixed() -> Any:
    from torch.nn.parallel.distributed import _MixedPrecision

    model = ddp(net())
    model.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)  # its streams need an accelerator
    return model


def on_a_mesh() -> Any:
    mesh = distributed.init_device_mesh("cpu", (1,))
    return ddp(net(), device_mesh=mesh)


DDP = "model is wrapped in DistributedDataParallel"
WAY_OUT = ": convert model.module, then wrap the result again"
NOT_AGAIN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hooks on DataParallel": (lambda: hooked(nn.DataParallel(net())), "model .* that has hooks: convert"),
    "hooks on compiled": (
        lambda: hooked(compiled(net())),
        "model is compiled that has hooks: convert model._orig_mod, then compile",
    ),
    "hooks inside": (
        lambda: compiled(hooked(nn.DataParallel(net()))),
        r"model\._orig_mod is wrapped in DataParallel that has hooks: convert model\._orig_mod\.module,",
    ),
    "hooks on DDP": (lambda: hooked(ddp(net())), f"{DDP} that has hooks{WAY_OUT}"),
    "a child": (
        lambda: with_child(nn.DataParallel(net())),
        f"model is wrapped in DataParallel that has tensors or modules of its own{WAY_OUT}",
    ),
    "a tensor": (lambda: with_tensor(ddp(net())), f"{DDP} that has tensors or modules of its own{WAY_OUT}"),
    "a communication hook": (lambda: with_hook(ddp(net())), f"{DDP} with a communication hook{WAY_OUT}"),
    "a builtin hook": (lambda: with_builtin_hook(ddp(net())), f"{DDP} with a communication hook{WAY_OUT}"),
    "a buffer hook": (lambda: with_buffer_hook(ddp(net())), f"{DDP} with a communication hook{WAY_OUT}"),
    "delays": (delaying, f"{DDP} that delays the reduction of some parameters{WAY_OUT}"),
    "mixed precision": (mixed, f"{DDP} with mixed precision{WAY_OUT}"),
    "a mesh": (on_a_mesh, f"{DDP} on a device mesh{WAY_OUT}"),
    "frozen since": (
        lambda: ddp(net()).requires_grad_(False),
        rf"{DDP} and cannot be wrapped again \(DistributedDataParallel is not needed when .*\){WAY_OUT}",
    ),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("make", "message"), NOT_AGAIN.values(), ids=NOT_AGAIN)
def test_a_wrapper_that_cannot_be_built_again_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    record = guarantees.Record.of(model)
    with pytest.raises(SwapError, match=f"^{message}"):
        convert(model)
    guarantees.nothing_else_changed(record, model, NOTHING, same_objects=True)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [ddp, lambda model: compiled(ddp(model))])
def test_ddp_is_refused_in_place(wrap: Callable[[nn.Module], Any]) -> None:
    model = wrap(net())
    converted = wrap(convert(net()).model)
    record = guarantees.Record.of(model)
    message = r"DistributedDataParallel whose reducer refers to the old parameters: {} model\S*\.module, then"
    with pytest.raises(SwapError, match=message.format("convert")):
        convert(model, inplace=True)
    with pytest.raises(SwapError, match=message.format("convert")):
        apply_plan(model, plan_swaps(model))
    with pytest.raises(SwapError, match=message.format("revert")):
        revert(converted)
    guarantees.nothing_else_changed(record, model, NOTHING, same_objects=True)


def test_code_that_would_go_stale_is_refused_in_place() -> None:
    # Such a filter drops the guards that would notice; the model would go on as it was.
    blind = torch.compile(net(), backend="eager", options={"guard_filter_fn": lambda guards: [False for _ in guards]})
    message = r"^model is compiled with guard_filter_fn: convert model\._orig_mod, then compile"
    with pytest.raises(SwapError, match=message):
        convert(blind, inplace=True)
    assert type(unwrap(convert(blind).model).bn) is SwitchNorm2d


def test_code_compiled_ahead_of_time_is_refused_in_place() -> None:
    from torch._dynamo.aot_compile import ModelInput

    fixed = compiled(net(), fullgraph=True)
    with torch._dynamo.config.patch(enable_aot_compile=True):
        fixed._aot_compile([ModelInput(args=(X,), kwargs={}, contexts=[])])
    with pytest.raises(SwapError, match=r"^model is compiled ahead of time: convert model\._orig_mod, then compile"):
        convert(fixed, inplace=True)


def test_a_model_without_wrappers_passes_through() -> None:
    model, other = net(), net()
    check_wrapping(model, inplace=True, rebuilt=True)
    assert (unwrap(model), rewrap(model, other)) == (model, other)


# --- several processes ------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_processes.py"


@pytest.mark.multiprocess
@pytest.mark.skipif("forward_sync_buffers" not in PARAMETERS, reason="an older torch")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_train_the_conversion_as_they_trained_the_original(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("synced", "local"):
        for original, converted, _ in (first[name], second[name]):
            for key, value in original.items():
                assert guarantees.distance(value, converted[key]) <= guarantees.LIMIT, key
        for key, value in first[name][1].items():
            assert not key.endswith(".grad") or guarantees.distance(value, second[name][1][key]) <= guarantees.LIMIT, (
                key
            )
        torch.testing.assert_close(second[name][2]["kept"], first[name][2]["kept"] + 1)
    means = [results["local"][1]["1.running_mean"] for results in (first, second)]
    assert (means[1] - means[0]).abs().min() > 0.1  # neither broadcast when built again nor later
    for results in (first, second):
        assert re.search(r"^model is wrapped .* and cannot be wrapped again \(.*params.*\): ", results["refused"])
