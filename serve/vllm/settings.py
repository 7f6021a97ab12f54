"""How a configuration of Aerie's is said to vLLM, and what of it vLLM cannot do."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import Config
from core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from core.draft.base import DraftHead

FORMAT = "vllm"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of `import vllm`, which imports its torch.
IMPORT_S = 300.0
# vLLM's cache is made of blocks of so many tokens at most, and a request's last one is not full.
BLOCK = 128
# As many as Aerie takes.
STOPS = "16"


# Seen with vLLM 0.32: its sampler is given no temperatures there, and what it draws is nonsense.
ONLY_GREEDY = "on a CPU, vLLM with a draft head samples another text than the model's"


@dataclass(frozen=True)
class Exported:
    """A draft head's folder in vLLM's format, and its algorithm."""

    folder: Path
    kind: str


def chain(config: Config) -> int:
    """Tokens that vLLM drafts a round; 0 decodes plainly."""
    if config.draft.path is None:
        return 0
    decode = config.decode
    deepest = decode.depth + 1
    return deepest if decode.total_tokens == "auto" else min(deepest, decode.total_tokens - 1)


def only_greedy(config: Config) -> bool:
    """Whether its speculation is only right at temperature 0."""
    return chain(config) > 0 and not config.serve.gpus_per_replica


def check(config: Config) -> list[str]:
    """Refuse settings that vLLM cannot honour, before anything is loaded.

    Returns:
        Sentences for the user about what it does otherwise.
    Raises:
        ConfigError: a setting that it has nothing for.
    """
    decode, target = config.decode, config.target
    if target.quantization != "none":
        raise ConfigError(
            f"serve.backend=vllm: target.quantization={target.quantization} is done by Aerie's own "
            "loader; set it to none (vLLM reads checkpoints that are quantized themselves)"
        )
    if target.adapter is not None:
        raise ConfigError(
            f"serve.backend=vllm: target.adapter={target.adapter} is merged by Aerie's own loader; "
            "merge it into a folder first (python -m jobs.convert_model "
            "convert.source=<adapter> target.path=<base>), and serve that"
        )
    if target.device == "cuda" and not config.serve.gpus_per_replica:
        raise ConfigError("serve.backend=vllm: target.device=cuda wants serve.gpus_per_replica > 0")
    if decode.ngram_match:
        raise ConfigError(
            f"serve.backend=vllm: decode.ngram_match={decode.ngram_match} copies into a tree, and "
            "vLLM drafts chains only; set it to 0"
        )
    if not (tokens := chain(config)):
        return []
    if decode.total_tokens != "auto" and decode.total_tokens > decode.depth + 2:
        raise ConfigError(
            f"serve.backend=vllm: decode.total_tokens={decode.total_tokens} with decode.depth="
            f"{decode.depth} is a tree, and vLLM drafts chains only; set it to auto, or to "
            f"{decode.depth + 2} at most"
        )
    if decode.min_p:
        raise ConfigError(
            f"serve.backend=vllm: vLLM has no min_p with a draft head; set decode.min_p=0 (is "
            f"{decode.min_p}), or draft.path to null"
        )
    if decode.temperature and only_greedy(config):
        raise ConfigError(
            f"serve.backend=vllm with decode.temperature={decode.temperature}: {ONLY_GREEDY}; set "
            "it to 0, or draft.path to null"
        )
    return [
        f"vLLM drafts a chain of {tokens} tokens a round (decode.depth + 1), whatever it brings: "
        f"decode.top_k={decode.top_k} and a measured decode.total_tokens are for Aerie's trees"
    ]


def check_python(config: Config) -> str:
    """The version of vLLM in the environment of `serve.vllm_python`.

    Raises:
        InputError: there is no such Python, or none with vLLM.
    """
    python = python_of(config)
    named = f"serve.vllm_python={config.serve.vllm_python or 'null, which is ' + python}"
    if not Path(python).is_file():
        raise InputError(f"{named}: no such file; give the Python of an environment with vLLM")
    code = "import vllm; print('vLLM', vllm.__version__)"
    try:
        done = subprocess.run(
            [python, "-c", code],
            # Not here: our own folders have names that it might import.
            cwd="/",
            env=environment(config),
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{named} cannot be run: {error}") from error
    said = done.stdout.strip().splitlines()
    if done.returncode or not said or not said[-1].startswith("vLLM "):
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:300]
        raise InputError(
            f"{named} does not import vllm ({why}); install it there, or give the Python of an "
            "environment that has it (README, “vLLM's kernels”)"
        )
    return said[-1].removeprefix("vLLM ")


def python_of(config: Config) -> str:
    """The Python that runs vLLM."""
    return os.path.expanduser(config.serve.vllm_python or sys.executable)


def longest(config: Config, target: PretrainedConfig) -> int:
    """Most tokens of prompt and answer together."""
    most = target.get_text_config().max_position_embeddings
    return min(config.decode.max_context, config.decode.cache_tokens, most)


def command(
    config: Config, target: Path, about: PretrainedConfig, head: Exported | None
) -> list[str]:
    """Its OpenAI-compatible server, but for where it listens.

    Args:
        config: sections target, decode, serve.
        target: HF folder.
        about: its config.
        head: that it drafts with.
    """
    from core.draft.formats.vllm import METHODS
    from serve.vllm.requests import MODEL

    decode, serve = config.decode, config.serve
    drafts = 0 if head is None else chain(config)
    arguments: dict[str, str] = {
        "--model": str(target),
        "--served-model-name": MODEL,
        "--dtype": config.target.dtype,
        "--max-model-len": str(longest(config, about)),
        "--max-num-seqs": str(decode.batch_size),
        # A step has a token of everybody who decodes, with its drafts, and then those of prompts.
        "--max-num-batched-tokens": str(decode.prefill_chunk + decode.batch_size * (drafts + 1)),
        "--kv-cache-memory-bytes": str(_cache_bytes(config, about, with_head=head is not None)),
        # What a request does not say is said for it, and not by the model's folder.
        "--generation-config": "vllm",
    }
    flags = ["--enable-prefix-caching" if decode.reuse_prefixes else "--no-enable-prefix-caching"]
    if head is not None:
        speculative = {
            "method": METHODS[head.kind],
            "model": str(head.folder),
            "num_speculative_tokens": drafts,
        }
        arguments["--speculative-config"] = json.dumps(speculative)
        arguments["--per-request-spec-decode-metrics"] = "summary"
    if serve.gpus_per_replica > 1:
        arguments["--tensor-parallel-size"] = str(int(serve.gpus_per_replica))
    if not serve.gpus_per_replica:
        # Compiling takes minutes, and on a CPU brings nothing.
        flags.append("--enforce-eager")
    words = [word for pair in arguments.items() for word in pair]
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    return [python_of(config), *module, *words, *flags, *serve.vllm_arguments]


def environment(config: Config) -> dict[str, str]:
    """The variables of its process: this one's, without what would bring our code in."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        "VLLM_NO_USAGE_STATS": "1",
        # It would bind its threads to CPUs, of two replicas on a machine to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **kept,
        "OMP_NUM_THREADS": str(max(1, int(config.serve.cpus_per_replica))),
        "VLLM_MAX_STOP_STRINGS": STOPS,
    }


