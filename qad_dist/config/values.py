"""The values of a config before they are checked: a YAML file, overrides, environment variables."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from shards.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys (PyYAML keeps the last one silently) and aliases (billion laughs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: names must be text, got {key!r}; quote it")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} appears twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_values(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        ConfigError: It cannot be read, is not YAML, repeats a key, or holds something else than names and values.
    """
    try:
        if not path.is_file():  # also keeps a FIFO or /dev/zero from being opened
            raise ConfigError(f"--config must be a YAML file, got {str(path)!r}; see configs/ for examples")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} must be smaller than {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}")
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except OSError as cause:
        raise ConfigError(f"{path} must be readable, got {cause.strerror!r}; mend its permissions") from cause
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as cause:
        if isinstance(cause, ConfigError):
            raise
        raise ConfigError(f"{path} must be YAML, got: {' '.join(str(cause).split())}") from cause
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, got {type(values).__name__}; see configs/toy.yaml")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what a ``section.name=value`` says, the value in YAML's notation.

    Raises:
        ConfigError: It does not say that, or its name is that of a value's inside.
    """
    name, separator, text = override.partition("=")
    parts = name.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set must look like section.name=value, got {override!r}; e.g. --set train.steps=100")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, ValueError) as cause:
        raise ConfigError(f"--set {name} must have a YAML value, got {text!r}; quote it") from cause
    section = values
    for depth, part in enumerate(parts[:-1]):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            inner = ".".join(parts[: depth + 1])
            raise ConfigError(f"--set {name} must name a setting, got a path through the value {inner!r}")
    section[parts[-1]] = value


def expand(value: Any, where: str) -> Any:
    """Put environment variables in the place of ``${QAD_NAME}``, in texts at any depth.

    Raises:
        ConfigError: The variable has another name, or there is none; ``where`` is the setting.
    """
    if isinstance(value, dict):
        return {key: expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if not name.startswith("QAD_"):
            raise ConfigError(f"{where} may only use ${{QAD_...}} variables, got ${{{name}}}; write the value out")
        if name not in os.environ:
            raise ConfigError(f"{where} needs the environment variable {name}, got none; export {name}=...")
        return os.environ[name]

    return re.sub(r"\$\{([^}]*)\}", replace, value)
