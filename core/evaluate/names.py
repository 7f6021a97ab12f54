"""How figures and ways of decoding are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.evaluate.peers import LLAMA_CPP, VLLM, VLLM_CHAIN, VLLM_NGRAM
from core.evaluate.speculation import BASELINE, HF_GENERATE, HF_LOOKUP
from core.evaluate.ways import CHOSEN, COPIES_ALONE, WITHOUT_COPIES


def times(row: Mapping[str, Any], name: str) -> str:
    """A ratio and its interval: `1.34× (1.28–1.41)`."""
    value, interval = row[name], row[f"{name}_interval"]
    if value is None:
        return "–"
    return f"{value:.2f}×" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")


def way_name(report: Mapping[str, Any], way: str) -> str:
    """For people."""
    settings, auto = report["settings"], report["calibration"] is not None
    nodes = report["chosen"]["total_tokens"]
    names = {
        BASELINE: "autoregressive (baseline)",
        CHOSEN: "chosen trees (auto)" if auto else f"chosen tree, {nodes} nodes",
        WITHOUT_COPIES: f"chosen tree{'s' if auto else ''}, without copies",
        COPIES_ALONE: "copies alone",
        HF_GENERATE: "HF generate",
        HF_LOOKUP: f"HF prompt lookup, {settings.get('hf_lookup_tokens')} tokens",
        VLLM: "vLLM",
        VLLM_NGRAM: f"vLLM, copies of {settings.get('vllm_drafts')} tokens",
        VLLM_CHAIN: f"vLLM, the head's chains of {settings.get('vllm_drafts')}",
        LLAMA_CPP: "llama.cpp",
    }
    if way in names:
        return names[way]
    kind, size, *depth = way.split("_")
    name = f"{'tree of' if kind == 'tree' else 'untrained head,'} {size} nodes"
    return name + (f", depth {depth[-1]}" if depth else "")
