"""The folder formats of draft heads, found by looking into this folder.

Adding a format means adding a module here whose class derives from `HeadFormat`. Nothing else
lists formats: `load_head` asks each whether a folder is its own, `export_draft` those that write.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from core.config import DraftConfig
from core.draft.formats.common import ExportedHead, ExportTarget, HeadFormat, ReadHead
from core.draft.formats.files import HeadFolder
from core.errors import ConfigError, InputError

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

FORMATS: dict[str, HeadFormat] = {
    cls.name: cls() for cls in sorted(HeadFormat.__subclasses__(), key=lambda cls: cls.name)
}
WRITABLE: tuple[str, ...] = tuple(name for name, form in FORMATS.items() if form.holds)


def recognize(folder: Path) -> HeadFormat:
    """The format of a head's folder, by what is in it.

    Raises:
        InputError: no draft head that Aerie reads.
    """
    files = HeadFolder(folder)
    found = [form for form in FORMATS.values() if form.recognizes(files)]
    if not found:
        raise InputError(
            f"draft.path={folder}: no draft head there that Aerie reads; give the folder that "
            f"train_draft wrote (<output>/head), or one with config.json and weights in one of "
            f"the formats {', '.join(FORMATS)}"
        )
    assert len(found) == 1, f"{folder} is taken for {[form.name for form in found]}"
    return found[0]


def read_head(folder: Path) -> ReadHead:
    """A head in any format, with what is known of it; the target's tensors are not attached yet.

    Raises:
        InputError: it is none, is damaged, or does what Aerie's heads do not.
    """
    return recognize(folder).read(HeadFolder(folder))


def writer(name: str, draft: DraftConfig) -> HeadFormat:
    """The format of that name, which must be able to hold a head of that algorithm and settings.

    Raises:
        ConfigError: it does not exist, is only read, or cannot.
    """
    if name not in WRITABLE:
        raise ConfigError(f"export.format={name}: the formats are {', '.join(WRITABLE)}")
    if not (lacking := _lacking(name, draft)):
        return FORMATS[name]
    able = [other for other in WRITABLE if not _lacking(other, draft)]
    what = f"{draft.kind} heads"
    if lacking != (draft.kind,):
        what += f" with {' and '.join(lacking)}"
    advice = [f"choose {' or '.join(able)}"] if able else []
    if lacking != (draft.kind,):
        advice.append("train with " + " ".join(f"draft.{field}=false" for field in lacking))
    raise ConfigError(
        f"export.format={name} cannot hold {what}; {', or '.join(advice) or 'no format can'}"
    )


def _lacking(name: str, draft: DraftConfig) -> tuple[str, ...]:
    """What of a head a format has no place for: its algorithm, or settings of it."""
    holds = FORMATS[name].holds
    if draft.kind not in holds:
        return (draft.kind,)
    return tuple(field for field in holds[draft.kind] if getattr(draft, field))


__all__ = [
    "FORMATS",
    "WRITABLE",
    "ExportTarget",
    "ExportedHead",
    "HeadFolder",
    "HeadFormat",
    "ReadHead",
    "read_head",
    "recognize",
    "writer",
]
