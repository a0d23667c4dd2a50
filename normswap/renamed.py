"""Module paths and names of earlier versions: they still work, and give a `DeprecationWarning`.

Pickles hold the paths of classes, and programs import them, so a path lives on after its module has moved. A name that
no page of the documentation showed and that no pickle holds is internal and has no entry in `NAMES`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where the content of each old module is now.
MODULES: Mapping[str, str] = {
    "normswap.calibration": "normswap.running_stats.calibration",
    "normswap.calibration_pass": "normswap.running_stats.accumulation",
    "normswap.calibration_pooling": "normswap.running_stats.accumulation",
    "normswap.checkpoints.architecture": "normswap.checkpoints.architecture.registry",
    "normswap.checkpoints.architecture_index": "normswap.checkpoints.architecture.index",
    "normswap.checkpoints.archives": "normswap.checkpoints.formats.archive_checks",
    "normswap.checkpoints.atomic": "normswap.checkpoints.io.atomic_files",
    "normswap.checkpoints.build_limits": "normswap.checkpoints.architecture.permissions",
    "normswap.checkpoints.carrying": "normswap.checkpoints.converted_content",
    "normswap.checkpoints.checkpoint": "normswap.checkpoints.loading",
    "normswap.checkpoints.chunks": "normswap.checkpoints.formats.dcp_folder",
    "normswap.checkpoints.claims": "normswap.checkpoints.formats.archive_checks",
    "normswap.checkpoints.containers": "normswap.checkpoints.formats.formats",
    "normswap.checkpoints.contents": "normswap.checkpoints.content.entries",
    "normswap.checkpoints.distributed": "normswap.checkpoints.formats.dcp_folder",
    "normswap.checkpoints.endings": "normswap.checkpoints.io.atomic_files",
    "normswap.checkpoints.fingerprint": "normswap.checkpoints.io.digest",
    "normswap.checkpoints.fit": "normswap.checkpoints.content.weight_loading",
    "normswap.checkpoints.freeing": "normswap.checkpoints.io.memory",
    "normswap.checkpoints.identification": "normswap.checkpoints.architecture.identification",
    "normswap.checkpoints.layout": "normswap.checkpoints.content.weight_loading",
    "normswap.checkpoints.leftovers": "normswap.checkpoints.content.entries",
    "normswap.checkpoints.named_architectures": "normswap.checkpoints.architecture.permissions",
    "normswap.checkpoints.norm_values": "normswap.checkpoints.content.state_dict",
    "normswap.checkpoints.opcodes": "normswap.checkpoints.formats.pickle_opcodes",
    "normswap.checkpoints.optimizer_state": "normswap.checkpoints.content.optimizer_state",
    "normswap.checkpoints.ownership": "normswap.checkpoints.content.optimizer_ownership",
    "normswap.checkpoints.pages": "normswap.checkpoints.io.memory",
    "normswap.checkpoints.pickle_reading": "normswap.checkpoints.formats.plain_values",
    "normswap.checkpoints.plain_globals": "normswap.checkpoints.formats.plain_values",
    "normswap.checkpoints.plain_values": "normswap.checkpoints.formats.plain_values",
    "normswap.checkpoints.prefixes": "normswap.checkpoints.content.key_prefixes",
    "normswap.checkpoints.programs": "normswap.checkpoints.formats.pt2_archive",
    "normswap.checkpoints.recognition": "normswap.checkpoints.architecture.identification",
    "normswap.checkpoints.scheduler_state": "normswap.checkpoints.content.optimizer_state",
    "normswap.checkpoints.shards": "normswap.checkpoints.formats.hf_folder",
    "normswap.checkpoints.sources": "normswap.checkpoints.source_copy",
    "normswap.checkpoints.state_surgery": "normswap.checkpoints.content.state_dict",
    "normswap.checkpoints.survey": "normswap.checkpoints.content.state_dict",
    "normswap.checkpoints.temporaries": "normswap.checkpoints.io.atomic_files",
    "normswap.checkpoints.trainer_state": "normswap.checkpoints.content.hf_trainer",
    "normswap.comparison": "normswap.surgery.model_outputs",
    "normswap.display": "normswap.text",
    "normswap.documents": "normswap.text",
    "normswap.finetune.augmentation": "normswap.finetune.setup",
    "normswap.finetune.batch_price": "normswap.surgery.importance",
    "normswap.finetune.data": "normswap.finetune.data.datasets",
    "normswap.finetune.digits": "normswap.finetune.data.digits",
    "normswap.finetune.engine": "normswap.finetune.trainer",
    "normswap.finetune.evaluation": "normswap.finetune.trainer",
    "normswap.finetune.heads": "normswap.finetune.setup",
    "normswap.finetune.image_source": "normswap.finetune.data.loaders",
    "normswap.finetune.interruption": "normswap.finetune.run_files",
    "normswap.finetune.journal": "normswap.finetune.run_files",
    "normswap.finetune.layouts": "normswap.training.param_groups",
    "normswap.finetune.lightning": "normswap.training.lightning_callback",
    "normswap.finetune.live_averages": "normswap.training.live_conversion",
    "normswap.finetune.live_schedulers": "normswap.training.schedulers",
    "normswap.finetune.live_training": "normswap.training.live_conversion",
    "normswap.finetune.loaders": "normswap.finetune.data.loaders",
    "normswap.finetune.network": "normswap.finetune.model_source",
    "normswap.finetune.optimizer": "normswap.finetune.setup",
    "normswap.finetune.param_groups": "normswap.training.param_groups",
    "normswap.finetune.preparation": "normswap.finetune.setup",
    "normswap.finetune.randomness": "normswap.finetune.data.loaders",
    "normswap.finetune.recipe_tables": "normswap.finetune.recipe_fields",
    "normswap.finetune.run_length": "normswap.finetune.recipe",
    "normswap.finetune.run_state": "normswap.finetune.run_files",
    "normswap.finetune.source": "normswap.finetune.model_source",
    "normswap.finetune.watching": "normswap.training.importance_watch",
    "normswap.finetune.weight_decay": "normswap.training.param_groups",
    "normswap.gradients": "normswap.verification.model_pass",
    "normswap.layers.adoption": "normswap.layers.in_place",
    "normswap.layers.checks": "normswap.layers.backends.interface",
    "normswap.layers.compiled": "normswap.layers.backends.cpu",
    "normswap.layers.dispatch": "normswap.layers.backends.selection",
    "normswap.layers.fused": "normswap.layers.backends.interface",
    "normswap.layers.gates": "normswap.layers.gated_module",
    "normswap.layers.importance": "normswap.layers.gating",
    "normswap.layers.joint_batch": "normswap.layers.sync",
    "normswap.layers.mixing": "normswap.layers.gating",
    "normswap.layers.modules": "normswap.layers.switch_norm",
    "normswap.layers.moments": "normswap.layers.backends.reference",
    "normswap.layers.native": "normswap.layers.backends.cpu",
    "normswap.layers.operators": "normswap.layers.backends.custom_ops",
    "normswap.layers.passes": "normswap.layers.backends.aten_passes",
    "normswap.layers.plain_passes": "normswap.layers.backends.plain_passes",
    "normswap.layers.reference": "normswap.layers.backends.reference",
    "normswap.layers.running": "normswap.layers.functional",
    "normswap.layers.single_position": "normswap.layers.functional",
    "normswap.layers.synchronization": "normswap.layers.sync",
    "normswap.layers.tables": "normswap.layers.backends.moment_algebra",
    "normswap.layers.triton_backend": "normswap.layers.backends.triton_launch",
    "normswap.layers.triton_kernels": "normswap.layers.backends.triton_kernels",
    "normswap.layers.vertex": "normswap.layers.backends.reference",
    "normswap.model_comparison": "normswap.verification.model_comparison",
    "normswap.model_pass": "normswap.verification.model_pass",
    "normswap.modes": "normswap.model_state",
    "normswap.output_leaves": "normswap.surgery.model_outputs",
    "normswap.precision": "normswap.verification.precision",
    "normswap.reports.finetuning": "normswap.reports.results",
    "normswap.reports.identification": "normswap.reports.tables",
    "normswap.reports.survey": "normswap.reports.tables",
    "normswap.site_verdict": "normswap.verification.equivalence",
    "normswap.site_watch": "normswap.verification.site_watch",
    "normswap.statistics": "normswap.running_stats.control",
    "normswap.surgery.as_written": "normswap.surgery.graphs.rewriting",
    "normswap.surgery.calls": "normswap.surgery.norms.functions",
    "normswap.surgery.code_reading": "normswap.surgery.graphs.module_trace",
    "normswap.surgery.exporting": "normswap.surgery.graphs.exported_program",
    "normswap.surgery.frozen": "normswap.surgery.norms.classes",
    "normswap.surgery.functional_sites": "normswap.surgery.discovery.sites",
    "normswap.surgery.gated": "normswap.surgery.importance",
    "normswap.surgery.graph_edit": "normswap.surgery.graphs.rewriting",
    "normswap.surgery.graph_rewrite": "normswap.surgery.graphs.rewriting",
    "normswap.surgery.norm_candidates": "normswap.surgery.norms.classes",
    "normswap.surgery.norm_site": "normswap.surgery.discovery.sites",
    "normswap.surgery.norms": "normswap.surgery.norms.classes",
    "normswap.surgery.observation": "normswap.surgery.discovery.whole_model",
    "normswap.surgery.own_forward": "normswap.surgery.graphs.module_trace",
    "normswap.surgery.own_mode": "normswap.surgery.module_tree",
    "normswap.surgery.patterns": "normswap.surgery.selection",
    "normswap.surgery.programs": "normswap.surgery.graphs.exported_program",
    "normswap.surgery.settings": "normswap.surgery.selection",
    "normswap.surgery.sites": "normswap.surgery.discovery.sites",
    "normswap.surgery.tracing": "normswap.surgery.graphs.tracing",
    "normswap.surgery.tracing_paths": "normswap.surgery.discovery.whole_model",
    "normswap.surgery.tree": "normswap.surgery.module_tree",
    "normswap.surgery.trial": "normswap.surgery.graphs.tracing",
    "normswap.surgery.whole_graph": "normswap.surgery.graphs.as_graph_module",
    "normswap.surgery.wrapping": "normswap.surgery.wrappers",
    "normswap.verification": "normswap.verification.equivalence",
}

# Names that are called otherwise in their new module.
NAMES: Mapping[str, str] = {
    "normswap.calibration.PassedOver": "normswap.running_stats.calibration.SkippedLayer",
    "normswap.checkpoints.record.Original": "normswap.checkpoints.record.OriginalNorm",
    "normswap.surgery.gated.ImportanceWeights": "normswap.surgery.importance.SiteWeights",
    "normswap.surgery.norms.KINDS": "normswap.surgery.selection.KINDS",
    "normswap.surgery.norms.base_kind": "normswap.surgery.selection.base_kind",
    "normswap.surgery.norms.shape_problem": "normswap.surgery.discovery.whole_model.shape_problem",
    "normswap.surgery.tracing.first_line": "normswap.text.first_line",
    "normswap.surgery.tree.join": "normswap.text.join_fqn",
}


def install() -> None:
    """Let imports find the old module paths; called when normswap is imported."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def old_names(module: str) -> Callable[[str], Any]:
    """Return `__getattr__` for a module or package at an old path: each name is fetched from its new home.

    Args:
        module: the old path, a key of `MODULES`; or a module that stayed, some of whose names are in `NAMES`.
    """

    def fetch(name: str) -> Any:
        old, home = f"{module}.{name}", MODULES.get(module)
        target = NAMES.get(old, home and f"{home}.{name}")
        if name.startswith("__") or target is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new_name = target.rpartition(".")
        try:
            value = getattr(importlib.import_module(home), new_name)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
        warnings.warn(
            f"{module}.{name} is {home}.{new_name} now: import it from there", DeprecationWarning, stacklevel=2
        )
        return value

    return fetch


class _OldModules(MetaPathFinder, Loader):
    """Makes a module for an old path when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"The content of this module is in `{MODULES[module.__name__]}` now."
        module.__getattr__ = old_names(module.__name__)  # type: ignore[method-assign]
