"""What a number of replies comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from core.runtime.load.client import Reply


def percentile(values: Sequence[float], percent: float) -> float | None:
    """None of no values."""
    return float(np.percentile(values, percent)) if values else None


def figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Counts, rates and latencies.

    Rates are over the time from the first request's beginning to the last one's end, so that all
    that was answered was answered in it. Latencies are in seconds.
    """
    whole = [reply for reply in replies if reply.error is None]
    refused = [reply for reply in replies if reply.refused]
    firsts = [reply.first_token_s for reply in whole if reply.first_token_s is not None]
    seconds = span(replies)
    tokens = sum(reply.tokens for reply in whole)
    return {
        "requests": len(replies),
        "answered": len(whole),
        "refused": len(refused),
        "failed": sum(reply.failed for reply in replies),
        "failures": dict(Counter(f"{r.status}: {r.error}" for r in replies if r.failed)),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "requests_per_second": len(whole) / seconds if seconds else None,
        "latency_p50_s": percentile([reply.seconds for reply in whole], 50),
        "latency_p95_s": percentile([reply.seconds for reply in whole], 95),
        "latency_max_s": max((reply.seconds for reply in whole), default=None),
        "first_token_p50_s": percentile(firsts, 50),
        "first_token_p95_s": percentile(firsts, 95),
        "refusal_p50_s": percentile([reply.seconds for reply in refused], 50),
        "refusal_p95_s": percentile([reply.seconds for reply in refused], 95),
    }


def span(replies: Sequence[Reply]) -> float:
    """Seconds from the first one's beginning to the last one's end."""
    if not replies:
        return 0.0
    return max(r.began + r.seconds for r in replies) - min(r.began for r in replies)


def print_rows(title: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A table of some of the figures, a row a name."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in rows.items():
        table.add_row(name, *(shown(row.get(column)) for column in columns))
    Console(width=max(100, 16 * (len(columns) + 1))).print(table)


def print_checks(checks: Mapping[str, bool]) -> None:
    """What was promised, and whether it was kept."""
    for what, kept in checks.items():
        print(f"  {'ok    ' if kept else 'MISSED'}  {what}", flush=True)


def shown(value: Any) -> str:
    """A figure for people."""
    if value is None:
        return "–"
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
