"""The house rules on imports: a room imports only from rooms above it, and heavy packages live in one room each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normswap

PACKAGE = Path(__file__).resolve().parents[2] / "normswap"

# From the ground floor up; inside a floor a room may import from those listed before it. See docs/architecture.md.
ROOMS = [
    "errors",
    "display",
    "documents",
    "state_snapshot",
    "output_leaves",
    "modes",
    "layers.importance",
    "layers.checks",
    "layers.mixing",
    "layers.moments",
    "layers.vertex",
    "layers.reference",
    "layers.fused",
    "layers.tables",
    "layers.passes",
    "layers.compiled",
    "layers.native",
    "layers.triton_kernels",
    "layers.triton_backend",
    "layers.dispatch",
    "layers.single_position",
    "layers.operators",
    "layers.running",
    "layers.synchronization",
    "layers.plain_passes",
    "layers.joint_batch",
    "layers.functional",
    "layers.adoption",
    "layers.gates",
    "layers.modules",
    "surgery.arguments",
    "surgery.tree",
    "surgery.model_mode",
    "surgery.frozen",
    "surgery.norm_candidates",
    "surgery.norms",
    "surgery.calls",
    "surgery.code_reading",
    "surgery.tracing",
    "surgery.wrapping",
    "surgery.exporting",
    "surgery.observation",
    "surgery.own_forward",
    "surgery.trial",
    "surgery.tracing_paths",
    "surgery.as_written",
    "surgery.graph_rewrite",
    "surgery.graph_edit",
    "surgery.norm_site",
    "surgery.functional_sites",
    "surgery.sites",
    "surgery.patterns",
    "surgery.settings",
    "surgery.plan",
    "surgery.planning",
    "surgery.gated",
    "surgery.whole_graph",
    "surgery.conversion",
    "calibration_pass",
    "statistics",
    "calibration_pooling",
    "calibration",
    "comparison",
    "surgery.programs",
    "gradients",
    "precision",
    "model_pass",
    "site_watch",
    "model_comparison",
    "site_verdict",
    "verification",
    "checkpoints.endings",
    "checkpoints.temporaries",
    "checkpoints.atomic",
    "checkpoints.freeing",
    "checkpoints.opcodes",
    "checkpoints.archives",
    "checkpoints.claims",
    "checkpoints.record",
    "checkpoints.plain_values",
    "checkpoints.plain_globals",
    "checkpoints.pickle_reading",
    "checkpoints.shards",
    "checkpoints.programs",
    "checkpoints.chunks",
    "checkpoints.distributed",
    "checkpoints.containers",
    "checkpoints.named_architectures",
    "checkpoints.architecture",
    "checkpoints.build_limits",
    "checkpoints.architecture_index",
    "checkpoints.identification",
    "checkpoints.layout",
    "checkpoints.pages",
    "checkpoints.fit",
    "checkpoints.prefixes",
    "checkpoints.optimizer_state",
    "checkpoints.scheduler_state",
    "checkpoints.ownership",
    "checkpoints.contents",
    "checkpoints.recognition",
    "checkpoints.fingerprint",
    "checkpoints.trainer_state",
    "checkpoints.sources",
    "checkpoints.norm_values",
    "checkpoints.survey",
    "checkpoints.state_surgery",
    "checkpoints.checkpoint",
    "checkpoints.leftovers",
    "checkpoints.carrying",
    "checkpoints.saving",
    "finetune.randomness",
    "finetune.digits",
    "finetune.image_source",
    "finetune.loaders",
    "finetune.network",
    "finetune.data",
    "finetune.layouts",
    "finetune.batch_price",
    "finetune.param_groups",
    "finetune.recipe_tables",
    "finetune.run_length",
    "finetune.watching",
    "finetune.live_schedulers",
    "finetune.live_averages",
    "finetune.live_training",
    "finetune.weight_decay",
    "finetune.lightning",
    "finetune.recipe",
    "finetune.augmentation",
    "finetune.optimizer",
    "finetune.source",
    "finetune.heads",
    "finetune.preparation",
    "finetune.run_state",
    "finetune.evaluation",
    "finetune.journal",
    "finetune.interruption",
    "finetune.engine",
    "reports.tables",
    "reports.results",
    "reports.identification",
    "reports.survey",
    "reports.finetuning",
    "cli.launched",
    "cli.wording",
    "cli.printable",
    "cli.failures",
    "cli.progress",
    "cli.options",
    "cli.opening",
    "cli.outputs",
    "cli.wish",
    "cli.calibrate",
    "cli.writing",
    "cli.convert",
    "cli.finetune",
    "cli.recipes",
    "cli.identify",
    "cli.survey",
    "cli.inspect",
    "cli.verify",
    "cli",
]
# Where a package may be imported.
HOMES = {
    "timm": ("checkpoints.architecture", "finetune.data", "finetune.augmentation", "finetune.optimizer"),
    "sklearn": ("finetune.digits",),
    "transformers": ("checkpoints.architecture",),
    "torchvision": ("checkpoints.architecture",),
    "safetensors": ("checkpoints.",),
    "accelerate": ("finetune.engine", "finetune.evaluation"),
    "lightning": ("finetune.lightning",),
    "pytorch_lightning": ("finetune.lightning",),
    "matplotlib": ("reports.finetuning",),
    "triton": ("layers.triton_kernels",),
    "click": ("cli",),
    "rich": ("cli", "reports."),
}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem not in ("__init__", "__main__")]


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(source: str) -> set[str]:
    """Every module that `source` imports anywhere, by full name; `from a import b` counts as a.b where that is one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name.removeprefix("normswap.") in ROOMS} or {node.module}
    return names


