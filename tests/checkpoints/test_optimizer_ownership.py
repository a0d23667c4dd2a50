"""The network of an optimizer state, found by the number and shapes of parameters, not by position or name."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn, optim

import normswap
from normswap.checkpoints.content.optimizer_ownership import Network, OwnedNetworks, find_owner
from normswap.surgery.importance import trainable_gates


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Sequential(nn.Conv2d(before, after, 3), nn.BatchNorm2d(after))]
    return nn.Sequential(*layers)


def stepped(*groups: Any, kind: Any = optim.Adam, idle: bool = False) -> dict[str, Any]:
    """The state of an optimizer over these parameters, after a step unless it is idle."""
    parameters = [{"params": list(group)} for group in groups]
    optimizer = kind(parameters, lr=0.1)
    for group in optimizer.param_groups:
        for parameter in () if idle else group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


def described(name: str, model: nn.Module, *, converted: bool = True) -> Network:
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    gates = tuple(trainable_gates(normswap.convert(model).model)) if converted else ()
    return Network(name, shapes, gates)


G, D, TWIN, SMALL = net(3, 8, 4), net(3, 6, 6), net(3, 8, 4), net(3, 5)
M = nn.ModuleDict({"body": net(3, 8, 4)})
m = described("m", M)
g, d = described("g", G), described("d", D, converted=False)
d_too, twin = described("d", D), described("twin", TWIN)
twin_left = twin._replace(gates=())
pg, pd = list(G.parameters()), list(D.parameters())
decayed = [p for p in pg if p.ndim > 1], [p for p in pg if p.ndim == 1]

CASES: dict[str, tuple[Any, list[Network], Any]] = {
    "its own": (stepped(pg), [g, d], g.gates),
    "the other's, with as many parameters": (stepped(pd), [g, d], ()),
    "its own, listed last": (stepped(pg), [d, g], g.gates),
    "in two groups": (stepped(*decayed), [g, d], g.gates),
    "over both": (stepped([*pg, *pd]), [g, d], g.gates),
    "over both, both converted": (stepped([*pg, *pd]), [g, d_too], g.gates + d_too.gates),
    "of a copy converted alike": (stepped(pg), [g, twin], g.gates),
    "before the first step, by number": (
        stepped(list(net(3, 5).parameters()), idle=True),
        [g, described("s", net(3, 5))],
        2,
    ),
    "with names": (stepped(G[0].named_parameters(prefix="0")), [g, d], g.gates[:2]),
    "with names, before the first step": (optim.Adam(M.named_parameters()).state_dict(), [g, m], m.gates),
    "one part": (stepped(G[0].parameters()), [g, d], g.gates[:2]),
    "without a frozen part": (stepped([*G[0].parameters(), *G[1][1].parameters()]), [g], g.gates),
    "with a loss of its own": (stepped([*pg, nn.Parameter(torch.ones(7, 7))]), [g, d], g.gates),
}


@pytest.mark.parametrize(("state", "networks", "gates"), CASES.values(), ids=CASES)
def test_the_gates_of_the_networks_that_it_has(state: Any, networks: list[Network], gates: Any) -> None:
    owned = find_owner(state, networks)
    assert isinstance(owned, OwnedNetworks), owned
    assert len(owned.gates) == gates if isinstance(gates, int) else owned.gates == gates


LEFT: dict[str, tuple[Any, list[Network], bool, str]] = {
    "a twin that is not converted": (stepped(pg), [g, twin_left], True, "fit each of g, twin"),
    "no state and as many parameters": (
        stepped(pg, idle=True),
        [g, d],
        True,
        "its 8 parameters fit each",
    ),
    "another network": (
        stepped(net(3, 5, 5, 5).parameters()),
        [g, d],
        True,
        "fit no network in this file",
    ),
    "a part without the norms": (
        stepped([G[0][0].weight, G[1][0].weight]),
        [g, d],
        False,
        "it lacks parameters of some norms in g",
    ),
}


@pytest.mark.parametrize(("state", "networks", "alone", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_determined_is_left_with_a_reason(
    state: Any, networks: list[Network], alone: bool, reason: str
) -> None:
    found = find_owner(state, networks, is_only_optimizer=alone)
    assert isinstance(found, str)
    assert reason in found


def test_of_two_optimizers_the_one_with_the_norms_takes_the_gates() -> None:
    kernels, vectors = stepped(decayed[0]), stepped(decayed[1])
    assert isinstance(find_owner(kernels, [g, d], is_only_optimizer=False), str)
    owned = find_owner(vectors, [g, d], is_only_optimizer=False)
    assert isinstance(owned, OwnedNetworks)
    assert owned.gates == g.gates
