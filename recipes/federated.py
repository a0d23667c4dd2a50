"""Federated training on one machine: clients train copies of a network, which are averaged after each round.

Every client has digits of its own appearance, and classes in its own proportions. With local norms, each client keeps
its norms, gates and statistics, and all other weights are averaged; the norm states of all clients are written to
`norm_sets.pt` in the folder of the run, and the network that is saved is that of the first client.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

import normswap
from normswap.finetune.data.digits import CLASSES, Shift, load_ink, render_target, split_indices

# What the digits of each client look like.
APPEARANCES = (
    Shift(),
    Shift(stroke=(0.0, 0.3), background=(0.7, 1.0)),
    Shift(contrast=(0.1, 0.3), noise=0.1, brightness=0.3),
    Shift(texture=0.25, texture_cells=10, contrast=(0.4, 1.0), noise=0.02),
)
# Of the Dirichlet distribution of each class over the clients: the smaller, the more the classes differ.
CONCENTRATION = 0.5

# The norm states of the clients of a trained network.
_NORM_SETS: WeakKeyDictionary[nn.Module, list[Mapping[str, Tensor]]] = WeakKeyDictionary()


def open_data(split: str, seed: int = 0) -> TensorDataset:
    """Return the images of all clients, their labels, and the number of the client of each."""
    ink, labels = load_ink()
    index = split_indices(len(labels), seed=seed)["target", split]
    ink, labels = ink[index], labels[index]
    clients = assign_clients(labels, split, seed=seed)
    pixels = torch.empty(len(labels), 3, 32, 32)
    for client, appearance in enumerate(APPEARANCES):
        own = clients == client
        draw = 10_000 * seed + 10 * client + len(split)
        pixels[own] = render_target(ink[own], seed=draw, shift=appearance)
    return TensorDataset(pixels, labels, clients)


def assign_clients(labels: Tensor, split: str, *, seed: int) -> Tensor:
    """Return the client of each image; the proportions of the classes of a client are the same in each split."""
    shares = torch.distributions.Dirichlet(torch.full((CLASSES, len(APPEARANCES)), CONCENTRATION))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        of_classes = shares.sample()
        torch.manual_seed(1000 * seed + len(split))
        return torch.multinomial(of_classes[labels], 1).flatten()


def compute_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def build_metrics() -> dict[str, Metric]:
    """Return the mean accuracy over the clients, and the accuracy of each."""
    # The macro average over classes, where the class is the client, and a wrong answer is the next client.
    mean = MulticlassAccuracy(len(APPEARANCES), average="macro")
    each = {f"client {client}": MeanMetric() for client in range(len(APPEARANCES))}
    return {"mean accuracy of clients": mean, **each}


def update_metrics(metrics: Mapping[str, Metric], model: nn.Module, batch: Sequence[Tensor]) -> None:
    """Let the network of each client classify its images."""
    images, labels, clients = batch
    norm_sets = _NORM_SETS.get(model)
    for client in clients.unique().tolist():
        own = clients == client
        if norm_sets is not None:
            normswap.load_norm_state(model, norm_sets[client])
        right = model(images[own]).argmax(1) == labels[own]
        answers = torch.where(right, client, (client + 1) % len(APPEARANCES))
        metrics["mean accuracy of clients"].update(answers, clients[own])
        metrics[f"client {client}"].update(right.float())
    if norm_sets is not None:
        normswap.load_norm_state(model, norm_sets[0])


def train_model(model: nn.Module, run: Any) -> None:
    """Train copies of the network on the images of their clients, and average them after each of `epochs` rounds."""
    options, rounds = {"norms": "local", "seed": 0, **run.options}, run.recipe.train.epochs
    data = client_data(open_data(run.recipe.data.train_split, options["seed"]), run.device)
    networks = [copy.deepcopy(model) for _ in data]
    optimizers = [run.build_optimizer(network) for network in networks]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    weights = torch.tensor([float(len(labels)) for _, labels in data])
    weights /= weights.sum()
    for number in range(rounds):
        losses = []
        for network, optimizer, own_rates, own_data in zip(networks, optimizers, rates, data, strict=True):
            for group, rate in zip(optimizer.param_groups, own_rates, strict=True):
                group["lr"] = rate * (1 - number / rounds)
            losses.append(train_client(network.train(), optimizer, own_data, run.recipe, number))
        for network, state in zip(networks, average_clients(networks, data, weights, options["norms"]), strict=True):
            network.load_state_dict(state)
        run.log({"step": number + 1, "mean loss": float(torch.tensor(losses).mean())})
    model.load_state_dict(networks[0].state_dict())
    norm_sets = [normswap.norm_state(network) for network in networks]
    _NORM_SETS[model] = [*norm_sets]
    torch.save(norm_sets, run.recipe.output / "norm_sets.pt")


ClientData = tuple[Tensor, Tensor]


def client_data(data: TensorDataset, device: Any) -> list[ClientData]:
    """Return images and labels of each client."""
    images, labels, clients = (tensor.to(device) for tensor in data.tensors)
    return [(images[clients == client], labels[clients == client]) for client in range(len(APPEARANCES))]


def train_client(
    network: nn.Module, optimizer: torch.optim.Optimizer, data: ClientData, recipe: Any, number: int
) -> float:
    """Train one epoch on the images of a client, in a random order; return the mean loss."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(1000 * recipe.train.seed + number))
    losses = []
    for index in order.split(recipe.data.batch_size):
        optimizer.zero_grad()
        loss = compute_loss(network, [tensor[index] for tensor in data])
        loss.backward()
        if recipe.train.clip:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.train.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / max(len(losses), 1)


def average_clients(
    networks: Sequence[nn.Module], data: Sequence[ClientData], weights: Tensor, norms: str
) -> list[Mapping[str, Tensor]]:
    """Return the next state dict of each client."""
    if norms == "local":
        shared, local = zip(*(normswap.split_state(network) for network in networks), strict=True)
        averaged = average_states(shared, weights)
        return [{**averaged, **own} for own in local]
    averaged = average_states([network.state_dict() for network in networks], weights)
    if norms == "pooled":
        # Statistics of the same network on the data of each client, and from these those of all data.
        for network in networks:
            network.load_state_dict(averaged)
        counts = [normswap.calibrate(network, own[0].split(64)) for network, own in zip(networks, data, strict=True)]
        states = [normswap.norm_state(network) for network in networks]
        averaged |= normswap.pool_statistics(networks[0], states, counts)
    return [averaged for _ in networks]


def average_states(states: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor; counters are those of the first state."""
    return {
        key: sum(weight * state[key] for weight, state in zip(weights.to(value), states, strict=True))  # type: ignore[misc]
        if value.is_floating_point()
        else value
        for key, value in states[0].items()
    }
