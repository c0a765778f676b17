"""run.yaml and `key=value` arguments into a checked `RunConfig`: built-in < YAML < `key=value`."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pcscale.common.errors import RequestError
from pcscale.config.schema import GROUPS, RunConfig

Settings = TypeVar("Settings", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice instead of dropping the first."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    scalars = (key_node for key_node, _ in node.value if isinstance(key_node, yaml.ScalarNode))
    for key_node in scalars:  # The loader itself refuses lists and mappings as keys.
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key_node.value}' stands twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    # A ValueError: what looks like a date and is none. A RecursionError: thousands of brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise RequestError(f"{where} is not valid YAML: {problem}.") from None


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist. Name a run.yaml.") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise RequestError(f"{path} cannot be read as text ({error}). Name a run.yaml.") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no settings. Write one `key: value` a line.")
    return values


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` with every `key=value` put in; a dot reaches into a group (`data.train=file.txt`)."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RequestError(f"'{override}' is not of the form key=value.")
        group, dot, inner = key.partition(".")
        target = merged
        if dot:
            target = merged[group] = {} if merged.get(group) is None else merged[group]
            if not isinstance(target, dict):
                raise RequestError(f"{group} holds no settings of its own, so {key} cannot be set.")
        target[inner if dot else key] = _parse_yaml(text, f"the value of {key}")
    return merged


def check_settings(model: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """The settings that a mapping holds.

    Raises:
        RequestError: the first thing that is wrong: an unknown key (with the nearest known one), type or range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestError(f"{where}: {_explain(error, model)}") from None


def check_values(values: dict[str, Any], where: str) -> RunConfig:
    """The settings of a run that a mapping holds; raises as `check_settings`."""
    return check_settings(RunConfig, values, where)


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of the run described in a YAML file and by `key=value` arguments."""
    return check_values(apply_overrides(read_values(path), overrides), str(path))


def dump_run_config(config: RunConfig) -> str:
    """The settings, every one of them, as YAML."""
    values = config.model_dump(mode="json")
    first = {key: values.pop(key) for key in ("base", "output", "data")}
    return yaml.safe_dump(first | values, sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    problems = error.errors(include_url=False)
    # An unknown key is most often the cause of a missing one: name it first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    if problem["type"] == "extra_forbidden":
        group, dot, inner = key.rpartition(".")
        known = list((GROUPS[group] if dot else model).model_fields)
        if not dot and model is RunConfig:
            known += ["data.train", "data.validation"]
        nearest = difflib.get_close_matches(inner, known, n=1, cutoff=0.0)
        return f"{key} is not a setting. Did you mean '{group + dot}{nearest[0]}'?"
    if problem["type"] == "missing":
        return f"{key} is not set and has no default. Add it."
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if not key or message.startswith("'"):
        return f"{key}: {message}." if key else f"{message}."
    if problem["type"] in ("literal_error", "none_required") and key in ("report_to", *model.model_fields):
        message = f"this version takes only {message.removeprefix('Input should be ')}"
    return f"{key} is {problem['input']!r}: {message[0].lower()}{message[1:]}."
