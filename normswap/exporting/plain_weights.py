"""The weights of a network whose sites all compute their old norms, for its original architecture."""

from torch import nn

from normswap.baking.compact_norm import CompactNorm
from normswap.errors import SwapError
from normswap.surgery.conversion import revert
from normswap.surgery.importance import sites_with_changed_weights
from normswap.surgery.module_tree import copy_model
from normswap.surgery.plan import list_names
from normswap.surgery.wrappers import unwrap
from normswap.text import pluralize


def original_network(model: nn.Module) -> nn.Module:
    """Return a copy of a network with the old norms.

    Raises:
        SwapError: a site computes something else than its old norm, or its old norm cannot be restored.
    """
    network = copy_model(unwrap(model))
    compact = [name for name, module in network.named_modules() if isinstance(module, CompactNorm)]
    changed = sites_with_changed_weights(network) + compact
    if changed:
        raise SwapError(
            f"no layer of torch computes {pluralize(len(changed), 'site')} whose importance weights differ from those "
            f"of the old norm ({list_names(changed)}), so their weights fit no network without normswap: use to='onnx' "
            "or to='pt2'"
        )
    return revert(network)
