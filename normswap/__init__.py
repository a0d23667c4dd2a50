"""Swap Batch Normalization for Switchable Normalization in trained PyTorch models, without changing their function.

Names are imported when they are first used: `import normswap` imports neither torch nor timm.
"""

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from normswap import renamed

# The public names twice: here for type checkers and editors, below for Python. A test compares the two.
if TYPE_CHECKING:
    from normswap.analysis.network import Analysis as Analysis
    from normswap.analysis.network import analyze as analyze
    from normswap.baking.bake_plan import BakePlan as BakePlan
    from normswap.baking.network_baking import Baked as Baked
    from normswap.baking.network_baking import bake as bake
    from normswap.checkpoints.content.optimizer_state import scheduler_with_gates as scheduler_with_gates
    from normswap.checkpoints.content.optimizer_state import with_gates as with_gates
    from normswap.checkpoints.derived.baked_file import BakedFile as BakedFile
    from normswap.checkpoints.derived.baked_file import bake_file as bake_file
    from normswap.checkpoints.derived.reverted_file import RevertedFile as RevertedFile
    from normswap.checkpoints.derived.reverted_file import revert_file as revert_file
    from normswap.checkpoints.file_conversion import FileConversion as FileConversion
    from normswap.checkpoints.file_conversion import convert_file as convert_file
    from normswap.checkpoints.loading import Loaded as Loaded
    from normswap.checkpoints.loading import load as load
    from normswap.checkpoints.saving import save as save
    from normswap.errors import AmbiguityError as AmbiguityError
    from normswap.errors import ArchitectureError as ArchitectureError
    from normswap.errors import ArgumentError as ArgumentError
    from normswap.errors import CheckpointError as CheckpointError
    from normswap.errors import DataError as DataError
    from normswap.errors import LayerError as LayerError
    from normswap.errors import ModelError as ModelError
    from normswap.errors import NormswapError as NormswapError
    from normswap.errors import NothingToDo as NothingToDo
    from normswap.errors import OptimizerError as OptimizerError
    from normswap.errors import PlanError as PlanError
    from normswap.errors import RecipeError as RecipeError
    from normswap.errors import RunInterrupted as RunInterrupted
    from normswap.errors import SwapError as SwapError
    from normswap.errors import TrainingError as TrainingError
    from normswap.errors import UnknownNormsError as UnknownNormsError
    from normswap.errors import WatchError as WatchError
    from normswap.exporting.export_options import Exported as Exported
    from normswap.exporting.network_export import export as export
    from normswap.finetune.data.datasets import open_data as open_data
    from normswap.finetune.data.loaders import DataSettings as DataSettings
    from normswap.finetune.preview import RunPreview as RunPreview
    from normswap.finetune.preview import preview_recipe as preview_recipe
    from normswap.finetune.recipe import Recipe as Recipe
    from normswap.finetune.recipe import read_recipe as read_recipe
    from normswap.finetune.run_files import Outcome as Outcome
    from normswap.finetune.trainer import run_recipe as run_recipe
    from normswap.integrations.hub import push_to_hub as push_to_hub
    from normswap.integrations.model_card import write_model_card as write_model_card
    from normswap.integrations.timm import timm_norm_layer as timm_norm_layer
    from normswap.layers.backends.sample_moments import SampleMoments as SampleMoments
    from normswap.layers.backends.selection import use_backend as use_backend
    from normswap.layers.channel_pruning import channel_pruners as channel_pruners
    from normswap.layers.functional import switch_norm as switch_norm
    from normswap.layers.matching import Matching as Matching
    from normswap.layers.switch_norm import SwitchNorm1d as SwitchNorm1d
    from normswap.layers.switch_norm import SwitchNorm2d as SwitchNorm2d
    from normswap.layers.switch_norm import SwitchNorm3d as SwitchNorm3d
    from normswap.layers.switch_norm import SwitchNormAct as SwitchNormAct
    from normswap.norm_sets.adaptation import AdaptationParameters as AdaptationParameters
    from normswap.norm_sets.adaptation import adaptation_parameters as adaptation_parameters
    from normswap.norm_sets.pooling import pool_statistics as pool_statistics
    from normswap.norm_sets.stored_state import SplitState as SplitState
    from normswap.norm_sets.stored_state import load_norm_state as load_norm_state
    from normswap.norm_sets.stored_state import norm_state as norm_state
    from normswap.norm_sets.stored_state import split_state as split_state
    from normswap.reports.file_report import Report as Report
    from normswap.reports.file_report import read_report as read_report
    from normswap.reports.plots import plot_importance as plot_importance
    from normswap.reports.report_files import write_report as write_report
    from normswap.running_stats.calibration import Calibration as Calibration
    from normswap.running_stats.calibration import calibrate as calibrate
    from normswap.running_stats.control import freeze_statistics as freeze_statistics
    from normswap.running_stats.control import set_bn_statistics as set_bn_statistics
    from normswap.running_stats.control import synchronize_statistics as synchronize_statistics
    from normswap.running_stats.control import unfreeze_statistics as unfreeze_statistics
    from normswap.running_stats.control import update_statistics as update_statistics
    from normswap.running_stats.sample_statistics import FixedStatistics as FixedStatistics
    from normswap.running_stats.sample_statistics import fixed_sample_statistics as fixed_sample_statistics
    from normswap.surgery.conversion import Conversion as Conversion
    from normswap.surgery.conversion import apply_plan as apply_plan
    from normswap.surgery.conversion import convert as convert
    from normswap.surgery.conversion import revert as revert
    from normswap.surgery.discovery.sites import NormSite as NormSite
    from normswap.surgery.discovery.sites import find_norm_sites as find_norm_sites
    from normswap.surgery.importance import batch_dependence as batch_dependence
    from normswap.surgery.importance import gate_impurity as gate_impurity
    from normswap.surgery.importance import importance_weights as importance_weights
    from normswap.surgery.importance import set_importance as set_importance
    from normswap.surgery.importance import trainable_gates as trainable_gates
    from normswap.surgery.norms.classes import KNOWN_NORMS as KNOWN_NORMS
    from normswap.surgery.norms.classes import read_batch_norm as read_batch_norm
    from normswap.surgery.norms.classes import read_group_norm as read_group_norm
    from normswap.surgery.norms.classes import read_instance_norm as read_instance_norm
    from normswap.surgery.norms.classes import read_norm_act as read_norm_act
    from normswap.surgery.plan import SwapPlan as SwapPlan
    from normswap.surgery.planning import plan_swaps as plan_swaps
    from normswap.surgery.selection import SwapOptions as SwapOptions
    from normswap.training.gate_steps import GateStepLimit as GateStepLimit
    from normswap.training.gate_steps import limit_gate_steps as limit_gate_steps
    from normswap.training.importance_watch import ImportanceWatch as ImportanceWatch
    from normswap.training.importance_watch import watch_importance as watch_importance
    from normswap.training.lightning_callback import ImportanceCallback as ImportanceCallback
    from normswap.training.live_conversion import TrainingConversion as TrainingConversion
    from normswap.training.live_conversion import convert_training as convert_training
    from normswap.training.param_groups import exempt_gates as exempt_gates
    from normswap.training.param_groups import param_groups as param_groups
    from normswap.verification.distance import Distance as Distance
    from normswap.verification.distance import measure_distance as measure_distance
    from normswap.verification.equivalence import Verification as Verification
    from normswap.verification.equivalence import verify as verify

