"""Work with torch in threads that end."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

from serve.apart import apart


def test_no_thread_of_torchs_stays_behind() -> None:
    """As the replica's decoder would keep on sharing the processor with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = _threads()
        inside = apart(_compute)
        assert inside >= before + 3, "this build of torch computes in threads of OpenMP"
        # They are told to end, and need a moment.
        deadline = time.monotonic() + 30
        while _threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _threads() <= before
    finally:
        torch.set_num_threads(threads)


def test_an_error_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)


def _compute() -> int:
    torch.ones(1 << 20).exp_().sum().item()
    return _threads()


def _threads() -> int:
    return psutil.Process().num_threads()
