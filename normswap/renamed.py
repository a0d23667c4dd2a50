"""Old module paths and names: they still work, and give a `DeprecationWarning`.

Pickles contain the paths of classes, and programs import them, so a path must work after its module has moved. `NAMES`
lists renamed names only if the documentation showed them or pickles contain them; all other names are internal.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

# The current module for each old one.
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
    "normswap.finetune.augmentation": "normswap.finetune.tasks.classification",
    "normswap.finetune.batch_price": "normswap.surgery.importance",
    "normswap.finetune.data": "normswap.finetune.data.datasets",
    "normswap.finetune.digits": "normswap.finetune.data.digits",
    "normswap.finetune.engine": "normswap.finetune.trainer",
    "normswap.finetune.evaluation": "normswap.finetune.tasks.interface",
    "normswap.finetune.heads": "normswap.finetune.tasks.classification",
    "normswap.finetune.image_source": "normswap.finetune.data.loaders",
    "normswap.finetune.interruption": "normswap.finetune.run_files",
    "normswap.finetune.journal": "normswap.finetune.run_files",
    "normswap.finetune.layouts": "normswap.training.param_groups",
    "normswap.finetune.lightning": "normswap.training.lightning_callback",
    "normswap.finetune.live_averages": "normswap.training.live_conversion",
    "normswap.finetune.live_schedulers": "normswap.training.schedulers",
    "normswap.finetune.live_training": "normswap.training.live_conversion",
    "normswap.finetune.loaders": "normswap.finetune.data.loaders",
    "normswap.finetune.network": "normswap.finetune.data.datasets",
    "normswap.finetune.optimizer": "normswap.finetune.optimization",
    "normswap.finetune.param_groups": "normswap.training.param_groups",
    "normswap.finetune.preparation": "normswap.finetune.setup",
    "normswap.finetune.randomness": "normswap.finetune.data.loaders",
    "normswap.finetune.recipe_tables": "normswap.finetune.tables",
    "normswap.finetune.run_length": "normswap.finetune.optimization",
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
    "normswap.layers.plain_passes": "normswap.layers.backends.aten_passes",
    "normswap.layers.reference": "normswap.layers.backends.reference",
    "normswap.layers.running": "normswap.layers.backends.custom_ops",
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

# The current name for each name that changed.
NAMES: Mapping[str, str] = {
    "normswap.calibration.PassedOver": "normswap.running_stats.calibration.SkippedLayer",
    "normswap.checkpoints.record.Original": "normswap.checkpoints.record.OriginalNorm",
    "normswap.layers.modules.FunctionalSwitchNorm": "normswap.layers.gated_module.FunctionalSwitchNorm",
    "normswap.layers.modules.apply_site": "normswap.layers.gated_module.apply_site",
    "normswap.surgery.gated.ImportanceWeights": "normswap.surgery.importance.SiteWeights",
    "normswap.surgery.norms.KINDS": "normswap.surgery.selection.KINDS",
    "normswap.surgery.norms.base_kind": "normswap.surgery.selection.base_kind",
    "normswap.surgery.norms.shape_problem": "normswap.surgery.discovery.whole_model.shape_problem",
    "normswap.surgery.tracing.first_line": "normswap.text.first_line",
    "normswap.surgery.tree.join": "normswap.text.join_fqn",
}


def install() -> None:
    """Make the old module paths importable; called when normswap is imported."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def old_names(module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module at an old path, which returns each name from its current module.

    Args:
        module: the old path, a key of `MODULES`; or a module that did not move, with names in `NAMES`.
    """

    def fetch(name: str) -> Any:
        """Return the object of an old name, and warn."""
        old, home = f"{module}.{name}", MODULES.get(module)
        if name == "__all__" and home is not None:  # what `from module import *` asks for
            return public_names(home)
        target = NAMES.get(old, home and f"{home}.{name}")
        if name.startswith("__") or target is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new_name = target.rpartition(".")
        try:
            value = getattr(importlib.import_module(home), new_name)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
        if getattr(value, "__name__", None) == old:  # a submodule: after this error Python imports it
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is {home}.{new_name} now: import it from there", DeprecationWarning, stacklevel=2
        )
        return value

    return fetch


def public_names(home: str) -> list[str]:
    """Return the names of a module that `from module import *` imports."""
    names = vars(importlib.import_module(home))
    return sorted(names.get("__all__", (name for name in names if not name.startswith("_"))))


def warn_renamed(old: str, new: str) -> None:
    """Warn that a member, field or key was renamed; the warning names the line outside normswap that uses it."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "normswap":
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} of normswap was renamed to {new}: use the new name", DeprecationWarning, stacklevel=level)


def current_names(renamed: Mapping[str, str], values: Mapping[str, T], owner: str) -> dict[str, T]:
    """Return `values` with renamed keys under their new names, and warn about each.

    Args:
        renamed: the new name of each renamed key.
        owner: the name of the class or table with the keys, for the message.

    Raises:
        TypeError: `values` has a key under both names.
    """
    result = dict(values)
    for old in renamed.keys() & values.keys():
        new = renamed[old]
        if new in values:
            raise TypeError(f"{owner}.{old} was renamed to {owner}.{new}, and both are set: remove {owner}.{old}")
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}")
        result[new] = result.pop(old)
    return result


def renamed_fields(**renamed: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass take fields by their old names as arguments and in pickles, and return them as attributes.

    Args:
        renamed: the new name of each renamed field.
    """

    def decorate(cls: type[T]) -> type[T]:
        """Return the class, changed in place."""
        init = cls.__init__
        changed: Any = cls

        @functools.wraps(init)
        def initialize(self: T, *args: Any, **values: Any) -> None:
            init(self, *args, **current_names(renamed, values, cls.__name__))

        def set_state(self: T, state: Mapping[str, Any]) -> None:
            # Whoever loads a pickle of an earlier version cannot change it, so there is no warning.
            vars(self).update({renamed.get(name, name): value for name, value in state.items()})

        changed.__init__, changed.__setstate__ = initialize, set_state
        for old, new in renamed.items():
            setattr(changed, old, _renamed_property(cls.__name__, old, new))
        return cls

    return decorate


def _renamed_property(owner: str, old: str, new: str) -> property:
    def get(self: Any) -> Any:
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    return property(get, doc=f"The old name of `{new}`.")


class _OldModules(MetaPathFinder, Loader):
    """Create a module for an old path when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module at an old path, None for any other path."""
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        """Let a new module return the names of its current module."""
        module.__doc__ = f"The content of this module is in `{MODULES[module.__name__]}` now."
        module.__getattr__ = old_names(module.__name__)  # type: ignore[method-assign]
        home = MODULES[module.__name__]
        vars(module)["__dir__"] = lambda: public_names(home)
