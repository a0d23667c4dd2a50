"""The network of an optimizer state in a file, and the gates that the optimizer must train.

The state dict of an optimizer numbers its parameters and does not name them. So the number of parameters and the shapes
in their state are compared with every network in the file, with several networks together and with submodules of one.
If nothing fits, or networks fit of which only some are converted, `find_owner` returns the reason instead.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, permutations
from typing import Any, NamedTuple

from normswap.checkpoints.content.key_prefixes import match_names
from normswap.checkpoints.content.optimizer_state import (
    StateDict,
    check_groups,
    has_gates,
    non_gate_groups,
    parameter_shape,
    with_additional_gates,
    with_gates,
)

Shape = tuple[int, ...]

# All combinations of so many networks are tried; of more, only single networks.
_MAX_NETWORKS = 6
_AFFINE_NAMES = ("weight", "bias")
_MANUAL_HINT = "add the gates with normswap.with_gates, or start with a new optimizer state"


class Network(NamedTuple):
    """The parameters of a network in a file.

    Attributes:
        name: the name of the network in notes.
        parameters: name -> shape, in their order.
        gates: the names of the gates that this conversion adds.
        num_existing_gates: the number of gates that it has from earlier conversions.
        certain: whether all `parameters` are parameters; without a model, some of them may be buffers.
    """

    name: str
    parameters: Mapping[str, Shape]
    gates: tuple[str, ...] = ()
    num_existing_gates: int = 0
    certain: bool = True

    def sizes(self) -> range:
        """Return the possible numbers of parameters."""
        num_certain = len(self.parameters) if self.certain else sum(map(_is_affine_name, self.parameters))
        return range(num_certain, len(self.parameters) + 1)


class OwnedNetworks(NamedTuple):
    """The networks of an optimizer, in its order, and the gates that it must train in addition."""

    networks: tuple[Network, ...]
    gates: tuple[str, ...]

    @property
    def names(self) -> str:
        """The names of the networks, for notes."""
        return " and ".join(network.name for network in self.networks)

    @property
    def gate_offset(self) -> int:
        """The number of gates from earlier conversions in front of the new ones."""
        first = next((i for i, network in enumerate(self.networks) if network.gates), 0)
        return sum(network.num_existing_gates for network in self.networks[:first])


def find_owner(
    optimizer_state: StateDict, networks: Sequence[Network], *, is_only_optimizer: bool = True
) -> OwnedNetworks | str:
    """Return the networks of an optimizer, or the reason why they cannot be determined.

    Args:
        optimizer_state: the state dict of the optimizer; its group of gates is ignored.
        networks: all networks in the file; copies of one network count as one.
        is_only_optimizer: whether the file has no other optimizer.
    """
    groups = non_gate_groups(optimizer_state)
    named = _match_by_names(groups, networks)
    if named is not None:
        return named
    shapes = [parameter_shape(optimizer_state["state"].get(key)) for group in groups for key in group["params"]]
    for candidates in (
        _iter_whole_networks(networks),
        _iter_combinations(networks),
        _iter_submodules(networks) if all(shapes) else (),
    ):
        found = [each for each in candidates if _matches_shapes(shapes, each)]
        if len(found) > 1:
            found = [each for each in found if _matches_order(shapes, each)] or found
        if found:
            return _require_one(found, len(shapes))
    return _find_partial_owner(shapes, networks, is_only_optimizer=is_only_optimizer)


def add_owned_gates(
    optimizer_state: StateDict, networks: Sequence[Network], *, is_only_optimizer: bool = True
) -> tuple[dict[str, Any] | None, str]:
    """Return an optimizer state with the gates of its networks, or None if it stays unchanged, and a note.

    Args:
        optimizer_state, networks, is_only_optimizer: as for `find_owner`.

    Raises:
        CheckpointError: the state dict is damaged.
    """
    check_groups(optimizer_state)
    owned = find_owner(optimizer_state, networks, is_only_optimizer=is_only_optimizer)
    if not isinstance(owned, OwnedNetworks):
        return None, owned
    if not owned.gates:
        is_part = {network.name for network in owned.networks} & {network.name for network in networks if network.gates}
        relation = "has no parameter of a converted norm in" if is_part else "belongs to"
        return None, f"it {relation} {owned.names}"
    if has_gates(optimizer_state):
        owned = reorder_networks(optimizer_state, owned)
        extended = with_additional_gates(optimizer_state, gates=owned.gates, gate_offset=owned.gate_offset)
        return extended, f"{len(owned.gates)} gates added to its group of gates"
    return with_gates(optimizer_state, gates=owned.gates), f"{len(owned.gates)} gates appended as a last group"


class _Candidate(NamedTuple):
    networks: tuple[Network, ...]
    shapes: list[Shape]
    sizes: range
    gates: tuple[str, ...]

    def to_owned_networks(self) -> OwnedNetworks:
        """Return the networks with their gates."""
        return OwnedNetworks(self.networks, self.gates)


def _combine(*networks: Network) -> _Candidate:
    shapes = [shape for network in networks for shape in network.parameters.values()]
    sizes = range(sum(n.sizes().start for n in networks), len(shapes) + 1)
    return _Candidate(networks, shapes, sizes, tuple(gate for network in networks for gate in network.gates))


def _iter_whole_networks(networks: Sequence[Network]) -> Iterator[_Candidate]:
    return map(_combine, networks)


def _iter_combinations(networks: Sequence[Network]) -> Iterator[_Candidate]:
    if len(networks) > _MAX_NETWORKS:
        return
    sizes = range(2, len(networks) + 1)
    for chosen in chain.from_iterable(combinations(networks, size) for size in sizes):
        yield _combine(*chosen)


def _iter_submodules(networks: Sequence[Network]) -> Iterator[_Candidate]:
    """Every submodule of a network with parameters; each set of parameters once."""
    for network in networks:
        seen: set[tuple[str, ...]] = set()
        modules = {name[:end] for name in network.parameters for end in _dot_positions(name)}
        for module in sorted(modules):
            names = tuple(name for name in network.parameters if name.startswith(f"{module}."))
            if names in seen or len(names) == len(network.parameters):
                continue
            seen.add(names)
            yield _restrict_to(network, names)


def _dot_positions(name: str) -> Iterator[int]:
    return (index for index, letter in enumerate(name) if letter == ".")


def _restrict_to(network: Network, names: Sequence[str]) -> _Candidate:
    subset = {name: network.parameters[name] for name in names}
    gates = tuple(gate for gate in network.gates if _belongs_to(gate, subset, network.parameters))
    part = network._replace(parameters=subset, gates=gates)
    return _Candidate((part,), list(subset.values()), part.sizes(), gates)


def _belongs_to(gate: str, names: Mapping[str, Shape], all_parameters: Mapping[str, Shape]) -> bool:
    """Whether `names` has a parameter of the gate's norm or, if the norm has none, of the module that calls it."""
    site = gate.rpartition(".")[0]
    affine_names = [name for name in (f"{site}.{last}" for last in _AFFINE_NAMES) if name in all_parameters]
    if affine_names:
        return any(name in names for name in affine_names)
    owner = site.rpartition(".")[0]
    return any(name.startswith(f"{owner}.") if owner else True for name in names)


