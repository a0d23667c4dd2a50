"""How `old_names.json` was written: the names of normswap 0.1.0, commit e7b137c, before its modules moved.

A record, not a tool, as `make.py` is; it was run in the root of the repository after that one.
"""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import normswap

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "normswap"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def defined_in(path: Path) -> list[str]:
    """The public names that a module defines itself: classes, functions, constants."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return sorted({name for name in found if not name.startswith("_")})


def documented() -> list[dict[str, str]]:
    """What pages import, and the full names that they write."""
    found = set()
    for page in PAGES:
        place, text = str(page.relative_to(ROOT)), page.read_text()
        for module, names in re.findall(r"^\s*from (normswap[\w.]*) import (.+)$", text, re.M):
            found |= {(module, name.strip().partition(" ")[0], place) for name in names.split(",")}
        for dotted in re.findall(r"\bnormswap(?:\.\w+)+", text):
            module, _, name = dotted.rpartition(".")
            if name in (normswap.__all__ if module == "normswap" else MODULES.get(module, ())):
                found.add((module, name, place))
            elif dotted in MODULES:
                found.add((dotted, "", place))
    # The reference names them beside their module.
    found.add(("normswap.checkpoints.scheduler_state", "scheduler_with_gates", "docs/reference.md"))
    found.add(("normswap.checkpoints.optimizer_state", "with_gates", "docs/reference.md"))
    return [{"module": module, "name": name, "page": page} for module, name, page in sorted(found)]


def pickled() -> list[tuple[str, str]]:
    found = json.loads((HERE / "pickled_names.json").read_text())
    pairs = {(module, name) for names in found.values() for module, name in names}
    return sorted((module, name) for module, name in pairs if module.startswith("normswap"))


def members(value: Any) -> list[str]:
    """The public attributes of a class that its own package defines: methods, properties, fields."""
    own = [cls for cls in inspect.getmro(value) if cls.__module__.startswith("normswap")]
    names = {name for cls in own for name in (*vars(cls), *inspect.get_annotations(cls))}
    return sorted(name for name in names if not name.startswith("_"))


def parameters(value: Any) -> list[str]:
    return list(inspect.signature(value).parameters)


MODULES = {name: defined_in(path) for name, path in modules()}


def main() -> None:
    top = {name: getattr(normswap, name) for name in normswap.__all__}
    classes = {name: value for name, value in top.items() if inspect.isclass(value)}
    # Not at the top in that version, and shown by the docs or held by those that are.
    for module, name in (
        ("normswap.finetune.watching", "ImportanceLog"),
        ("normswap.finetune.watching", "StatisticsSwitch"),
        ("normswap.finetune.lightning", "ImportanceCallback"),
        ("normswap.finetune.recipe_tables", "ModelTable"),
        ("normswap.finetune.recipe_tables", "ConvertTable"),
        ("normswap.finetune.recipe_tables", "DataTable"),
        ("normswap.finetune.recipe_tables", "TrainTable"),
        ("normswap.finetune.recipe_tables", "RunTable"),
        ("normswap.finetune.evaluation", "Evaluation"),
        ("normswap.surgery.plan", "Swap"),
        ("normswap.surgery.plan", "Skip"),
        ("normswap.surgery.gated", "ImportanceWeights"),
        ("normswap.model_comparison", "Check"),
        ("normswap.site_watch", "SiteError"),
        ("normswap.checkpoints.record", "Step"),
        ("normswap.calibration", "CalibratedLayer"),
        ("normswap.calibration", "PassedOver"),
    ):
        classes[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    functions = {name: value for name, value in top.items() if callable(value) and name != "NormswapError"}
    for module, name in (
        ("normswap.checkpoints.optimizer_state", "with_gates"),
        ("normswap.checkpoints.scheduler_state", "scheduler_with_gates"),
        ("normswap.surgery.gated", "trainable_gates"),
        ("normswap.finetune.data", "open_data"),
        ("normswap.finetune.lightning", "ImportanceCallback"),
    ):
        functions[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    document = {
        "version": normswap.__version__,
        "commit": "e7b137c",
        "modules": MODULES,
        "top": dict(sorted(normswap._HOMES.items())),
        "documented": documented(),
        "pickled": pickled(),
        "members": {name: members(value) for name, value in sorted(classes.items())},
        "parameters": {name: parameters(value) for name, value in sorted(functions.items())},
        "renamed": {
            "members": [
                ["normswap", "ImportanceWatch", "hang_on"],
                ["normswap.finetune.watching", "ImportanceLog", "reach"],
                ["normswap.finetune.watching", "StatisticsSwitch", "reach"],
                ["normswap.finetune.recipe_tables", "TrainTable", "batch_price"],
            ],
            "recipe keys": ["train.batch_price"],
        },
    }
    (HERE / "old_names.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
