"""What `serve run` and Serve's YAML tell the application."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError, model_validator
from ray.serve.exceptions import RayServeException

from core.config import Config
from core.config.explain import explain
from core.config.load import lay_over, read_values, set_field
from core.errors import UserError


class RefusedError(UserError, RayServeException):
    """The application cannot be built; of this kind, Serve's status shows the message alone."""


class Arguments(Config):
    """The configuration's sections.

    As in YAML (`{"target": {"path": …}}`), or as on the command line (`{"target.path": …}`), or
    both; `{"config": "configs/….yaml"}` names a file over which they are laid.
    """

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        file = given.pop("config", None)
        sections = read_values(str(file)) if file is not None else {}
        for name, value in given.items():
            if isinstance(value, str):
                # `serve run` has nothing but text.
                lay_over(sections, f"{name}={value}")
            elif "." in name:
                set_field(sections, name, value)
            else:
                sections[name] = _laid_over(sections.get(name), value)
        return sections

    @classmethod
    def model_validate(cls, obj: Any, **settings: Any) -> Self:
        """As Ray Serve calls it.

        Raises:
            RefusedError: what is wrong with the arguments.
        """
        try:
            return super().model_validate(obj, **settings)
        except ValidationError as error:
            raise RefusedError(f"arguments of the application: {explain(error, Config)}") from error


def _laid_over(below: Any, above: Any) -> Any:
    """A section over another, field by field."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    fields = {name: _laid_over(below.get(name), value) for name, value in above.items()}
    return {**below, **fields}
