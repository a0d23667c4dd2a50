"""Models from architecture names: `timm:NAME`, `torchvision:NAME`, `hf:FOLDER`, `path/file.py:function`.

A name may have keywords: `timm:resnet50,num_classes=10`. Only this module imports model zoos. It downloads nothing and
initializes weights at random, unless the caller passes `pretrained=True`. `check_untrusted_name` checks names that come
from a file, and `permissions` the configuration of a folder, so that neither can run code, download or open anything.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from normswap.checkpoints.architecture import efficientnet_pytorch
from normswap.checkpoints.architecture.initialization import WithoutInitialization
from normswap.checkpoints.architecture.permissions import check_folder_configuration, check_keywords
from normswap.errors import ArchitectureError
from normswap.text import first_line

_BUILDER_NAME = re.compile(r"(build|make|create|get|model|net)", re.IGNORECASE)
_MAX_KEYWORDS = 12
_WEIGHT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
# Keywords that load weights; the weights come from the checkpoint.
_WEIGHT_KEYWORDS = re.compile(r"pretrained|checkpoint|weights|cache_dir|progress")
_MAX_CHARACTERS = 4_000
_SAME_FOLDER = "."  # the folder with the record


@dataclass(frozen=True)
class ArchitectureName:
    """A parsed architecture name: zoo (or `hf`, `file`), model, keywords of its builder."""

    scheme: str
    model: str
    keywords: Mapping[str, Any]


_Builder = Callable[[ArchitectureName], object]


def parse_architecture(text: str) -> ArchitectureName:
    """Return the parts of `scheme:NAME[,key=value...]`; values are Python literals, or else strings.

    Raises:
        ArchitectureError: no scheme or an unknown one, no name, or an invalid keyword or one that loads weights.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ArchitectureError(
            f"architecture {text[:40]!r}...: expected at most {_MAX_CHARACTERS:,} characters, got {len(text):,}"
        )
    # A comma separates only in front of a keyword, so that values can be tuples.
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
    """Return whether building this architecture runs a Python file that is not an installed package."""
    return parse_architecture(text).scheme == "file"


def describe_external_source(text: str) -> str | None:
    """Return why the architecture in a record is not built without the user's consent, and what to type for it.

    Returns:
        A predicate for an error message; None for models of timm and torchvision, and for `trust_remote_code`, which
        `check_untrusted_name` refuses.
    """
    name = parse_architecture(text)
    if name.scheme == "file":
        return (
            f"has its architecture in a Python file, which would be run: pass architecture={text!r} if you trust this "
            "file"
        )
    if name.scheme != "hf" or name.keywords.keys() & {"trust_remote_code"}:
        return None
    if name.model == _SAME_FOLDER:
        return "has its architecture in the config.json of a folder: pass architecture='hf:FOLDER' with that folder"
    return (
        f"has its architecture in the config.json of another folder: pass architecture={text!r} if you trust this "
        "folder, with its new path if it has moved"
    )


def check_untrusted_name(text: str, *, folder: Path | None = None) -> None:
    """Refuse an architecture that a file may not name; models of timm and torchvision with listed keywords pass.

    Args:
        text: the architecture name.
        folder: the folder with the file, whose own configuration passes too.

    Raises:
        ArchitectureError: as `parse_architecture`; or it is in a file or another folder, or has another keyword.
    """
    name = parse_architecture(text)
    if name.scheme not in _ZOOS and not (folder is not None and refers_to_folder(text, folder)):
        raise ArchitectureError("it is in another file or folder, which normswap opens only if you pass its name")
    check_keywords("it", name.keywords)


def refers_to_folder(text: str, folder: Path) -> bool:
    """Return whether this architecture is the one in the configuration of `folder`."""
    name = parse_architecture(text)
    return name.scheme == "hf" and (name.model == _SAME_FOLDER or Path(name.model).resolve() == folder.resolve())


def with_folder(text: str, folder: Path | str) -> str:
    """Return an architecture `hf:FOLDER` with another folder and the same keywords."""
    name = parse_architecture(text)
    return _format_name(f"{name.scheme}:{folder}", name.keywords)


def make_folder_relative(text: str | None, folder: Path) -> str | None:
    """Return an architecture for the record in `folder`, with `.` instead of the path if it is in this folder."""
    return with_folder(text, _SAME_FOLDER) if text is not None and refers_to_folder(text, folder) else text


