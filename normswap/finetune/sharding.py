"""The weights of a run in several processes: replicas, or shards by `torch.distributed.fsdp.fully_shard`.

Gates are points on a simplex that the forward pass projects, so every process has all of them, and their gradients are
averaged once a step. Buffers are not sharded either. For evaluations and files the shards are gathered in a plain copy
of the network: processes may call it a different number of times, and a file of it has no trace of the shards.
"""

import copy
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import RecipeError
from normswap.finetune.optimization import build_optimizer
from normswap.finetune.setup import RunSetup
from normswap.finetune.tables import TrainTable
from normswap.model_state import call_model, preserved_random_state, registered_hooks, training_flags
from normswap.surgery.importance import gate_parameters
from normswap.text import first_line

# The parameters of a block are gathered at once: a larger part needs memory, a smaller one is not worth an exchange.
_LARGEST_SHARE, _SMALLEST_SHARE = 1 / 4, 1 / 500

# --- blocks -----------------------------------------------------------------------------------------------------------


def choose_blocks(model: nn.Module, inputs: Any) -> list[str]:
    """Return the names of the modules whose parameters are gathered together; the root gathers all other parameters.

    Blocks are the outermost modules with 1/500 to 1/4 of all parameters, and larger ones without smaller blocks inside.
    The hooks of FSDP must see every use of a parameter. So the forward pass calls a block exactly once, does not change
    its inputs in place nor return views of other tensors, and no other module has one of its parameters.

    Args:
        inputs: one input of the model.
    """
    called = _modules_called_once(model, inputs)
    users, total = _count_users(model), _count_values(model)

    def visit(parent: nn.Module, prefix: str) -> Iterator[str]:
        for name, module in parent.named_children():
            share = _count_values(module) / total
            if share < _SMALLEST_SHARE:
                continue
            fits = module in called and all(users[key] == number for key, number in _count_users(module).items())
            inner = [] if fits and share <= _LARGEST_SHARE else [*visit(module, f"{prefix}{name}.")]
            yield from inner or ([prefix + name] if fits else [])

    return [*visit(model, "")]


