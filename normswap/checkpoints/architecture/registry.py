"""Architectures by name -> nn.Module: `timm:NAME`, `torchvision:NAME`, `hf:FOLDER`, `path/file.py:function`.

Each may be followed by `,key=value...`. The only room that imports model zoos. Unless published weights are asked
for, nothing is downloaded and weights are random. A name that comes from a file goes through `check_untrusted_name`
first, and the configuration of a folder is checked by the same rules: neither runs, fetches or opens anything.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from normswap.checkpoints.architecture.permissions import check_configuration, check_keywords
from normswap.errors import ArchitectureError
from normswap.text import first_line

_BUILDER_NAME = re.compile(r"(build|make|create|get|model|net)", re.IGNORECASE)
_MAX_KEYWORDS = 12
_WEIGHT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
# Keywords that fetch or read weights: the weights come from the file alone.
_WEIGHT_KEYWORDS = re.compile(r"pretrained|checkpoint|weights|cache_dir|progress")
_MAX_CHARACTERS = 4_000
_SAME_FOLDER = "."  # the folder that is opened


@dataclass(frozen=True)
class ArchitectureName:
    """A parsed architecture name: which zoo, which model, with which keywords."""

    scheme: str
    model: str
    keywords: Mapping[str, Any]


_Builder = Callable[[ArchitectureName], object]


def parse_architecture(text: str) -> ArchitectureName:
    """Return the parts of `scheme:NAME[,key=value...]`; values are Python literals, or else strings.

    Raises:
        ArchitectureError: no or an unknown scheme, no name, or a keyword that is none or concerns weights.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ArchitectureError(
            f"architecture {text[:40]!r}...: expected at most {_MAX_CHARACTERS:,} characters, got {len(text):,}"
        )
    # A comma separates only where a keyword follows, so that values can be tuples.
    whole, *pairs = re.split(r",(?=\s*\w+\s*=)", text)
    keywords = dict(_parse_keyword(text, pair) for pair in pairs)
    if re.search(r"\.py:\w+$", whole):
        return ArchitectureName("file", whole, keywords)
    scheme, colon, model = whole.partition(":")
    if not colon or scheme not in (*_ZOOS, "hf"):
        raise ArchitectureError(_unknown_scheme(text, whole))
    if not (model if scheme == "hf" else re.fullmatch(r"[\w.\-]+", model)):
        raise ArchitectureError(f"architecture {text!r}: expected {scheme}:NAME[,key=value...], got the name {model!r}")
    return ArchitectureName(scheme, model, keywords)


def runs_python_file(text: str) -> bool:
    """Say whether building this architecture runs code of a file that is no installed package."""
    return parse_architecture(text).scheme == "file"


def describe_external_source(text: str) -> str | None:
    """Return that an architecture is in a file or folder that a record only names, and what to type to open it.

    Returns:
        None for a model of timm or torchvision, for the folder that is opened, and with keywords that no file may set.
    """
    name = parse_architecture(text)
    if name.scheme == "file":
        return (
            f"names the code of its architecture, {text}, which is not run unasked: pass architecture={text!r} if it "
            "is yours"
        )
    if name.scheme != "hf" or name.keywords.keys() & {"trust_remote_code"}:
        return None
    if name.model == _SAME_FOLDER:
        return "is built from the config.json of a folder: pass architecture='hf:FOLDER' with that folder"
    return (
        f"is built from the config.json in {name.model}, a folder that is not opened unasked: pass "
        f"architecture={text!r} if it is yours, with its new path if it has moved"
    )


def check_untrusted_name(text: str, *, folder: Path | None = None) -> None:
    """Refuse an architecture that a file may not name: only models of timm and torchvision, with listed keywords.

    Args:
        folder: the folder that is opened, whose own configuration may be meant.

    Raises:
        ArchitectureError: as `parse_architecture`; or it opens a file or a folder, or has another keyword.
    """
    name = parse_architecture(text)
    if name.scheme not in _ZOOS and not (folder is not None and refers_to_folder(text, folder)):
        raise ArchitectureError("it is in a file or folder elsewhere, which is not opened unasked")
    check_keywords("it", name.keywords)


