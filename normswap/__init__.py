"""Swap Batch Normalization for Switchable Normalization in trained PyTorch models, without changing their function.

Names are loaded when first used: importing normswap costs nothing and imports neither torch nor timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.calibration import Calibration as Calibration
    from normswap.calibration import calibrate as calibrate
    from normswap.checkpoints.checkpoint import Loaded as Loaded
    from normswap.checkpoints.checkpoint import load as load
    from normswap.checkpoints.saving import save as save
    from normswap.errors import NormswapError as NormswapError
    from normswap.finetune.batch_price import batch_dependence as batch_dependence
    from normswap.finetune.engine import Outcome as Outcome
    from normswap.finetune.engine import run_recipe as run_recipe
    from normswap.finetune.live_training import TrainingConversion as TrainingConversion
    from normswap.finetune.live_training import convert_training as convert_training
    from normswap.finetune.param_groups import param_groups as param_groups
    from normswap.finetune.recipe import Recipe as Recipe
    from normswap.finetune.recipe import read_recipe as read_recipe
    from normswap.finetune.watching import ImportanceWatch as ImportanceWatch
    from normswap.finetune.watching import watch_importance as watch_importance
    from normswap.finetune.weight_decay import exempt_gates as exempt_gates
    from normswap.layers.dispatch import use_backend as use_backend
    from normswap.layers.functional import switch_norm as switch_norm
    from normswap.layers.modules import SwitchNorm1d as SwitchNorm1d
    from normswap.layers.modules import SwitchNorm2d as SwitchNorm2d
    from normswap.layers.modules import SwitchNorm3d as SwitchNorm3d
    from normswap.layers.modules import SwitchNormAct as SwitchNormAct
    from normswap.statistics import freeze_statistics as freeze_statistics
    from normswap.statistics import set_bn_statistics as set_bn_statistics
    from normswap.statistics import synchronize_statistics as synchronize_statistics
    from normswap.statistics import unfreeze_statistics as unfreeze_statistics
    from normswap.statistics import update_statistics as update_statistics
    from normswap.surgery.conversion import Conversion as Conversion
    from normswap.surgery.conversion import apply_plan as apply_plan
    from normswap.surgery.conversion import convert as convert
    from normswap.surgery.conversion import revert as revert
    from normswap.surgery.gated import importance_weights as importance_weights
    from normswap.surgery.norm_site import NormSite as NormSite
    from normswap.surgery.norms import KNOWN_NORMS as KNOWN_NORMS
    from normswap.surgery.norms import read_batch_norm as read_batch_norm
    from normswap.surgery.norms import read_group_norm as read_group_norm
    from normswap.surgery.norms import read_instance_norm as read_instance_norm
    from normswap.surgery.norms import read_norm_act as read_norm_act
    from normswap.surgery.plan import SwapPlan as SwapPlan
    from normswap.surgery.planning import plan_swaps as plan_swaps
    from normswap.surgery.sites import find_norm_sites as find_norm_sites
    from normswap.verification import Verification as Verification
    from normswap.verification import verify as verify

_HOMES = {
    "Calibration": "normswap.calibration",
    "calibrate": "normswap.calibration",
    "Loaded": "normswap.checkpoints.checkpoint",
    "load": "normswap.checkpoints.checkpoint",
    "save": "normswap.checkpoints.saving",
    "NormswapError": "normswap.errors",
    "batch_dependence": "normswap.finetune.batch_price",
    "TrainingConversion": "normswap.finetune.live_training",
    "convert_training": "normswap.finetune.live_training",
    "param_groups": "normswap.finetune.param_groups",
    "Outcome": "normswap.finetune.engine",
    "run_recipe": "normswap.finetune.engine",
    "Recipe": "normswap.finetune.recipe",
    "read_recipe": "normswap.finetune.recipe",
    "ImportanceWatch": "normswap.finetune.watching",
    "watch_importance": "normswap.finetune.watching",
    "exempt_gates": "normswap.finetune.weight_decay",
    "use_backend": "normswap.layers.dispatch",
    "switch_norm": "normswap.layers.functional",
    "SwitchNorm1d": "normswap.layers.modules",
    "SwitchNorm2d": "normswap.layers.modules",
    "SwitchNorm3d": "normswap.layers.modules",
    "SwitchNormAct": "normswap.layers.modules",
    "freeze_statistics": "normswap.statistics",
    "synchronize_statistics": "normswap.statistics",
    "set_bn_statistics": "normswap.statistics",
    "unfreeze_statistics": "normswap.statistics",
    "update_statistics": "normswap.statistics",
    "Conversion": "normswap.surgery.conversion",
    "apply_plan": "normswap.surgery.conversion",
    "convert": "normswap.surgery.conversion",
    "revert": "normswap.surgery.conversion",
    "importance_weights": "normswap.surgery.gated",
    "KNOWN_NORMS": "normswap.surgery.norms",
    "read_batch_norm": "normswap.surgery.norms",
    "read_group_norm": "normswap.surgery.norms",
    "read_instance_norm": "normswap.surgery.norms",
    "read_norm_act": "normswap.surgery.norms",
    "SwapPlan": "normswap.surgery.plan",
    "NormSite": "normswap.surgery.norm_site",
    "plan_swaps": "normswap.surgery.planning",
    "find_norm_sites": "normswap.surgery.sites",
    "Verification": "normswap.verification",
    "verify": "normswap.verification",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
