"""Other engines beside Aerie: the process that each runs in, and what is refused before."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from core.config import Config
from core.errors import ConfigError, InputError, StageError
from core.evaluate.peers import LLAMA_CPP, PROCESS, Peer, check_peers, start_peers
from core.models.target import Target

# As much of llama-cpp-python as is used: it counts on from the prompt's last token, to 8.
LLAMA = """
class Llama:
    def __init__(self, model, n_ctx, n_threads, n_threads_batch, n_gpu_layers, verbose):
        print("llama.cpp says what it likes")
        self.model, self.read = model, 0
        assert (n_ctx, n_threads, n_threads_batch, verbose) == (64, 2, 2, False)
    def reset(self):
        self.read = 0
    def generate(self, tokens, temp, repeat_penalty):
        assert not self.read and (temp, repeat_penalty) == (0.0, 1.0)
        self.read = len(tokens)
        token = tokens[-1]
        while True:
            token += 1
            yield token
"""


def environment(folder: Path, **modules: str) -> str:
    """A Python that has these modules besides."""
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def settings(**others: object) -> dict[str, object]:
    return {
        "engine": "llama_cpp",
        "model": "a.gguf",
        "max_context": 64,
        "threads": 2,
        "eos_token_ids": [8],
        **others,
    }


def test_a_peer_answers_one_prompt_after_the_other(tmp_path: Path) -> None:
    with closing(Peer("there", environment(tmp_path / "e", llama_cpp=LLAMA), settings())) as peer:
        first, second = peer.answer([1, 2], 3), peer.answer([3, 6], 30)
    assert (first.way, first.token_ids) == ("there", (3, 4, 5))
    # It stops behind what ends the text.
    assert second.token_ids == (7, 8)
    assert first.seconds is not None and first.seconds > 0 and first.rounds == 0


def test_what_an_engine_says_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)there has ended; it said.*No module named 'llama_c"):
        Peer("there", environment(tmp_path / "e"), settings())
    broken = LLAMA.replace("token = tokens[-1]", "raise MemoryError('no room')")
    with closing(Peer("there", environment(tmp_path / "b", llama_cpp=broken), settings())) as peer:
        with pytest.raises(StageError, match=r"(?s)likes.*no room"):
            peer.answer([1], 2)
        # So does the next one.
        with pytest.raises(StageError, match="no room"):
            peer.answer([1], 2)


def test_the_end_of_its_input_ends_it(tmp_path: Path) -> None:
    python = environment(tmp_path / "e", llama_cpp=LLAMA)
    done = subprocess.run(
        [python, str(PROCESS)], input=json.dumps(settings()) + "\n", text=True, capture_output=True
    )
    # Nothing but answers is on its standard output.
    assert (done.returncode, done.stdout) == (0, '{"ready": true}\n')
    assert "says what it likes" in done.stderr


def test_llama_cpp_gets_the_target_as_gguf(tmp_path: Path, tiny_target: Target) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    config = Config().replace(
        decode={"max_context": 64},
        eval={
            "llama_cpp_python": environment(tmp_path / "e", llama_cpp=LLAMA),
            "llama_cpp_model": str(model),
        },
    )
    check_peers(config)
    (peer,) = start_peers(config, tiny_target, threads=2)
    with closing(peer):
        assert peer.name == LLAMA_CPP
        assert peer.answer([40], 2).token_ids == (41, 42)


@pytest.mark.parametrize(
    ("section", "error", "says"),
    [
        ({"eval": {"vllm_python": "/no/python"}}, InputError, "eval.vllm_python=/no/python: no s"),
        ({"eval": {"llama_cpp_python": sys.executable}}, ConfigError, "go together"),
        (
            {"eval": {"llama_cpp_python": sys.executable, "llama_cpp_model": "/no/gguf"}},
            InputError,
            "eval.llama_cpp_model=/no/gguf: no such file",
        ),
        (
            {"eval": {"vllm_python": sys.executable}, "target": {"quantization": "int8"}},
            ConfigError,
            "eval.vllm_python: target.adapter and target.quantization",
        ),
    ],
)
def test_what_no_peer_can_start_with_is_refused(
    section: dict[str, dict[str, object]], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        check_peers(Config().replace(**section))
