"""API keys: who may ask. Keys themselves are stored nowhere, but their SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from core.config import ServeConfig
from core.errors import ConfigError, InputError


def key_hashes(config: ServeConfig) -> tuple[str, ...]:
    """All that the configuration names, from list, file and environment.

    Raises:
        InputError: the file cannot be read, has no key, or a line that is no SHA-256.
        ConfigError: the variable is not set, or empty.
    """
    found = dict.fromkeys(config.api_keys)
    if config.api_keys_file is not None:
        found.update(dict.fromkeys(_of_file(Path(config.api_keys_file))))
    found.update(dict.fromkeys(_of_environment("api_keys_env", config.api_keys_env)))
    return tuple(found)


def admin_key_hashes(config: ServeConfig) -> tuple[str, ...]:
    """The same of the keys for /admin.

    Raises:
        ConfigError: the variable is not set, or empty.
    """
    given = _of_environment("admin_keys_env", config.admin_keys_env)
    return tuple(dict.fromkeys((*config.admin_keys, *given)))


def key_hash(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def known_key(authorization: str, hashes: Collection[str]) -> str | None:
    """The hash of the key that a header `Authorization` carries, if that one may ask."""
    scheme, _, key = authorization.partition(" ")
    # What is compared is the hash: how long that takes says nothing of any key.
    given = key_hash(key.strip())
    return given if scheme.lower() == "bearer" and given in hashes else None


def _of_environment(field: str, name: str | None) -> list[str]:
    if name is None:
        return []
    given = os.environ.get(name, "").replace(",", " ").split()
    if not given:
        raise ConfigError(f"serve.{field}={name}: that variable is not set, or empty")
    return list(map(key_hash, given))


def _of_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"serve.api_keys_file={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"serve.api_keys_file={path} is not in UTF-8; write it anew") from error
    hashes = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().lower()
        if text and not re.fullmatch(r"[0-9a-f]{64}", text):
            raise InputError(
                f"serve.api_keys_file={path}, line {number} is no SHA-256 in hexadecimal; write "
                "`printf %s KEY | sha256sum` there, not the key"
            )
        hashes += [text] if text else []
    if not hashes:
        # Taken as no keys, it would let everybody in.
        raise InputError(f"serve.api_keys_file={path} has no key; write one, or leave the file out")
    return hashes