def refers_to_folder(text: str, folder: Path) -> bool:
    """Say whether this architecture is the one that the configuration in `folder` describes."""
    name = parse_architecture(text)
    return name.scheme == "hf" and (name.model == _SAME_FOLDER or Path(name.model).resolve() == folder.resolve())


def with_folder(text: str, folder: Path | str) -> str:
    """Return an architecture `hf:FOLDER` with another folder and the same keywords."""
    name = parse_architecture(text)
    return _format_name(f"{name.scheme}:{folder}", name.keywords)


def make_folder_relative(text: str | None, folder: Path) -> str | None:
    """Return an architecture as the record in `folder` names it: the configuration beside it without a path."""
    return with_folder(text, _SAME_FOLDER) if text is not None and refers_to_folder(text, folder) else text


def check_architecture(text: str) -> ArchitectureName:
    """Return the parts of `text` if its zoo has the model, or the folder or file is there; no code is run.

    Raises:
        ArchitectureError: as `parse_architecture`; or the zoo does not have it, with the nearest names.
    """
    name = parse_architecture(text)
    if name.scheme in ("hf", "file"):
        path = Path(name.model) / "config.json" if name.scheme == "hf" else _split_function(name)[0]
        if not path.is_file():
            raise ArchitectureError(f"architecture {text!r}: expected the file {path}, which is not there")
        return name
    names = _ZOOS[name.scheme].names()
    if name.model.partition(".")[0] not in names:
        raise ArchitectureError(f"{name.scheme} has no model {name.model!r}; {_suggest_models(name, names)}")
    return name


def with_keyword(text: str, key: str, value: Any) -> str:
    """Return the architecture `text` with one keyword set."""
    name = parse_architecture(text)
    start = name.model if name.scheme == "file" else f"{name.scheme}:{name.model}"
    return _format_name(start, {**name.keywords, key: value})


