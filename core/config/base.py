"""What all config sections share: frozen, typed, unknown keys are errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One section of the configuration."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


def field(default: Any, doc: str, **limits: Any) -> Any:
    """A field with its meaning (and unit), shown by `--help`."""
    return Field(default, description=doc, **limits)


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """A field that cannot change a stage's result, such as a path or a worker's CPU count.

    It stays out of the stage's identity, so changing it redoes nothing (inputs count by content).
    """
    return Field(default, description=doc, json_schema_extra={"identity": False}, **limits)
