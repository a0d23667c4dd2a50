"""Swap Batch Normalization for Switchable Normalization in trained PyTorch models, without changing their function.

Names are loaded when first used: importing normswap costs nothing and imports neither torch nor timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normswap import renamed

if TYPE_CHECKING:
    from normswap.checkpoints.file_conversion import FileConversion as FileConversion
    from normswap.checkpoints.file_conversion import convert_file as convert_file
    from normswap.checkpoints.loading import Loaded as Loaded
    from normswap.checkpoints.loading import load as load
    from normswap.checkpoints.saving import save as save
    from normswap.errors import NormswapError as NormswapError
    from normswap.finetune.recipe import Recipe as Recipe
    from normswap.finetune.recipe import read_recipe as read_recipe
    from normswap.finetune.trainer import Outcome as Outcome
    from normswap.finetune.trainer import run_recipe as run_recipe
    from normswap.layers.backends.selection import use_backend as use_backend
    from normswap.layers.functional import switch_norm as switch_norm
    from normswap.layers.switch_norm import SwitchNorm1d as SwitchNorm1d
    from normswap.layers.switch_norm import SwitchNorm2d as SwitchNorm2d
    from normswap.layers.switch_norm import SwitchNorm3d as SwitchNorm3d
    from normswap.layers.switch_norm import SwitchNormAct as SwitchNormAct
    from normswap.running_stats.calibration import Calibration as Calibration
    from normswap.running_stats.calibration import calibrate as calibrate
    from normswap.running_stats.control import freeze_statistics as freeze_statistics
    from normswap.running_stats.control import set_bn_statistics as set_bn_statistics
    from normswap.running_stats.control import synchronize_statistics as synchronize_statistics
    from normswap.running_stats.control import unfreeze_statistics as unfreeze_statistics
    from normswap.running_stats.control import update_statistics as update_statistics
    from normswap.surgery.conversion import Conversion as Conversion
    from normswap.surgery.conversion import apply_plan as apply_plan
    from normswap.surgery.conversion import convert as convert
    from normswap.surgery.conversion import revert as revert
    from normswap.surgery.discovery.sites import NormSite as NormSite
    from normswap.surgery.discovery.sites import find_norm_sites as find_norm_sites
    from normswap.surgery.importance import batch_dependence as batch_dependence
    from normswap.surgery.importance import importance_weights as importance_weights
    from normswap.surgery.norms.classes import KNOWN_NORMS as KNOWN_NORMS
    from normswap.surgery.norms.classes import read_batch_norm as read_batch_norm
    from normswap.surgery.norms.classes import read_group_norm as read_group_norm
    from normswap.surgery.norms.classes import read_instance_norm as read_instance_norm
    from normswap.surgery.norms.classes import read_norm_act as read_norm_act
    from normswap.surgery.plan import SwapPlan as SwapPlan
    from normswap.surgery.planning import plan_swaps as plan_swaps
    from normswap.surgery.selection import SwapOptions as SwapOptions
    from normswap.training.importance_watch import ImportanceWatch as ImportanceWatch
    from normswap.training.importance_watch import watch_importance as watch_importance
    from normswap.training.live_conversion import TrainingConversion as TrainingConversion
    from normswap.training.live_conversion import convert_training as convert_training
    from normswap.training.param_groups import exempt_gates as exempt_gates
    from normswap.training.param_groups import param_groups as param_groups
    from normswap.verification.equivalence import Verification as Verification
    from normswap.verification.equivalence import verify as verify

_HOMES = {
    "Calibration": "normswap.running_stats.calibration",
    "calibrate": "normswap.running_stats.calibration",
    "FileConversion": "normswap.checkpoints.file_conversion",
    "convert_file": "normswap.checkpoints.file_conversion",
    "Loaded": "normswap.checkpoints.loading",
    "load": "normswap.checkpoints.loading",
    "save": "normswap.checkpoints.saving",
    "NormswapError": "normswap.errors",
    "batch_dependence": "normswap.surgery.importance",
    "TrainingConversion": "normswap.training.live_conversion",
    "convert_training": "normswap.training.live_conversion",
    "param_groups": "normswap.training.param_groups",
    "Outcome": "normswap.finetune.trainer",
    "run_recipe": "normswap.finetune.trainer",
    "Recipe": "normswap.finetune.recipe",
    "read_recipe": "normswap.finetune.recipe",
    "ImportanceWatch": "normswap.training.importance_watch",
    "watch_importance": "normswap.training.importance_watch",
    "exempt_gates": "normswap.training.param_groups",
    "use_backend": "normswap.layers.backends.selection",
    "switch_norm": "normswap.layers.functional",
    "SwitchNorm1d": "normswap.layers.switch_norm",
    "SwitchNorm2d": "normswap.layers.switch_norm",
    "SwitchNorm3d": "normswap.layers.switch_norm",
    "SwitchNormAct": "normswap.layers.switch_norm",
    "freeze_statistics": "normswap.running_stats.control",
    "synchronize_statistics": "normswap.running_stats.control",
    "set_bn_statistics": "normswap.running_stats.control",
    "unfreeze_statistics": "normswap.running_stats.control",
    "update_statistics": "normswap.running_stats.control",
    "Conversion": "normswap.surgery.conversion",
    "apply_plan": "normswap.surgery.conversion",
    "convert": "normswap.surgery.conversion",
    "revert": "normswap.surgery.conversion",
    "importance_weights": "normswap.surgery.importance",
    "KNOWN_NORMS": "normswap.surgery.norms.classes",
    "read_batch_norm": "normswap.surgery.norms.classes",
    "read_group_norm": "normswap.surgery.norms.classes",
    "read_instance_norm": "normswap.surgery.norms.classes",
    "read_norm_act": "normswap.surgery.norms.classes",
    "SwapPlan": "normswap.surgery.plan",
    "NormSite": "normswap.surgery.discovery.sites",
    "plan_swaps": "normswap.surgery.planning",
    "SwapOptions": "normswap.surgery.selection",
    "find_norm_sites": "normswap.surgery.discovery.sites",
    "Verification": "normswap.verification.equivalence",
    "verify": "normswap.verification.equivalence",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)

renamed.install()


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