def build_architecture(text: str, *, pretrained: bool = False, trust: bool = False) -> nn.Module:
    """Build the model that `text` names, with random weights. A Python file is run for it.

    Args:
        pretrained: fetch the published weights instead, of a timm model.
        trust: let the `config.json` of a folder name code, which is then run.

    Raises:
        ArchitectureError: as `check_architecture`; the configuration of a folder names code or other files; or the
            builder fails or returns no module.
    """
    name = check_architecture(text)
    if name.keywords.get("trust_remote_code") and not trust:
        raise ArchitectureError(f"{text}: trust_remote_code runs Python code of the folder: add trust=True")
    if pretrained:
        if name.scheme != "timm":
            raise ArchitectureError(f"{text}: published weights are fetched for timm:NAME only: give a checkpoint")
        name = replace(name, keywords={**name.keywords, "pretrained": True})
    own: dict[str, _Builder] = {"hf": partial(_build_hf, trust=trust), "file": _build_from_file}
    build = own.get(name.scheme, _build_from_zoo)
    try:
        model: object = build(name)
    except ArchitectureError:
        raise
    except Exception as error:
        raise ArchitectureError(f"{text}: cannot be built: {first_line(error)}{_suggest_keyword(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"{text}: expected a function that returns a module, got {type(model).__name__}")
    return model


def get_key_renaming(model: nn.Module) -> Callable[[str], str] | None:
    """Return what makes the name of a tensor in `model` of its name in a file that the model's own library saved.

    transformers saves models under the names that their first version had, and renames when it loads. What it also
    computes, such as three matrices out of one, is left as it is. None for models of other libraries.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before version 5, which saves under the names that the model has
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    own, prefix = model.state_dict(), model.base_model_prefix
    return lambda name: str(rename_source_key(name, renamings, [], prefix or None, own)[0])


def default_input_shape(model: nn.Module, architecture: str | None) -> tuple[int, ...] | None:
    """Return the shape (2, C, H, W) of an input of the real size, or None where nothing tells it.

    timm's configuration of a model tells the size; channels follow the keyword `in_chans` of the architecture.
    """
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not size:
        return None
    keywords = parse_architecture(architecture).keywords if architecture else {}
    size = (keywords.get("in_chans", size[0]), *_to_pair(keywords.get("img_size", size[1:])))
    return (2, *(int(length) for length in size))


def _format_name(start: str, keywords: Mapping[str, Any]) -> str:
    return ",".join([start, *(f"{key}={value!r}" for key, value in keywords.items())])


def _unknown_scheme(text: str, whole: str) -> str:
    """What to type instead of a name that begins with no zoo."""
    path = Path(whole.rstrip(":"))
    if text == "none":
        return "architecture 'none' builds no model, and one is needed here: pass timm:NAME, or path/file.py:function"
    if path.suffix == ".py":
        found = _find_builders(path)
        which = f"such as {path}:{found[0]}; in it are {', '.join(found)}" if found else f"such as {path}:build"
        missing = "" if path.is_file() else f" (and there is no file {path})"
        return f"architecture {text!r}: expected the function or class that builds the model too, {which}{missing}"
    if path.suffix in _WEIGHT_SUFFIXES:
        return f"architecture {text!r}: a file of weights builds no model: pass timm:NAME, or path/file.py:function"
    zoo, _, model = whole.replace("torchvision.models.", "torchvision:").replace("/", ":").rpartition(":")
    zoo = next((known for known in _ZOOS if known in zoo), "timm")
    return (
        f"architecture {text!r}: expected one of {', '.join(f'{zoo}:NAME' for zoo in _ZOOS)}, hf:FOLDER, or "
        f"path/file.py:function for a model of your own, such as {zoo}:{model}"
    )


def _find_builders(path: Path) -> list[str]:
    """The functions and classes that a Python file defines, the likeliest builders first; it is not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found.sort(key=lambda node: (not _BUILDER_NAME.match(node.name), isinstance(node, ast.ClassDef)))
    return [node.name for node in found if not node.name.startswith("_")]


def _suggest_models(name: ArchitectureName, names: list[str]) -> str:
    """Another zoo that has the model, or models with names like it."""
    other = next((zoo for zoo in _ZOOS if zoo != name.scheme and name.model in _ZOOS[zoo].names()), None)
    if other is not None:
        return f"{other} has: {other}:{name.model}"
    near = difflib.get_close_matches(name.model.lower().replace("-", "_"), names, n=3)
    return f"nearest: {', '.join(near or ['none, see its list_models()'])}"


def _suggest_keyword(error: BaseException) -> str:
    """The keyword that was meant, if a builder was given one that it does not take."""
    match = re.search(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return ""
    accepted: set[str] = set()
    trace = error.__traceback__
    while trace is not None:
        # The function itself was never entered: it is a name that its caller knows.
        for value in {**trace.tb_frame.f_globals, **trace.tb_frame.f_locals}.values():
            owner = match[1].removesuffix(".__init__")
            if callable(value) and getattr(value, "__qualname__", None) == owner:
                accepted |= {*inspect.signature(value).parameters} - {"self", "args", "kwargs"}
        trace = trace.tb_next
    near = difflib.get_close_matches(match[2], sorted(accepted), n=1)
    known = f"; it takes {', '.join(sorted(accepted)[:_MAX_KEYWORDS])}" if accepted else ""
    return f"; did you mean {near[0]}?" if near else known


def _to_pair(size: Any) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _parse_keyword(text: str, pair: str) -> tuple[str, Any]:
    key, value = (part.strip() for part in pair.split("=", 1))
    if _WEIGHT_KEYWORDS.match(key):
        raise ArchitectureError(f"architecture {text!r}: leave {key!r} out, the weights come from the file")
    if value in ("true", "false", "none"):
        raise ArchitectureError(f"architecture {text!r}: expected a Python value, write {key}={value.capitalize()}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as deep nesting raises
        return key, value


def _build_from_zoo(name: ArchitectureName) -> nn.Module:
    return _ZOOS[name.scheme].build(name.model, **name.keywords)


def _split_function(name: ArchitectureName) -> tuple[Path, str]:
    path, _, function = name.model.rpartition(":")
    return Path(path), function


def _build_hf(name: ArchitectureName, *, trust: bool) -> nn.Module:
    """The model that a folder's config.json describes, as timm's or as transformers' own class."""
    folder = Path(name.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ArchitectureError(f"hf:{folder}: config.json is no configuration: expected a JSON object")
    if not trust:
        config = _check_config(folder, {**config, **name.keywords})
    if isinstance(config.get("architecture"), str) and "model_type" not in config:  # else a wrapper of transformers
        known = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
        model_args = config.get("model_args") or {}
        return _build_timm(config["architecture"], **{**known, **model_args, **name.keywords})
    return _build_transformers(folder, config, name.keywords, trust=trust)


def _check_config(folder: Path, config: Any) -> dict[str, Any]:
    """The configuration, if it names nothing but models that are installed."""
    what = f"hf:{folder}: config.json"
    try:
        checked = check_configuration(what, config, models=_timm_names)
        if "architecture" in checked:
            check_keywords(what, {key: checked[key] for key in ("num_classes", "global_pool") if key in checked})
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{error}: name the architecture with architecture=, or pass trust=True if you trust where the folder "
            "comes from"
        ) from None
    return checked


def _build_transformers(folder: Path, config: dict[str, Any], keywords: Mapping[str, Any], *, trust: bool) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ArchitectureError(f"hf:{folder}: needs the package transformers: pip install transformers") from None
    classes = config.get("architectures") or []
    cls = getattr(transformers, classes[0], None) if classes else transformers.AutoModel
    if not (isinstance(cls, type) and (cls is transformers.AutoModel or issubclass(cls, transformers.PreTrainedModel))):
        raise ArchitectureError(f"hf:{folder}: expected a model class of transformers in config.json, got {classes}")
    if trust:
        options = {"trust_remote_code": True, **keywords}
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    else:
        # From what has been checked: from_pretrained reads the folder again, and may choose another file of it.
        kind = transformers.CONFIG_MAPPING[str(config.get("model_type"))]
        settings = kind.from_dict(config, **keywords)
    build: Any = cls.from_config if cls is transformers.AutoModel else cls
    model: nn.Module = build(settings)
    return model


def _build_from_file(name: ArchitectureName) -> object:
    path, function = _split_function(name)
    spec = importlib.util.spec_from_file_location(f"normswap_architecture_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ArchitectureError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses and pickles of its classes look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        found = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        near = difflib.get_close_matches(function, found, n=3) or _find_builders(path) or ["none"]
        raise ArchitectureError(f"{path}: has no function {function!r}; nearest: {', '.join(near)}")
    return build(**name.keywords)


class _Zoo(NamedTuple):
    names: Callable[[], list[str]]
    build: Callable[..., nn.Module]


# The zoos are typed in some of their versions only: results are annotated here.


def _timm_names() -> list[str]:
    import timm

    names: list[str] = timm.list_models()
    return names


def _build_timm(name: str, **keywords: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **{"pretrained": False, **keywords})
    return model


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models()
    return names


def _build_torchvision(name: str, **keywords: Any) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    # Detectors fetch weights for their backbone unless told otherwise; two old classifiers warn of a slow start.
    off = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = builder(**off, **slow | keywords)
    return model


_ZOOS: Mapping[str, _Zoo] = {
    "timm": _Zoo(_timm_names, _build_timm),
    "torchvision": _Zoo(_torchvision_names, _build_torchvision),
}
