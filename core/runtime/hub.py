"""What stands for a hub data set where inputs count by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from core.data.records import HubReader
from core.errors import InputError
from core.paths import write_atomically

CACHE = Path("~/.cache/aerie/hub")


def hub_revision(location: str) -> Path:
    """A file that holds a data set's location and the commit that it is at.

    A location may name a local folder too (`hub:///data/set`), which `datasets` reads alike.

    Raises:
        InputError: the hub does not have it, or cannot be reached.
    """
    reader = HubReader(location)
    folder = Path(reader.dataset)
    if folder.is_absolute():
        if not folder.is_dir():
            raise InputError(f"data.path={location}: no such folder")
        return folder
    try:
        commit = HfApi().dataset_info(reader.dataset, revision=reader.revision).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"data.path={location}: not to be had from the hub ({type(error).__name__}); check the "
            "id, the network, or HF_TOKEN for gated data sets"
        ) from error
    content = f"{location}\n{commit}\n".encode()
    path = CACHE.expanduser() / hashlib.sha256(content).hexdigest()
    write_atomically(path, content)
    return path
