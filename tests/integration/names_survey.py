"""Imports what `old_names.json` lists, in a process of its own, and prints as JSON what became of each name.

Run as a program, since a module that other tests have imported under its new name would warn no more.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import normswap

PACKAGE = Path(normswap.__file__).parent


def deprecations(caught: list[warnings.WarningMessage]) -> bool:
    return any(issubclass(w.category, DeprecationWarning) and "normswap" in str(w.message) for w in caught)


def names_at_home(module: str) -> set[str]:
    """The names that need not warn: the file at the place of their old module binds them itself.

    A module that defines nothing and only imports is no home, unless it is a package.
    """
    place = PACKAGE.joinpath(*module.split(".")[1:])
    is_package = (place / "__init__.py").is_file()
    path = place / "__init__.py" if is_package else place.with_suffix(".py")
    if not path.is_file():
        return set()
    defined: set[str] = set()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    return defined | imported if is_package or defined - {"__getattr__", "__dir__"} else set()


def has_file(module: str) -> bool:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return (place / "__init__.py").is_file() or place.with_suffix(".py").is_file()


def survey_module(module: str, names: list[str]) -> dict[str, Any]:
    """Which names are missing, and which should have warned and did not."""
    at_home = names_at_home(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            return {"error": str(error), "optional": not str(error.name).startswith("normswap")}
    if deprecations(caught):
        return {"missing": [name for name in names if not has(found, name)[0]], "silent": []}
    missing, silent = [], [] if names or has_file(module) else ["(the module)"]
    for name in names:
        there, warned = has(found, name)
        if not there:
            missing.append(name)
        elif not warned and name not in at_home:
            silent.append(name)
    return {"missing": missing, "silent": silent}


def has(module: Any, name: str) -> tuple[bool, bool]:
    """Whether a module has a name, and whether asking for it warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = hasattr(module, name)
    return there, deprecations(caught)


def resolve(module: str, qualname: str) -> Any:
    found = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def unresolved_classes() -> tuple[int, list[str]]:
    """How many classes the package has, and those that pickle would not find at `__module__` and `__qualname__`."""
    seen: set[type] = set()
    for info in pkgutil.walk_packages(normswap.__path__, "normswap."):
        if info.name.endswith("__main__") or "._compiled" in info.name:
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("normswap"):
                raise
            continue
        seen |= {v for v in vars(module).values() if inspect.isclass(v) and v.__module__.startswith("normswap")}
    wrong = []
    for cls in seen:
        try:
            if resolve(cls.__module__, cls.__qualname__) is not cls:
                wrong.append(f"{cls.__module__}.{cls.__qualname__}")
        except (ImportError, AttributeError) as error:
            wrong.append(f"{cls.__module__}.{cls.__qualname__}: {error}")
    return len(seen), sorted(wrong)


def others_at_the_top(top: dict[str, str]) -> list[str]:
    """Names whose object at the old home is another one than at the top, or missing at one of the two."""
    found = {name: (of_name(f"{home}.{name}"), of_name(name)) for name, home in top.items()}
    return [name for name, (old, new) in found.items() if old is None or old is not new]


def of_name(name: str) -> Any:
    """An object by its name at the top, or by its old module and name; None if it is gone."""
    module, dot, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last) if dot else getattr(normswap, last)
    except (ImportError, AttributeError):
        return None


def lost_members(members: dict[str, list[str]]) -> list[str]:
    lost = []
    for name, wanted in members.items():
        cls = of_name(name)
        if cls is None:
            lost.append(name)
            continue
        annotated = {key for base in inspect.getmro(cls) for key in inspect.get_annotations(base)}
        lost += [f"{name}.{member}" for member in wanted if not hasattr(cls, member) and member not in annotated]
    return lost


def lost_parameters(parameters: dict[str, list[str]]) -> list[str]:
    lost = []
    for name, wanted in parameters.items():
        function = of_name(name)
        if function is None:
            lost.append(name)
            continue
        found = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
            lost += [f"{name}({parameter})" for parameter in wanted if parameter not in found]
    return lost


def main(path: str) -> None:
    names = json.loads(Path(path).read_text(encoding="utf-8"))
    document: dict[str, Any] = {"modules": {}}
    for module, wanted in names["modules"].items():
        if not module.endswith("__main__"):
            document["modules"][module] = survey_module(module, wanted)
    warnings.simplefilter("ignore")
    document["unpickled"] = []
    for module, name in names["pickled"]:
        try:
            resolve(module, name)
        except (ImportError, AttributeError) as error:
            document["unpickled"].append(f"{module}.{name}: {error}")
    document["undocumented"] = [
        f"{entry['module']}.{entry['name']}"
        for entry in names["documented"]
        if entry["name"] and of_name(f"{entry['module']}.{entry['name']}") is None
    ]
    document["others"] = others_at_the_top(names["top"])
    document["members"] = lost_members(names["members"])
    document["parameters"] = lost_parameters(names["parameters"])
    document["classes"], document["unresolved"] = unresolved_classes()
    print(json.dumps(document))


if __name__ == "__main__":
    main(sys.argv[1])
