"""What CI, pre-commit and the guides name exists: targets, scripts, extras; and the scripts do what CI expects."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
SMOKE = ROOT / ".github" / "smoke.py"


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def problems(command: str) -> list[str]:
    """Return what a command of a workflow names and the repository does not have."""
    command = command.replace("{project}/", "")
    missing = [f"make {name}" for name in re.findall(r"\bmake ([a-z-]+)", command) if name not in TARGETS]
    scripts = re.findall(r"\bpython (?:-[A-Z] )?([\w./-]+\.py)\b", command)
    missing += [script for script in scripts if not (ROOT / script).is_file()]
    named = [name for names in re.findall(r"\.\[([\w,]+)\]", command) for name in names.split(",")]
    return missing + [f"[{name}]" for name in named if name not in EXTRAS]


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert problems("make test\npython .github/smoke.py x\npip install '.[dev]'") == []
    assert problems("make tests") == ["make tests"]
    assert problems("python {project}/smoke.py") == ["smoke.py"]
    assert problems('pip install -e ".[dev,all]"') == ["[all]"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_what_exists(path: Path) -> None:
    workflow = read(path)
    assert {"name", True, "jobs"} <= set(workflow)  # YAML reads the key `on` as true
    for name, job in workflow["jobs"].items():
        assert job["runs-on"], name
        assert job["timeout-minutes"] <= 90, name
        steps = job["steps"]
        assert all(("run" in step) != ("uses" in step) for step in steps), name
        assert steps[0]["uses"].startswith("actions/checkout@"), name
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d[\d.]*", step["uses"]) for step in steps if "uses" in step), name
        found = [problem for step in steps if "run" in step for problem in problems(step["run"])]
        assert found == [], f"{path.name}: the job {name} names {found}"


def test_every_system_and_both_ends_of_the_versions_are_tested() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    systems = {job["runs-on"] for job in jobs.values()} | {
        system for job in jobs.values() for system in job.get("strategy", {}).get("matrix", {}).get("os", ())
    }
    assert {system.partition("-")[0] for system in systems if "{" not in system} == {"ubuntu", "macos", "windows"}
    commands = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert "make test" in commands["linux"]
    assert "make docs" in commands["docs"]
    assert "lower_bounds.py" in commands["lower-bounds"]
    assert jobs["no-compiler"]["env"]["CC"] == "false"
    assert "smoke.py without-extension" in commands["no-compiler"]
    assert "make" not in commands["other-systems"]  # Windows has none


def test_wheels_are_built_and_tried_for_every_version_of_python_that_is_supported() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["build"] == ["cp311-*", "cp312-*", "cp313-*"]
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert problems(settings["test-command"]) == []
    assert settings["test-command"].endswith("smoke.py with-extension")


def test_the_lower_bounds_are_those_of_the_project() -> None:
    program = ROOT / ".github" / "lower_bounds.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    constraints = dict(line.split("==") for line in done.stdout.split())
    requirements = [*PROJECT["project"]["dependencies"], *EXTRAS["finetune"]]
    assert {*constraints} == {requirement.partition(">=")[0] for requirement in requirements}
    for requirement in requirements:
        name, _, version = requirement.partition(">=")
        assert constraints[name].removesuffix(".*").startswith(version)


@pytest.mark.slow
def test_the_smoke_test_converts_and_refuses_another_install_than_expected(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SMOKE), *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = {kind: run(kind) for kind in ("with-extension", "without-extension")}
    assert sorted(found.returncode for found in done.values()) == [0, 1]
    assert any("converted 15 sites" in found.stdout for found in done.values())
    assert any("found the extension" in found.stderr for found in done.values())
    assert "expected with-extension or without-extension" in run().stderr
    assert list(tmp_path.iterdir()) == []


def test_hooks_before_a_commit_use_the_linter_that_is_allowed() -> None:
    repositories = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: repository for repository in repositories for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy", "end-of-file-fixer", "trailing-whitespace"} <= set(hooks)
    (bound,) = (name.partition(">=")[2] for name in EXTRAS["dev"] if name.startswith("ruff>="))
    ruff = tuple(map(int, hooks["ruff-check"]["rev"].removeprefix("v").split(".")))
    assert ruff >= tuple(map(int, bound.split(".")))


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert (paper["authors"][0]["family-names"], paper["year"]) == ("Luo", 2019)


def test_the_guide_for_contributors_is_short_and_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 45
    assert {name for name in re.findall(r"`make ([a-z-]+)`", text) if name not in TARGETS} == set()
    assert [target for target in re.findall(r"\]\(([^)#]+)", text) if not (ROOT / target).exists()] == []
    assert [name for name in re.findall(r"`([\w./-]+/)`", text) if not (ROOT / name).exists()] == []