_NAMES_BY_MODULE = {
    "baking.bake_plan": ("BakePlan",),
    "baking.network_baking": ("Baked", "bake"),
    "analysis.network": ("Analysis", "analyze"),
    "checkpoints.content.optimizer_state": ("scheduler_with_gates", "with_gates"),
    "checkpoints.derived.baked_file": ("BakedFile", "bake_file"),
    "checkpoints.derived.reverted_file": ("RevertedFile", "revert_file"),
    "checkpoints.file_conversion": ("FileConversion", "convert_file"),
    "checkpoints.loading": ("Loaded", "load"),
    "checkpoints.saving": ("save",),
    "errors": (
        "AmbiguityError",
        "ArchitectureError",
        "ArgumentError",
        "CheckpointError",
        "DataError",
        "LayerError",
        "ModelError",
        "NormswapError",
        "NothingToDo",
        "OptimizerError",
        "PlanError",
        "RecipeError",
        "RunInterrupted",
        "SwapError",
        "TrainingError",
        "UnknownNormsError",
        "WatchError",
    ),
    "exporting.export_options": ("Exported",),
    "exporting.network_export": ("export",),
    "finetune.data.datasets": ("open_data",),
    "finetune.data.loaders": ("DataSettings",),
    "finetune.preview": ("RunPreview", "preview_recipe"),
    "finetune.recipe": ("Recipe", "read_recipe"),
    "finetune.run_files": ("Outcome",),
    "finetune.trainer": ("run_recipe",),
    "integrations.hub": ("push_to_hub",),
    "integrations.model_card": ("write_model_card",),
    "integrations.timm": ("timm_norm_layer",),
    "layers.backends.sample_moments": ("SampleMoments",),
    "layers.backends.selection": ("use_backend",),
    "layers.channel_pruning": ("channel_pruners",),
    "layers.functional": ("switch_norm",),
    "layers.matching": ("Matching",),
    "layers.switch_norm": ("SwitchNorm1d", "SwitchNorm2d", "SwitchNorm3d", "SwitchNormAct"),
    "norm_sets.adaptation": ("AdaptationParameters", "adaptation_parameters"),
    "norm_sets.pooling": ("pool_statistics",),
    "norm_sets.stored_state": ("SplitState", "load_norm_state", "norm_state", "split_state"),
    "reports.file_report": ("Report", "read_report"),
    "reports.plots": ("plot_importance",),
    "reports.report_files": ("write_report",),
    "running_stats.calibration": ("Calibration", "calibrate"),
    "running_stats.control": (
        "freeze_statistics",
        "set_bn_statistics",
        "synchronize_statistics",
        "unfreeze_statistics",
        "update_statistics",
    ),
    "running_stats.sample_statistics": ("FixedStatistics", "fixed_sample_statistics"),
    "surgery.conversion": ("Conversion", "apply_plan", "convert", "revert"),
    "surgery.discovery.sites": ("NormSite", "find_norm_sites"),
    "surgery.importance": (
        "batch_dependence",
        "gate_impurity",
        "importance_weights",
        "set_importance",
        "trainable_gates",
    ),
    "surgery.norms.classes": (
        "KNOWN_NORMS",
        "read_batch_norm",
        "read_group_norm",
        "read_instance_norm",
        "read_norm_act",
    ),
    "surgery.plan": ("SwapPlan",),
    "surgery.planning": ("plan_swaps",),
    "surgery.selection": ("SwapOptions",),
    "training.gate_steps": ("GateStepLimit", "limit_gate_steps"),
    "training.importance_watch": ("ImportanceWatch", "watch_importance"),
    "training.lightning_callback": ("ImportanceCallback",),
    "training.live_conversion": ("TrainingConversion", "convert_training"),
    "training.param_groups": ("exempt_gates", "param_groups"),
    "verification.distance": ("Distance", "measure_distance"),
    "verification.equivalence": ("Verification", "verify"),
}
_MODULES = {name: f"normswap.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
# What the names need that plain normswap does not install: one of the packages, and how to install it. Without it
# `from normswap import *` and `dir(normswap)` leave the name out.
_NEEDS = {
    "ImportanceCallback": (("lightning", "pytorch_lightning"), "lightning"),
    "Outcome": (("accelerate",), "'normswap[finetune]'"),
    "plot_importance": (("matplotlib",), "'normswap[report]'"),
    "run_recipe": (("accelerate",), "'normswap[finetune]'"),
}


def _is_available(name: str) -> bool:
    """Whether what a public name needs is installed."""
    packages, _ = _NEEDS.get(name, ((), ""))
    return not packages or any(map(_is_installed, packages))


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # blocked by a finder, or a stub without a spec
        return package in sys.modules


__version__ = "0.1.0"
__all__ = sorted(filter(_is_available, _MODULES))

renamed.install()


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    if not _is_available(name):
        packages, to_install = _NEEDS[name]
        raise ImportError(
            f"normswap.{name} needs {' or '.join(packages)}, which is not installed: pip install {to_install}"
        )
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