def check_architecture(text: str) -> ArchitectureName:
    """Return the parts of `text` if the zoo has the model, or the folder or file exists; this runs no code.

    Raises:
        ArchitectureError: as `parse_architecture`; or the model, folder or file does not exist.
    """
    name = parse_architecture(text)
    if name.scheme in ("hf", "file"):
        path = Path(name.model) / "config.json" if name.scheme == "hf" else _split_function(name)[0]
        if not path.is_file():
            raise ArchitectureError(f"architecture {text!r}: expected the file {path}, which does not exist")
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


def build_architecture(
    text: str, *, pretrained: bool = False, trust: bool = False, initialized: bool = True
) -> nn.Module:
    """Build the model with the name `text`, with random weights. For a Python file this runs the file.

    Args:
        text: the architecture name.
        pretrained: whether to download the published weights of a timm model.
        trust: whether the `config.json` of a folder may name code, which is then run.
        initialized: whether the parameters of a model of timm or torchvision need values; without them it is built
            faster, for a file that has all of them.

    Raises:
        ArchitectureError: as `check_architecture`; the configuration of a folder names code or other files; or the
            builder fails or does not return a module.
    """
    name = check_architecture(text)
    if name.keywords.get("trust_remote_code") and not trust:
        raise ArchitectureError(f"{text}: trust_remote_code runs Python code in the folder: pass trust=True")
    if pretrained:
        if name.scheme != "timm":
            raise ArchitectureError(f"{text}: only timm:NAME has published weights to download: pass a checkpoint")
        name = replace(name, keywords={**name.keywords, "pretrained": True})
    own: dict[str, _Builder] = {"hf": partial(_build_hf, trust=trust), "file": _build_from_file}
    build = own.get(name.scheme, _build_from_zoo)
    skips_values = build is _build_from_zoo and not initialized and not pretrained
    try:
        with WithoutInitialization() if skips_values else nullcontext():
            model: object = build(name)
    except ArchitectureError:
        raise
    except Exception as error:
        raise ArchitectureError(f"{text}: its builder failed: {first_line(error)}{_suggest_keyword(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"{text}: expected a function that returns a module, got {type(model).__name__}")
    return model


def get_key_renaming(model: nn.Module) -> Callable[[str], str] | None:
    """Return the function from the key of a tensor in a file of a library to its name in `model`.

    efficientnet-pytorch has other names than timm for the same networks. transformers saves models with the names of
    their first version and renames tensors on loading; conversions other than a renaming, such as one matrix split
    into three, are not applied. None for models of other libraries.
    """
    in_timm = efficientnet_pytorch.names_for_model(model)
    if in_timm is not None:
        return in_timm
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # versions before 5 save the names in the model
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    own, prefix = model.state_dict(), model.base_model_prefix
    return lambda name: str(rename_source_key(name, renamings, [], prefix or None, own)[0])


def default_input_shape(model: nn.Module, architecture: str | None) -> tuple[int, ...] | None:
    """Return the shape (2, C, H, W) of an input with the size from timm's configuration of the model, or None.

    The keywords `in_chans` and `img_size` of the architecture replace the values in the configuration.
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
    """The error message for a name that starts with no known zoo, with what to type instead."""
    path = Path(whole.rstrip(":"))
    if text == "none":
        return "architecture 'none' builds no model, which is needed here: pass timm:NAME, or path/file.py:function"
    if path.suffix == ".py":
        found = _find_builders(path)
        example = f"such as {path}:{found[0]}; it defines {', '.join(found)}" if found else f"such as {path}:build"
        missing = "" if path.is_file() else f" (the file {path} does not exist)"
        return f"architecture {text!r}: expected path/file.py:function to build the model, {example}{missing}"
    if path.suffix in _WEIGHT_SUFFIXES:
        return (
            f"architecture {text!r}: expected a model, got a file of weights: pass timm:NAME, or path/file.py:function"
        )
    zoo, _, model = whole.replace("torchvision.models.", "torchvision:").replace("/", ":").rpartition(":")
    zoo = next((known for known in _ZOOS if known in zoo), "timm")
    return (
        f"architecture {text!r}: expected one of {', '.join(f'{zoo}:NAME' for zoo in _ZOOS)}, hf:FOLDER, or "
        f"path/file.py:function for your own model, such as {zoo}:{model}"
    )


def _find_builders(path: Path) -> list[str]:
    """The functions and classes that a Python file defines, the most likely builders first; this does not run it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found.sort(key=lambda node: (not _BUILDER_NAME.match(node.name), isinstance(node, ast.ClassDef)))
    return [node.name for node in found if not node.name.startswith("_")]


def _suggest_models(name: ArchitectureName, names: list[str]) -> str:
    """Another zoo that has the model, or models with similar names."""
    other = next((zoo for zoo in _ZOOS if zoo != name.scheme and name.model in _ZOOS[zoo].names()), None)
    if other is not None:
        return f"{other} has: {other}:{name.model}"
    near = difflib.get_close_matches(name.model.lower().replace("-", "_"), names, n=3)
    return f"nearest: {', '.join(near or ['none, see its list_models()'])}"


def _suggest_keyword(error: BaseException) -> str:
    """The nearest known keyword if the error is about an unexpected one, or the list of known keywords."""
    match = re.search(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return ""
    accepted: set[str] = set()
    trace = error.__traceback__
    while trace is not None:
        # Python never entered the function; its caller has it under some name.
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
        raise ArchitectureError(f"architecture {text!r}: remove {key!r}, the weights come from the checkpoint")
    if value in ("true", "false", "none"):
        raise ArchitectureError(f"architecture {text!r}: expected a Python value, write {key}={value.capitalize()}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two for deep nesting
        return key, value


def _build_from_zoo(name: ArchitectureName) -> nn.Module:
    return _ZOOS[name.scheme].build(name.model, **name.keywords)


def _split_function(name: ArchitectureName) -> tuple[Path, str]:
    path, _, function = name.model.rpartition(":")
    return Path(path), function


def _build_hf(name: ArchitectureName, *, trust: bool) -> nn.Module:
    """The model in the config.json of a folder, from timm or transformers."""
    folder = Path(name.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ArchitectureError(f"hf:{folder}: config.json: expected a JSON object, got {type(config).__name__}")
    if not trust:
        config = check_folder_configuration(folder, {**config, **name.keywords}, models=_timm_names)
    if isinstance(config.get("architecture"), str) and "model_type" not in config:  # else a wrapper of transformers
        known = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
        model_args = config.get("model_args") or {}
        return _build_timm(config["architecture"], **{**known, **model_args, **name.keywords})
    return _build_transformers(folder, config, name.keywords, trust=trust)


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
        # Built from the checked values: from_pretrained would read the folder again, perhaps another file in it.
        kind = transformers.CONFIG_MAPPING[str(config.get("model_type"))]
        settings = kind.from_dict(config, **keywords)
    build: Any = cls.from_config if cls is transformers.AutoModel else cls
    model: nn.Module = build(settings)
    return model


def import_python_file(path: Path) -> ModuleType:
    """Run a Python file that is not an installed package, and return its module.

    Raises:
        ArchitectureError: the file is not a Python file, or does not exist.
    """
    spec = importlib.util.spec_from_file_location(f"normswap_architecture_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ArchitectureError(f"{path}: expected a Python file")
    if not path.is_file():
        raise ArchitectureError(f"{path}: no such file: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    # Before the module runs, since dataclasses and pickles of its classes look it up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _build_from_file(name: ArchitectureName) -> object:
    path, function = _split_function(name)
    module = import_python_file(path)
    build = getattr(module, function, None)
    if not callable(build):
        found = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        near = difflib.get_close_matches(function, found, n=3) or _find_builders(path) or ["none"]
        raise ArchitectureError(f"{path}: has no function {function!r}; nearest: {', '.join(near)}")
    return build(**name.keywords)


class _Zoo(NamedTuple):
    names: Callable[[], list[str]]
    build: Callable[..., nn.Module]


# Results are annotated here, since only some versions of the zoos have type hints.


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
    # Detectors download weights for their backbone by default; two old classifiers warn about slow initialization.
    off = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = builder(**off, **slow | keywords)
    return model


_ZOOS: Mapping[str, _Zoo] = {
    "timm": _Zoo(_timm_names, _build_timm),
    "torchvision": _Zoo(_torchvision_names, _build_torchvision),
}