def _cache_bytes(config: Config, target: PretrainedConfig, *, with_head: bool) -> int:
    from core.draft.base import TargetGeometry

    geometry, text = TargetGeometry.of(target), target.get_text_config()
    tokens = (math.ceil(config.decode.cache_tokens / BLOCK) + 2) * BLOCK
    # The draft head has a layer too.
    layers: int = text.num_hidden_layers + with_head
    row = 2 * geometry.num_key_value_heads * geometry.head_dim * BYTES[config.target.dtype]
    return tokens * layers * row


def check_head(head: DraftHead) -> None:
    """Refuse a head that vLLM's format cannot hold.

    Raises:
        ConfigError: it cannot.
    """
    from core.draft.formats import writer

    writer(FORMAT, head.config)


def export(config: Config, target: Path, about: PretrainedConfig, folder: Path) -> Exported:
    """Write the draft head as vLLM reads it, in the target's dtype.

    Args:
        config: sections target, draft.
        target: HF folder.
        about: its config.
        folder: to be made.
    Raises:
        UserError: see `export_saved_head`.
    """
    from core.draft.export import export_saved_head
    from core.paths import resolve_path

    place = resolve_path(str(config.draft.path), field="draft.path")
    report = export_saved_head(folder, place, target, about, FORMAT, config.target.dtype)
    return Exported(folder, report["kind"])