def _matches_shapes(shapes: Sequence[Shape | None], candidate: _Candidate) -> bool:
    known = Counter(shape for shape in shapes if shape is not None)
    return len(shapes) in candidate.sizes and known <= Counter(candidate.shapes)


def _matches_order(shapes: Sequence[Shape | None], candidate: _Candidate) -> bool:
    return len(shapes) == len(candidate.shapes) and all(
        known in (None, shape) for known, shape in zip(shapes, candidate.shapes, strict=True)
    )


def _require_one(found: Sequence[_Candidate], count: int) -> OwnedNetworks | str:
    """The network that fits; of several, the first if all have equally many gates."""
    first = found[0]
    if len(found) > 1 and len({len(each.gates) for each in found}) > 1:
        names = ", ".join(dict.fromkeys(each.to_owned_networks().names for each in found))
        return f"its {count} parameters fit each of {names}: {_MANUAL_HINT}"
    return first.to_owned_networks()


def reorder_networks(optimizer_state: StateDict, owned: OwnedNetworks) -> OwnedNetworks:
    """Return the networks of an optimizer in the order of its parameters, if their shapes show it."""
    groups = non_gate_groups(optimizer_state)
    shapes = [parameter_shape(optimizer_state["state"].get(key)) for group in groups for key in group["params"]]
    orders = permutations(owned.networks) if len(owned.networks) <= _MAX_NETWORKS else iter([owned.networks])
    fitting = [order for order in orders if _matches_order(shapes, _combine(*order))]
    return _combine(*fitting[0]).to_owned_networks() if fitting and len(owned.networks) > 1 else owned


def _find_partial_owner(
    shapes: Sequence[Shape | None], networks: Sequence[Network], *, is_only_optimizer: bool
) -> OwnedNetworks | str:
    """The network if the optimizer has only some of its parameters, or all of them and others."""
    known = Counter(shape for shape in shapes if shape is not None)
    unknown = len(shapes) - known.total()
    subset = [n for n in networks if len(shapes) < len(n.parameters) and known <= Counter(n.parameters.values())]
    supersets = [
        n for n in networks if known and _count_missing(n, known) <= unknown and len(shapes) > len(n.parameters)
    ]
    found = subset or supersets
    if not found or len({len(network.gates) for network in found}) > 1:
        return f"its {len(shapes)} parameters fit no network in this file: {_MANUAL_HINT}"
    network = found[0]
    if network in subset and network.gates and not is_only_optimizer and not _has_norms(network, known):
        return f"it lacks parameters of some norms in {network.name}: {_MANUAL_HINT}"
    return OwnedNetworks((network,), network.gates)


def _count_missing(network: Network, known: Counter[Shape]) -> int:
    wanted = Counter(shape for name, shape in network.parameters.items() if network.certain or _is_affine_name(name))
    return (wanted - known).total()


def _has_norms(network: Network, known: Counter[Shape]) -> bool:
    sites = dict.fromkeys(gate.rpartition(".")[0] for gate in network.gates)
    norms = (network.parameters.get(f"{site}.{last}") for site in sites for last in _AFFINE_NAMES)
    return Counter(shape for shape in norms if shape is not None) <= known


def _match_by_names(groups: Sequence[Mapping[str, Any]], networks: Sequence[Network]) -> OwnedNetworks | None:
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    if not names or not all(isinstance(name, str) for name in names):
        return None
    found = []
    for network in networks:
        own = match_names(names, network.parameters).stored
        if own.keys() <= network.parameters.keys() and len(own) == len(names):
            found.append(_restrict_to(network, list(own)).to_owned_networks())
    exact = [each for each in found if set(names) <= each.networks[0].parameters.keys()]
    # If two networks have the same names, the shapes decide.
    return next((each[0] for each in (exact, found) if len(each) == 1), None)


def _is_affine_name(name: str) -> bool:
    return name.rpartition(".")[2] in _AFFINE_NAMES