def _count_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_users(module: nn.Module) -> Counter[int]:
    """How many names each parameter has, by id."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


@torch.no_grad()
def _modules_called_once(model: nn.Module, inputs: Any) -> set[nn.Module]:
    """The modules that a forward pass calls once, with inputs that stay as they are and outputs that are no views."""
    calls: Counter[nn.Module] = Counter()
    versions: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    unfit: set[nn.Module] = set()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] += 1
        versions[module] = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]

    def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        changed = any(tensor._version != version for tensor, version in versions.pop(module, []))
        if changed or any(tensor._is_view() for tensor in _tensors(output)):
            unfit.add(module)

    modules = [*model.modules()]
    hooks = [
        *(partial(module.register_forward_pre_hook, before, with_kwargs=True) for module in modules),
        *(partial(module.register_forward_hook, after, with_kwargs=True) for module in modules),
    ]
    with training_flags(modules, training=False), preserved_random_state(), registered_hooks(hooks):
        call_model(model, inputs)
    return {module for module, number in calls.items() if number == 1} - unfit


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


# --- weights of a run -------------------------------------------------------------------------------------------------


class Weights(Protocol):
    """Where the weights of a run are: every process has all of them, or a shard.

    Attributes:
        network: the network that is called in training.
    """

    @property
    def network(self) -> nn.Module: ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and a backward pass; the last of a step averages gradients over processes."""

    def finish_backward(self) -> None:
        """Finish the gradients after the last backward pass of a step."""

    def whole(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context with a plain network that has all weights of the model or its average; all processes enter.

        No process waits for another one inside.
        """

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state of an optimizer, the same with and without shards; all processes must call."""

    def load_optimizer_state(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Load what `optimizer_state` returned in the first process."""


@dataclass(frozen=True)
class Replicas:
    """Every process has all weights: DistributedDataParallel if there are several."""

    accelerator: Accelerator
    network: nn.Module

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context without exchange of gradients, except for the last backward pass."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.network)

    def finish_backward(self) -> None:
        """Nothing is left to do."""

    def whole(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context with the model itself."""
        return nullcontext(model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return its state dict."""
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Load the state dict."""
        optimizer.load_state_dict(dict(state))


@dataclass(frozen=True)
class Shards:
    """Every process has a shard of each parameter except the gates.

    Attributes:
        network: the model, which `fully_shard` has changed in place.
        replicated: its trainable parameters that are not sharded.
        plain: its copy without hooks of FSDP, whose parameters have no memory outside of `whole`.
    """

    network: nn.Module
    replicated: tuple[nn.Parameter, ...]
    plain: nn.Module

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Let the next backward pass reduce the gradients to shards if it is the last, and else add them up."""
        self.network.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return nullcontext()

    def finish_backward(self) -> None:
        """Average the gradients that are not sharded, and share the running statistics of the first process."""
        average_gradients(self.replicated)
        share_tensors(self.network.buffers())

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[nn.Module]:
        """Gather the weights of the model, or of its average, in the plain network."""
        for own, other in zip(self.plain.modules(), model.modules(), strict=True):
            own._buffers.update(other._buffers)
        _replace_parameters(self.plain, model, lambda _, shard: _gather(shard))
        try:
            yield self.plain
        finally:
            _replace_parameters(self.plain, self.plain, lambda own, _: _without_memory(own))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return its state dict with whole tensors in the first process; in others, None replaces them."""
        is_first = distributed.get_rank() == 0

        def gather(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            whole = value.full_tensor()
            return whole.cpu() if is_first else None

        gathered: dict[str, Any] = tree_map(gather, dict(optimizer.state_dict()))
        return gathered

    def load_optimizer_state(self, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Load the shards of this process."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        likes = dict(zip(numbers, parameters, strict=True))
        entries = {key: tree_map(partial(_scatter, like=likes[key]), entry) for key, entry in state["state"].items()}
        optimizer.load_state_dict({**state, "state": entries})


def check_launch(accelerator: Accelerator, sharding: str) -> None:
    """Refuse sharding by accelerate, and sharding over one process.

    Raises:
        RecipeError: one of these.
    """
    # Without a GPU, accelerate ignores its configuration of FSDP.
    wants_plugin = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    kind = "FSDP" if wants_plugin else str(accelerator.distributed_type)
    if "FSDP" in kind or kind.endswith("DEEPSPEED"):
        raise RecipeError(
            f"{kind}: accelerate would shard the gates too, which the forward pass projects as a whole: set "
            'train.sharding = "fsdp", and launch with torchrun or accelerate launch --multi_gpu'
        )
    if sharding == "fsdp" and accelerator.num_processes == 1:
        raise RecipeError(
            'train.sharding: "fsdp" needs several processes, but there is one: start the recipe with torchrun or '
            'accelerate launch, or set train.sharding = "none"'
        )


def distribute_weights(prepared: RunSetup, train: TrainTable, average: Any, accelerator: Accelerator) -> Weights:
    """Give every process all weights, or a shard of them if the recipe says so.

    Raises:
        RecipeError: the task or the optimizer does not support shards.
    """
    if train.sharding == "none":
        return Replicas(accelerator, accelerator.prepare(prepared.model))
    if prepared.task.own_loop is not None:
        raise RecipeError(
            "train.sharding: train_model of an own task calls the model as it is, without shards: set "
            'train.sharding = "none"'
        )
    _check_optimizer(train, accelerator.device)
    inputs = send_to_device(prepared.task.example_inputs(prepared.training), accelerator.device)
    return shard_weights(prepared.model, inputs, average, accelerator)


def shard_weights(model: nn.Module, inputs: Any, average: Any, accelerator: Accelerator) -> Shards:
    """Shard the parameters of a model and of its moving average over all processes, in place, block by block.

    All processes start with the parameters and buffers of the first one. An optimizer must be built afterwards, since
    the parameters are new objects. Autocast is that of accelerate, so gates and moments keep their precision.

    Args:
        model: a model on its device.
        inputs: one input of it.
        average: the moving average of timm, or None; it cannot be called any more, only updated and gathered.
        accelerator: the accelerator of the run.
    """
    names = [choose_blocks(model, inputs)]
    distributed.broadcast_object_list(names, 0)
    share_tensors([*model.parameters(), *model.buffers()])
    parameters = {*model.parameters()}
    plain = copy.deepcopy(model, {id(parameter): _without_memory(parameter) for parameter in parameters})
    # A parameter without dimensions has no rows to distribute.
    replicated = {*gate_parameters(model).values()} | {parameter for parameter in parameters if not parameter.dim()}
    for parameter in parameters - replicated:
        parameter.data = parameter.data.contiguous()  # FSDP refuses other memory formats
    mesh = init_device_mesh(next(iter(parameters)).device.type, (distributed.get_world_size(),))
    for module in (*map(model.get_submodule, names[0]), model):
        # The root too: between two passes a process has its shards only.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    if average is not None:
        _replace_parameters(average.module, model, _shard_like)
        average.foreach = False  # it would update shards and whole tensors in one call
    # With evaluation_mode, accelerate adds autocast only.
    network = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    trainable = (parameter for parameter in model.parameters() if parameter in replicated and parameter.requires_grad)
    return Shards(network, tuple(trainable), plain)


def _check_optimizer(train: TrainTable, device: torch.device) -> None:
    """Take two steps with the optimizer of a recipe and sharded parameters of a small model."""
    trial = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Linear(64, 48)).to(device)
    fully_shard(trial, mesh=init_device_mesh(device.type, (distributed.get_world_size(),)))
    optimizer = build_optimizer(trial, train)
    try:
        for _ in range(2):
            for parameter in trial.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise RecipeError(
            f"train.optimizer = {train.optimizer!r}: does not support sharded parameters ({first_line(error)}): choose "
            'another, such as "adamw", or train.sharding = "none"'
        ) from error


def _replace_parameters(
    model: nn.Module, source: nn.Module, replacement: Callable[[nn.Parameter, nn.Parameter], nn.Parameter]
) -> None:
    """Replace each parameter by a function of it and of that in its place in `source`; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for own, other in zip(model.modules(), source.modules(), strict=True):
            for name, parameter in other._parameters.items():
                mine = own._parameters[name]
                if parameter is None or mine is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = replacement(mine, parameter)
                own._parameters[name] = made[id(parameter)]


def _gather(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)


def _shard_like(parameter: nn.Parameter, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_scatter(parameter.detach(), like), requires_grad=parameter.requires_grad)


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def _scatter(value: Any, like: Tensor) -> Any:
    """The shard of a tensor if `like` is sharded; tensors of another shape are whole in every process."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    return distribute_tensor(value.to(like.device), like.device_mesh, placements, src_data_rank=None)


# --- exchanges --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy tensors of the first process to all others, those of one type and device in one exchange."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        distributed.broadcast(flat, 0)
        _unflatten(flat, group)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over processes in one exchange; a missing one counts as zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        _unflatten(flat / distributed.get_world_size(), gradients)


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
