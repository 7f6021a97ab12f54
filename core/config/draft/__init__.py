"""Draft algorithms' configurations, found by looking into this folder.

Adding an algorithm means adding a module here whose config class derives from `DraftConfig`,
has `kind: Literal["<name>"]`, and names its implementation. Nothing else lists algorithms.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any, Union

from pydantic import Field

from core.config.draft.common import DraftConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

DRAFT_CONFIGS: dict[str, type[DraftConfig]] = {
    cls.model_fields["kind"].default: cls
    for cls in sorted(DraftConfig.__subclasses__(), key=lambda cls: cls.__name__)
}

DEFAULT_DRAFT_KIND = "eagle1"

# Any, since a union made at run time is nothing a type checker can follow.
AnyDraftConfig: Any = Annotated[Union[tuple(DRAFT_CONFIGS.values())], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["DEFAULT_DRAFT_KIND", "DRAFT_CONFIGS", "AnyDraftConfig", "DraftConfig"]
