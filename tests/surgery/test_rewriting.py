"""A rewritten module is still itself: class, mode, methods, copies, pickles - with SN where it called batch_norm."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.errors import SwapError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.surgery.graphs.module_trace import trace_module_forward
from normswap.surgery.graphs.rewriting import compile_rewritten_forward, is_rewritten, rewrite_forward, unused_names


class Block(nn.Module):
    """Calls batch_norm itself, twice, does something else in training, and drops out functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8) / 4)
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.calls = "mine"

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.scale, self.shift, self.training, 0.2, 1e-3)
        if self.training:
            x = x * 1.5
        x = torch.batch_norm(x, None, None, self.mean, self.var, False, 0.1, 1e-5, False)
        return F.dropout(x.relu(), 0.4, self.training)

    def answer(self) -> int:
        return 42


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def run(module: nn.Module, *, training: bool) -> Tensor:
    torch.manual_seed(7)
    return module.train(training)(X)


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def converted(block: Block) -> nn.Module:
    return normswap.convert(block, X, bn_statistics="batch").model


def test_both_calls_become_sites_with_gates_of_their_own(block: Block, converted: nn.Module) -> None:
    assert is_rewritten(converted)
    assert not is_rewritten(block)
    assert [n for n, m in converted.named_modules() if isinstance(m, FunctionalSwitchNorm)] == [
        "batch_norm",
        "batch_norm_1",
    ]
    new = converted.state_dict().keys() - block.state_dict().keys()
    assert new == {
        f"{site}.{name}"
        for site in ("batch_norm", "batch_norm_1")
        for name in ("mean_weight", "var_weight", *MATCHING_BUFFERS)
    }


def test_it_remains_an_instance_of_its_class_with_methods_and_attributes(converted: nn.Module) -> None:
    assert isinstance(converted, Block)
    assert type(converted).__name__ == "Block"
    assert (converted.answer(), converted.calls) == (42, "mine")


@pytest.mark.parametrize("training", [True, False])
def test_it_obeys_train_and_eval(block: Block, converted: nn.Module, training: bool) -> None:
    torch.testing.assert_close(run(converted, training=training), run(block, training=training))
    torch.testing.assert_close(converted.mean, block.mean)
    torch.testing.assert_close(converted.var, block.var)


def test_it_obeys_a_flag_that_is_set_directly(block: Block, converted: nn.Module) -> None:
    for module in (block, converted):
        module.train()
        module.training = False
    torch.testing.assert_close(converted(X), block(X))
    assert torch.equal(converted(X), converted(X))  # no dropout


def test_the_gates_are_in_the_path(converted: nn.Module) -> None:
    before = run(converted, training=False)
    converted.batch_norm.mean_weight.data = torch.tensor([1.0, 0.0, 0.0])
    assert not torch.allclose(run(converted, training=False), before)
    run(converted, training=True).sum().backward()
    assert all(gate.grad is not None for gate in converted.batch_norm.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("training", [True, False])
def test_copies_are_rewritten_too_and_independent(converted: nn.Module, copied, training: bool) -> None:  # type: ignore[no-untyped-def]
    twin = copied(converted)
    assert is_rewritten(twin)
    assert torch.equal(run(twin, training=training), run(converted, training=training))
    twin.batch_norm.var_weight.data.fill_(1 / 3)
    assert converted.batch_norm.var_weight[0] == 0


def test_torch_save_and_load_give_the_same_bits(converted: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(run(twin, training=False), run(converted, training=False))


def test_strict_state_dicts(converted: nn.Module) -> None:
    other = normswap.convert(Block(), X, bn_statistics="batch").model
    other.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(run(other, training=False), run(converted, training=False))


def test_restoring_gives_the_very_class_forward_and_keys(block: Block, converted: nn.Module) -> None:
    attributes = vars(block).keys()
    assert normswap.revert(converted) is converted
    assert type(converted) is Block
    assert vars(converted).keys() == attributes
    assert converted.state_dict().keys() == block.state_dict().keys()
    assert torch.equal(run(converted, training=False), run(block, training=False))


def test_one_of_two_calls_can_be_left(block: Block) -> None:
    conversion = normswap.convert(block, X, include=["batch_norm_1"], bn_statistics="batch")
    assert [swap.fqn for swap in conversion.plan.swaps] == ["batch_norm_1"]
    assert "batch_norm.mean_weight" not in conversion.model.state_dict()
    torch.testing.assert_close(run(conversion.model, training=True), run(block, training=True))


def test_in_place_the_module_object_stays(block: Block) -> None:
    holders = [block]
    scale = block.scale
    normswap.convert(block, X, inplace=True)
    assert is_rewritten(holders[0])
    assert block.scale is scale


def test_names_avoid_what_the_module_has(block: Block) -> None:
    block.batch_norm = "taken"
    assert unused_names(block, 2) == ["batch_norm_1", "batch_norm_2"]
    assert "batch_norm_1.mean_weight" in normswap.convert(block, X).model.state_dict()


def test_hooks_stay(block: Block) -> None:
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    normswap.convert(block, X, inplace=True)
    seen.clear()
    block.eval()(X)
    assert seen == [(4, 8, 7, 7)]


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_refused_in_words() -> None:
    with pytest.raises(SwapError, match="the forward of Untraceable cannot be rewritten: TraceError"):
        compile_rewritten_forward(Untraceable())
    module = Untraceable()
    with pytest.raises(SwapError, match="the forward of Untraceable cannot be rewritten"):
        rewrite_forward(module, {}, (), trace_module_forward(module))
    assert type(module) is Untraceable


def test_generated_lines_show_in_tracebacks(converted: nn.Module) -> None:
    with pytest.raises(RuntimeError) as caught:
        converted(torch.randn(1, 5, 9, 9))
    assert any("<normswap: forward of Block" in str(entry.path) for entry in caught.traceback)
