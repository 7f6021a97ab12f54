"""YAML and `section.field=value` overrides to a `Config`, and its documentation for `--help`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from core.config.base import Section
from core.config.draft import DRAFT_CONFIGS
from core.config.explain import explain
from core.config.schema import Config
from core.errors import ConfigError


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and lay the overrides over it.

    Args:
        path: a YAML file, or None for defaults alone.
        overrides: `output=/data/run`, `train.lr=1e-4`; values are YAML.
    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of bounds.
    """
    values = read_values(path) if path else {}
    for override in overrides:
        lay_over(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path or 'the command line'}: {explain(error, Config)}") from error


def describe(sections: Iterable[str]) -> str:
    """One line a field, `section.field=default  meaning`, for the sections or fields named."""
    lines = []
    seen = ""
    for name in ("output", "overwrite"):
        lines.append(_describe_field(name, Config, name))
    for one in sections:
        section, _, only = one.partition(".")
        if section == "draft":
            for kind, cls in DRAFT_CONFIGS.items():
                lines.append(f"\n  draft, where draft.kind={kind}: {_summary(cls)}")
                lines += [_describe_field(f"draft.{name}", cls, name) for name in cls.model_fields]
            continue
        cls = type(getattr(Config(), section))
        if section != seen:
            lines.append(f"\n  {section}: {_summary(cls)}")
        seen = section
        names = [only] if only else cls.model_fields
        lines += [_describe_field(f"{section}.{name}", cls, name) for name in names]
    return "\n".join(lines)


def _summary(cls: type[Section]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _describe_field(name: str, cls: type[Section], key: str) -> str:
    info = cls.model_fields[key]
    default = "null" if info.default is None else info.default
    if isinstance(default, tuple):
        default = list(default)
    return f"    {f'{name}={default}':<38} {info.description or ''}".rstrip()


def read_values(path: str) -> dict[str, Any]:
    """The sections of a config file, not yet held against the schema.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config {path}: no such file ({file.absolute()})")
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections, got {type(values).__name__}")
    # A section whose lines are all commented out is an empty one.
    return {key: value for key, value in values.items() if value is not None}


def lay_over(values: dict[str, Any], override: str) -> None:
    """Set a field of sections, by an override as on the command line.

    Raises:
        ConfigError: it is none.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected section.field=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    set_field(values, dotted, _as_number(value) if isinstance(value, str) else value)


def set_field(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a field of sections, by `section.field`.

    Raises:
        ConfigError: what it would be in is a value.
    """
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"override {f'{dotted}={value}'!r}: {parent} is not a section")
    values[leaf] = value


def _as_number(text: str) -> str | float:
    """YAML 1.1 takes `1e-4` for a string; nobody means that."""
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text
