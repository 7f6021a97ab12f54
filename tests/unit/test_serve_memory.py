"""serve.memory: what is free is given back."""

from __future__ import annotations

import platform

import psutil
import pytest

from serve.memory import Trimmer

# Below what the C library asks of the system in one piece.
BLOCK, COUNT = 100_000, 2_000


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_free_memory_below_what_lives_is_given_back() -> None:
    trimmer = Trimmer(every_s=0.0)
    trimmer.look()
    blocks = [bytearray(b"x") * BLOCK for _ in range(COUNT)]
    full = resident()
    # One in twenty lives on, so the gaps are all over.
    kept = blocks[::20]
    del blocks
    trimmer.look()
    assert full - resident() > BLOCK * COUNT * 0.7
    assert len(kept) == COUNT // 20


def test_it_is_done_now_and_then_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmer, calls = Trimmer(every_s=3600.0), list[int]()
    monkeypatch.setattr(trimmer, "_trim", lambda size: calls.append(size.value))
    trimmer.look()
    assert calls == []
    monkeypatch.setattr(trimmer, "_every_s", 0.0)
    trimmer.look()
    assert calls == [0]
