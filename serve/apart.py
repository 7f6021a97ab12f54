"""Work with torch beside the decoder's thread, without threads of it that stay behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def apart(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The function's result, from a thread that ends with it.

    OpenMP gives every thread that computes a team of its own, which lives as long as that thread.
    Where teams together have more threads than the process has CPUs, libgomp lets all of them
    sleep at once where they would wait awake, and a round of small operators is twice as slow. So
    whatever computes before or beside the decoder does it here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as thread:
        return thread.submit(function, *args, **kwargs).result()
