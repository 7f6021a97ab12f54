"""Other engines beside Aerie: each in an environment and a process of its own.

They have the same target in the same dtype and on as many threads, and answer the same prompts in
turn with Aerie's ways. What is compared is speed: their text is theirs to answer for.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from core.config import Config
from core.draft.export import export_saved_head
from core.draft.formats import read_head, writer
from core.draft.formats.vllm import METHODS, VllmFormat
from core.errors import ConfigError, InputError, StageError
from core.evaluate.speculation import Answer
from core.models.target import Target, target_folder
from core.paths import resolve_path
from core.progress import say

VLLM, VLLM_NGRAM, VLLM_CHAIN = "vllm", "vllm_ngram", "vllm_chain"
LLAMA_CPP = "llama_cpp"
PEERS = (VLLM, VLLM_NGRAM, VLLM_CHAIN, LLAMA_CPP)
PROCESS = Path(__file__).with_name("peer_process.py")
# Tokens that vLLM looks for, at most and at least, where it drafts by copying.
NGRAM = {"prompt_lookup_max": 3, "prompt_lookup_min": 2}
# For so long OpenMP's threads may spin for more work, which the next way would wait for.
SETTLE_S = 0.3
STOP_S = 20.0
# Of its log's end that an error repeats, in characters.
SAID = 2000


class Peer:
    """An engine that answers one prompt after the other; it ends with this process.

    Attributes:
        name: of its way of decoding.
    """

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        """Start it, and wait until it has loaded the target.

        Args:
            name: one of `PEERS`.
            python: of its environment.
            settings: what `peer_process.py` loads it with.
        Raises:
            StageError: it did not start; with the end of what it said.
        """
        self.name = name
        say("evaluate_draft", f"{name} starts in the environment of {python}")
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [python, str(PROCESS)],
            # Not here: our own folders have names that it might import.
            cwd="/",
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._ask(settings)
        except BaseException:
            self.close()
            raise

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Answer:
        """At temperature 0; the seconds are those of generating alone, prompt included.

        Raises:
            StageError: it has ended; with the end of what it said.
        """
        said = self._ask({"prompt_ids": list(prompt_ids), "max_new_tokens": max_new_tokens})
        time.sleep(SETTLE_S)
        return Answer(self.name, tuple(said["token_ids"]), said["seconds"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            print(json.dumps(what), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")[-SAID:]
            raise StageError(f"{self.name} has ended; it said\n{said}")
        found: dict[str, Any] = json.loads(line)
        return found


def check_peers(config: Config) -> None:
    """Refuse, before anything is loaded, what no peer could be started with.

    Raises:
        UserError: no such Python or model, or a draft head that vLLM's format cannot hold.
    """
    settings = config.eval
    if (settings.llama_cpp_python is None) != (settings.llama_cpp_model is None):
        raise ConfigError(
            "eval.llama_cpp_python and eval.llama_cpp_model go together: the Python of an "
            "environment with llama-cpp-python, and the target as GGUF in target.dtype"
        )
    for name in ("vllm_python", "llama_cpp_python", "llama_cpp_model"):
        path = getattr(settings, name)
        if path is not None and not Path(path).expanduser().is_file():
            raise InputError(f"eval.{name}={path}: no such file")
    asked = [name for name in ("vllm_python", "llama_cpp_python") if getattr(settings, name)]
    if asked and (config.target.adapter or config.target.quantization != "none"):
        raise ConfigError(
            f"eval.{asked[0]}: target.adapter and target.quantization are Aerie's own to load, and "
            "another engine would decode another model; leave them out, or eval." + asked[0]
        )
    if settings.vllm_python and config.draft.path:
        head = read_head(resolve_path(config.draft.path, field="draft.path")).head
        writer(VllmFormat.name, head.config)


def start_peers(config: Config, target: Target, threads: int) -> list[Peer]:
    """All that `eval.vllm_python` and `eval.llama_cpp_python` ask for.

    Args:
        config: sections target, draft, decode, eval.
        target: that they are to have, as Aerie has loaded it.
        threads: of each.
    Raises:
        UserError: the draft head cannot be written for vLLM.
        StageError: an engine did not start.
    """
    settings, found = config.eval, list[Peer]()
    common = {
        "max_context": min(config.decode.max_context, target.max_position),
        "threads": threads,
        "eos_token_ids": sorted(target.eos_token_ids),
    }
    if settings.vllm_python:
        python = str(Path(settings.vllm_python).expanduser())
        model = {
            "engine": "vllm",
            "target": str(target_folder(config.target.path)),
            "dtype": config.target.dtype,
            **common,
        }
        # An engine has read the head when it has started.
        with tempfile.TemporaryDirectory(prefix="aerie-peers-") as folder:
            for name, speculative in _speculations(config, target, Path(folder)).items():
                found.append(Peer(name, python, {**model, "speculative": speculative}))
    if settings.llama_cpp_python:
        python = str(Path(settings.llama_cpp_python).expanduser())
        gguf = str(Path(str(settings.llama_cpp_model)).expanduser().absolute())
        found.append(Peer(LLAMA_CPP, python, {"engine": "llama_cpp", "model": gguf, **common}))
    return found


def _speculations(
    config: Config, target: Target, folder: Path
) -> dict[str, Mapping[str, Any] | None]:
    """What vLLM drafts with, by the names of its ways: nothing, copies, and Aerie's head."""
    drafts = {"num_speculative_tokens": config.eval.vllm_drafts}
    found: dict[str, Mapping[str, Any] | None] = {
        VLLM: None,
        VLLM_NGRAM: {"method": "ngram", **NGRAM, **drafts},
    }
    if config.draft.path:
        head = export_saved_head(
            folder / "head",
            resolve_path(config.draft.path, field="draft.path"),
            target_folder(config.target.path),
            target.model.config,
            VllmFormat.name,
            config.target.dtype,
        )
        method = METHODS[head["kind"]]
        found[VLLM_CHAIN] = {"method": method, "model": str(folder / "head"), **drafts}
    return found
