"""A limit on what building a model may allocate, in proportion to the file that is to fill it.

A name of a few bytes can describe a network that no machine holds (`num_classes=1000000`, a thousand layers). Every
operation of torch that returns new memory is looked at before it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import ArchitectureError

# Types that are wider than in the file, buffers that no file has, and what initialising a layer needs for a moment.
_BYTES_PER_BYTE, _LEAST_BYTES = 16, 2**30
_CALLS_PER_TENSOR, _LEAST_CALLS = 16, 1_000


@contextmanager
def limited_build(path: Path, tensors: int) -> Iterator[None]:
    """Refuse to allocate far more in this block than the file at `path`, with so many tensors, can fill.

    Raises:
        ArchitectureError: the limit is reached.
    """
    files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    with _Limit(size * _BYTES_PER_BYTE + _LEAST_BYTES, tensors * _CALLS_PER_TENSOR + _LEAST_CALLS):
        yield


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, size: int, calls: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = self._left = size
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if not func.is_view and not func._schema.is_mutable:
            self._calls -= 1
            self._left -= _bytes_of_result(func, args, options)
            if self._left < 0 or self._calls < 0:
                raise ArchitectureError(
                    f"building it needs more than {self._size / 1e6:,.0f} MB or thousands of tensors more than the "
                    "file has: the architecture is not the one of this file"
                )
        return func(*args, **options)


def _bytes_of_result(func: Any, args: Any, options: dict[str, Any]) -> int:
    """The bytes that a call allocates, found without allocating them; none where only running it would tell."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        options = {**options, "device": "meta"}
    try:
        with torch.no_grad():
            result = func(*tree_map(_without_values, args), **tree_map(_without_values, options))
    except Exception:  # noqa: BLE001 - not every operation works without values
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
