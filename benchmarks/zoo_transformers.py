"""The transformers architectures that hold batch norms, randomly initialised from their configurations.

Found by building every class of the auto mappings on `meta` and by reading the modeling files for norms that only an
option brings in. Transformer stacks are cut to two layers; what else is cut stands in the row.
"""

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import transformers
from torch import nn
from zoo_catalog import Entry
from zoo_transformers_parts import Row
from zoo_transformers_rows import ROWS

SAMPLE: tuple[str, ...] = ()

_DEPTH_NAMES = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "speech_encoder_layers",
    "num_attention_layers",
)
# A stack that counts its layers otherwise, or whose layers are named in other options, is cut in its row.


def entries() -> Iterator[Entry]:
    """Return every model of every row; a family is a modeling file."""
    for row in ROWS:
        for name in row.models.split():
            cls = getattr(transformers, name)
            yield Entry(
                zoo="transformers",
                name=f"{name} ({row.variant})" if row.variant else name,
                family=cls.__module__.split(".")[2],
                build=partial(_build, name, row),
                inputs=row.inputs,
                reduced=_reduction(row),
            )


def _build(name: str, row: Row) -> nn.Module:
    config = configuration(row)
    model = getattr(transformers, name)._from_config(config)
    return row.view(model) if row.view else model


def configuration(row: Row) -> Any:
    """Return the configuration of a row with its options, those of the configurations inside it, and the depth."""
    config = getattr(transformers, row.config)(**row.options)
    if row.depth is not None:
        _cut_depth(config, row.depth, set())
    for path, value in row.nested.items():
        *owners, name = path.split(".")
        setattr(reduce(getattr, owners, config), name, value)
    return config


def _cut_depth(config: Any, depth: int, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    for name in _DEPTH_NAMES:
        value = vars(config).get(name)
        if isinstance(value, int) and value > depth:
            setattr(config, name, depth)
            for listed in ("layer_types", "mlp_layer_types"):
                if isinstance(vars(config).get(listed), list):
                    setattr(config, listed, vars(config)[listed][:depth])
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            _cut_depth(value, depth, seen)


def _reduction(row: Row) -> str:
    parts = [f"stacks of {row.depth} layers"] if row.depth is not None else []
    return "; ".join([*parts, *(f"{name}={value!r}" for name, value in (row.options | row.nested).items())])
