"""The import rules: the contracts in pyproject.toml find violations, and importing normswap costs no more than it must.

`make lint` checks the contracts (`lint-imports`). docs/architecture.md lists the modules.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import normswap

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "normswap"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS, *FENCES = (contract for contract in CONTRACTS if contract["type"] != "acyclic_siblings")

LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, is_debug_mode=False))"

# A line to add to a module, and what the report says of it.
VIOLATIONS = {
    "layers/gating.py": (
        "from normswap.surgery.plan import SwapPlan",
        "normswap.layers.gating -> normswap.surgery.plan",
    ),
    "text.py": ("def f():\n    import normswap.reports.results", "normswap.text -> normswap.reports.results"),
    "running_stats/control.py": (
        "from normswap.verification import equivalence",
        "normswap.running_stats.control -> normswap.verification.equivalence",
    ),
    "surgery/module_tree.py": (
        "from normswap.surgery import conversion",  # which imports module_tree
        "No cycles are allowed in normswap.surgery.",
    ),
    "surgery/plan.py": ("def f():\n    import timm", "normswap.surgery.plan -> timm"),
    "checkpoints/loading.py": ("import transformers", "normswap.checkpoints.loading -> transformers"),
    "training/schedulers.py": ("from torchvision import models", "normswap.training.schedulers -> torchvision"),
    "finetune/data/loaders.py": (
        "from sklearn.datasets import load_digits",
        "normswap.finetune.data.loaders -> sklearn",
    ),
    "checkpoints/saving.py": ("from PIL import Image", "normswap.checkpoints.saving -> PIL"),
    "finetune/recipe.py": ("import safetensors.torch", "normswap.finetune.recipe -> safetensors"),
    "training/param_groups.py": ("import accelerate", "normswap.training.param_groups -> accelerate"),
    "finetune/setup.py": ("import torchmetrics", "normswap.finetune.setup -> torchmetrics"),
    "training/importance_watch.py": (
        "from lightning.pytorch import Callback",
        "normswap.training.importance_watch -> lightning",
    ),
    "training/output_watch.py": ("import mmengine", "normswap.training.output_watch -> mmengine"),
    "finetune/trainer.py": ("from matplotlib import pyplot", "normswap.finetune.trainer -> matplotlib"),
    "layers/backends/triton_launch.py": ("import triton", "normswap.layers.backends.triton_launch -> triton"),
    "running_stats/matching.py": ("import onnx", "normswap.running_stats.matching -> onnx"),
    "training/gate_steps.py": ("import opacus", "normswap.training.gate_steps -> opacus"),
    "reports/tables.py": ("import click", "normswap.reports.tables -> click"),
    "verification/equivalence.py": ("from rich.table import Table", "normswap.verification.equivalence -> rich"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `lint-imports` reports on a copy of the package with all violations."""
    folder = tmp_path_factory.mktemp("violations")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(PACKAGE, folder / "normswap", ignore=shutil.ignore_patterns("__pycache__", "csrc", "*.so", "*.bin"))
    for path, (line, _) in VIOLATIONS.items():
        with (folder / "normswap" / path).open("a") as file:
            file.write(f"\n\n{line}\n")
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", VIOLATIONS)
def test_a_planted_violation_is_found(report: str, path: str) -> None:
    assert VIOLATIONS[path][1] in report


def test_every_contract_finds_a_violation(report: str) -> None:
    broken = re.findall(r"^(.*) BROKEN", report, re.M)
    assert broken == [contract["name"] for contract in CONTRACTS]


def test_make_checks_the_contracts() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    assert "/lint-imports" in recipe[1]


def test_the_layers_list_every_package_and_module() -> None:
    listed = {name.strip() for layer in LAYERS["layers"] for name in layer.split("|")}
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert listed == names - {"__init__", *LAYERS["exhaustive_ignores"]}


def test_every_other_package_has_a_place() -> None:
    """The library may import torch and numpy anywhere, and each other package in a few places only."""
    fenced = {name for contract in FENCES for name in contract["forbidden_modules"]}
    assert all(contract["source_modules"] == ["normswap"] for contract in FENCES)
    imported = {name.partition(".")[0] for path in PACKAGE.rglob("*.py") for name in imported_modules(path.read_text())}
    assert imported - sys.stdlib_module_names - {"normswap", "torch", "numpy"} <= fenced