def violations(room: str, source: str) -> list[str]:
    found = []
    for name in sorted(imported(source)):
        top, _, rest = name.partition(".")
        if top == "normswap" and rest and rest in ROOMS and ROOMS.index(rest) >= ROOMS.index(room):
            found.append(f"{room} imports {rest}, which is not above it")
        if top in HOMES and not room.startswith(HOMES[top]):
            found.append(f"{room} imports {top}, which belongs in {' or '.join(HOMES[top])}")
    return found


def test_every_file_is_a_listed_room() -> None:
    folders = {"layers", "surgery", "checkpoints", "finetune", "reports"}  # their __init__ is a docstring
    assert {room_of(path) for path in FILES} - folders == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    if room_of(path) in ROOMS:
        assert violations(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("layers.moments", "from normswap.surgery.plan import SwapPlan"),
        ("layers.moments", "from normswap.surgery import plan"),
        ("surgery.plan", "def f():\n    import timm"),
        ("finetune.image_source", "from sklearn.datasets import load_digits"),
        ("layers.triton_backend", "import triton"),
        ("finetune.watching", "from lightning.pytorch import Callback"),
        ("verification", "from rich.table import Table"),
        ("reports.tables", "import click"),
        ("surgery.sites", "import normswap.surgery.conversion"),
    ],
)
def test_a_planted_violation_is_found(room: str, source: str) -> None:
    assert len(violations(room, source)) == 1


def test_every_room_is_in_the_architecture_page() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for room in ROOMS:
        folder, _, name = room.rpartition(".")
        shown = f"{folder}/{name}.py" if folder in ("layers", "surgery", "finetune") else f"{folder or name}"
        assert shown in page, f"docs/architecture.md does not show {room}"


@pytest.mark.parametrize(
    "steps",  # one process for several, from little to more: what comes later adds to what is absent still
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


def test_every_public_name_can_be_had() -> None:
    for name in normswap.__all__:
        assert getattr(normswap, name) is not None
    with pytest.raises(AttributeError, match="module 'normswap' has no attribute 'nothing_of_the_kind'"):
        _ = normswap.nothing_of_the_kind