def imported_modules(source: str) -> set[str]:
    """Return the full names of all modules that `source` imports anywhere."""
    nodes = [*ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def listed_modules(page: str) -> list[str]:
    """Return the modules in the tables of the architecture page, as paths from the package."""
    found, folder = [], ""
    for line in page.splitlines():
        if heading := re.match(r"### `normswap/(.*)`", line):
            folder = heading[1]
        elif line.startswith("#"):
            folder = ""
        if row := re.match(r"\| `(\w+\.py)` \|", line):
            found.append(folder + row[1])
    return found


def test_the_architecture_page_lists_every_module_once() -> None:
    listed = listed_modules((ROOT / "docs" / "architecture.md").read_text())
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(modules)


def test_a_missing_module_is_noticed() -> None:
    page = "### `normswap/`\n| `text.py` | x |\n### `normswap/layers/`\n| `gating.py` | x |\n## Words\n| `a` | x |"
    assert listed_modules(page) == ["text.py", "layers/gating.py"]


# --- what an import costs ---------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",  # one process for several steps; each step may import more than the one before
    [
        {
            "import normswap": {"torch", "timm", "torchvision", "click", "rich"},
            "dir(normswap); normswap.NormswapError": {"torch", "timm"},
            "normswap.convert, normswap.verify, normswap.SwitchNorm2d": {"timm", "torchvision", "rich"},
            "normswap.use_backend": {"timm", "triton"},
            "normswap.watch_importance": {"timm", "lightning", "pytorch_lightning"},
            "normswap.load, normswap.save": {"timm", "torchvision", "rich", "click", "torch.distributed.checkpoint"},
        },
        {"import normswap.cli": {"torch", "timm", "rich"}},
    ],
    ids=["library", "command line"],
)
def test_importing_costs_no_more_than_it_must(steps: dict[str, set[str]]) -> None:
    lines = [f"{step}; print(sorted({absent!r} & set(sys.modules)))" for step, absent in steps.items()]
    code = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"] * len(steps)


# --- public names -----------------------------------------------------------------------------------------------------


def test_every_public_name_can_be_imported() -> None:
    for name in normswap.__all__:
        assert getattr(normswap, name) is not None
    with pytest.raises(AttributeError, match="module 'normswap' has no attribute 'nothing_of_the_kind'"):
        _ = normswap.nothing_of_the_kind


def test_type_checkers_see_the_public_names_in_the_same_modules() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == normswap._MODULES
    assert all(alias.name == alias.asname for node in imports for alias in node.names)


def test_every_error_is_public() -> None:
    errors = {name for name, value in vars(normswap.errors).items() if isinstance(value, type)}
    assert errors <= {*normswap.__all__}


WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(("lightning", "pytorch_lightning", "accelerate", "sklearn", "matplotlib")))
import normswap
from normswap import *
assert convert is normswap.convert
assert [name for name in dir(normswap) if getattr(normswap, name, None) is None] == []
for name in sorted({*normswap._MODULES} - {*normswap.__all__}):
    try:
        getattr(normswap, name)
    except ImportError as error:
        print(error)
"""


def test_without_the_extras_all_other_names_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "normswap.ImportanceCallback needs lightning or pytorch_lightning, which is not installed: "
        "pip install lightning",
        "normswap.Outcome needs accelerate, which is not installed: pip install 'normswap[finetune]'",
        "normswap.plot_importance needs matplotlib, which is not installed: pip install 'normswap[report]'",
        "normswap.run_recipe needs accelerate, which is not installed: pip install 'normswap[finetune]'",
    ]


def test_type_hints_of_public_names_can_be_read() -> None:
    for name in normswap.__all__:
        value = getattr(normswap, name)
        for each in (value, value.__init__) if isinstance(value, type) else (value,) if callable(value) else ():
            assert isinstance(typing.get_type_hints(each), dict)
