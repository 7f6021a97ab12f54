"""serve.vllm.settings: how a configuration is said to vLLM, and what of it is refused."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from core.config import Config
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.formats import read_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, InputError
from core.models.target import target_fingerprint
from core.models.tiny import save_tiny_target
from serve import run
from serve.app import HEAD_IS_FIXED, application
from serve.checks import check
from serve.desk import HeadDesk
from serve.generation import Generation, Rejected
from serve.vllm import settings as vllm
from serve.vllm.replica import VllmReplica
from tests.vllm_recordings import stand_in, stand_in_config

BY_VLLM = Config().replace(serve={"backend": "vllm"}, draft={"path": "/some/head"})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save_tiny_target(tmp_path / "tiny")
    return tmp_path / "tiny"


def head_for(target: Path, **settings: Any) -> str:
    config = Config().draft.model_copy(update=settings)
    about = AutoConfig.from_pretrained(target)
    vocabulary = DraftVocabulary.whole(about.vocab_size)
    head = build_head(config, TargetGeometry.of(about), vocabulary)
    place = target.parent / "head"
    save_head(place, head, {"target_fingerprint": target_fingerprint(target)})
    return str(place)


@pytest.mark.parametrize(
    ("decode", "tokens"),
    [
        ({}, 6),
        ({"depth": 2}, 3),
        ({"depth": 2, "total_tokens": 3}, 2),
        ({"total_tokens": 1}, 0),
    ],
)
def test_chains(decode: dict[str, Any], tokens: int) -> None:
    config = BY_VLLM.replace(decode=decode)
    said = vllm.check(config)
    assert vllm.chain(config) == tokens
    assert [f"a chain of {tokens} tokens" in sentence for sentence in said] == [True] * bool(tokens)


def test_without_a_head_nothing_is_drafted() -> None:
    plain = BY_VLLM.replace(draft={"path": None}, decode={"temperature": 1.0, "min_p": 0.1})
    assert vllm.chain(plain) == 0 and vllm.check(plain) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode": {"total_tokens": 16}}, "decode.total_tokens=16 with decode.depth=5 is a tree"),
        ({"decode": {"ngram_match": 2}}, "decode.ngram_match=2 copies into a tree"),
        ({"decode": {"min_p": 0.1}}, "set decode.min_p=0"),
        ({"decode": {"temperature": 0.7}}, "decode.temperature=0.7: on a CPU"),
        ({"target": {"quantization": "nf4"}}, "target.quantization=nf4"),
        ({"target": {"adapter": "runs/adapter"}}, "merge it into a folder first"),
        ({"target": {"device": "cuda"}}, "serve.gpus_per_replica > 0"),
    ],
)
def test_what_vllm_cannot_honour(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        vllm.check(BY_VLLM.replace(**changes))
    assert said in str(caught.value)


def test_on_a_gpu_it_may_sample() -> None:
    config = BY_VLLM.replace(decode={"temperature": 0.7}, serve={"gpus_per_replica": 1})
    assert vllm.check(config)


def test_no_such_python() -> None:
    config = BY_VLLM.replace(serve={"vllm_python": "/no/python"})
    with pytest.raises(InputError, match=r"serve\.vllm_python=/no/python: no such file"):
        vllm.check_python(config)


def test_a_python_without_vllm(tmp_path: Path) -> None:
    # Without the packages of any environment.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    config = BY_VLLM.replace(serve={"vllm_python": str(bare)})
    with pytest.raises(InputError, match=r"does not import vllm .*No module named 'vllm'"):
        vllm.check_python(config)


def test_a_python_with_it(tmp_path: Path) -> None:
    config = BY_VLLM.replace(serve={"vllm_python": stand_in(tmp_path)})
    assert vllm.check_python(config) == "stand-in"


def test_the_command(target: Path) -> None:
    config = Config().replace(
        target={"path": str(target), "dtype": "float32"},
        decode={"depth": 2, "batch_size": 4, "prefill_chunk": 100, "max_context": 200},
        serve={"vllm_python": "/v/python", "vllm_arguments": ("--swap-space", "0")},
    )
    about = AutoConfig.from_pretrained(target)
    words = vllm.command(config, target, about, None)
    assert words[:3] == ["/v/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == ["--swap-space", "0"]
    given = dict(zip(words[3::2], words[4::2], strict=False))
    assert given["--max-model-len"] == "200"
    assert given["--max-num-batched-tokens"] == "104"
    assert "--speculative-config" not in words and "--enforce-eager" in words
    head = vllm.Exported(Path("/h"), "eagle1")
    config = config.replace(draft={"path": "/h"}, serve={"gpus_per_replica": 2})
    words = vllm.command(config, target, about, head)
    assert json.loads(words[words.index("--speculative-config") + 1]) == {
        "method": "eagle",
        "model": "/h",
        "num_speculative_tokens": 3,
    }
    assert words[words.index("--max-num-batched-tokens") + 1] == "116"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in words


def test_the_cache_holds_what_aeries_would(target: Path) -> None:
    about = AutoConfig.from_pretrained(target)
    config = Config().replace(target={"dtype": "bfloat16"}, decode={"cache_tokens": 1000})
    words = vllm.command(config, target, about, None)
    size = int(words[words.index("--kv-cache-memory-bytes") + 1])
    geometry = TargetGeometry.of(about)
    row = 2 * 2 * geometry.num_key_value_heads * geometry.head_dim * about.num_hidden_layers
    assert 1000 * row <= size <= 1400 * row


def test_none_of_our_code_is_on_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/here")
    found = vllm.environment(Config().replace(serve={"cpus_per_replica": 3}))
    assert "PYTHONPATH" not in found and found["OMP_NUM_THREADS"] == "3"


def test_the_head_that_vllm_reads(target: Path) -> None:
    config = Config().replace(
        target={"path": str(target), "dtype": "bfloat16"}, draft={"path": head_for(target)}
    )
    about = AutoConfig.from_pretrained(target)
    exported = vllm.export(config, target, about, target.parent / "exported")
    assert exported.kind == "eagle1"
    found = read_head(exported.folder)
    assert found.format == "vllm"
    assert {str(p.dtype) for p in found.head.parameters()} == {"torch.bfloat16"}


def test_a_head_that_its_format_cannot_hold_is_refused_before_anything_starts(
    target: Path, tmp_path: Path
) -> None:
    config = Config().replace(
        target={"path": str(target)},
        draft={"path": head_for(target, bias=True)},
        serve={"backend": "vllm", "vllm_python": stand_in(tmp_path)},
    )
    with pytest.raises(ConfigError, match="cannot hold eagle1 heads with bias"):
        check(config)


def test_what_a_run_is_told(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config().replace(
        target={"path": str(target)},
        draft={"path": head_for(target)},
        serve={"backend": "vllm", "vllm_python": stand_in(tmp_path)},
    )
    check(config)
    said = capsys.readouterr().out
    assert "a chain of 6 tokens" in said and "decode.top_k=10" in said
    assert "vLLM stand-in decodes" in said


def test_a_wrong_setting_is_exit_code_2(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"target.path={target}", "serve.backend=vllm", "serve.vllm_python=/no/python"]
    assert run.main(arguments) == 2
    assert "serve.vllm_python=/no/python: no such file" in capsys.readouterr().err


def deployments(config: Config) -> dict[str, str]:
    """The class of each deployment's replicas."""
    found: dict[str, str] = {}
    left: list[Any] = [application(config)]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, tuple):
            left += one
        elif (deployment := getattr(one, "_bound_deployment", None)) is not None:
            found[deployment.name] = deployment.func_or_class.__name__
            left += [*deployment.init_args, *deployment.init_kwargs.values()]
    return found


def test_which_replicas_are_deployed() -> None:
    assert deployments(Config())["Decoder"] == "ServedReplica"
    assert deployments(BY_VLLM)["Decoder"] == "ServedVllmReplica"


def test_another_head_is_refused_with_the_reason() -> None:
    desk = HeadDesk("/a", rounds=1, gain=0.0, fixed=HEAD_IS_FIXED)
    with pytest.raises(InputError, match="kill -HUP"):
        asyncio.run(desk.propose("/b"))
    status = asyncio.run(desk.status())
    assert status["current"]["path"] == "/a" and status["trial"] is None


@pytest.mark.parametrize(
    ("asked_for", "param"),
    [
        ({"sampling": {"temperature": 0.5}}, "temperature"),
        ({"sampling": {"min_p": 0.1}}, "min_p"),
        ({"sampling": {"logit_bias": {5: 1.0}}}, "logit_bias"),
        ({"speculate": False}, "aerie"),
    ],
)
def test_what_vllm_has_not_with_a_head(
    tmp_path: Path, target: Path, asked_for: dict[str, Any], param: str
) -> None:
    config = stand_in_config(tmp_path).replace(
        target={"path": str(target)}, draft={"path": head_for(target)}
    )
    replica = VllmReplica(config)

    async def work() -> list[Any]:
        asked = Generation(((5,),), **asked_for)
        return [event async for event in replica.generate(asked)]

    try:
        (rejected,) = asyncio.run(work())
    finally:
        replica.close()
    assert isinstance(rejected, Rejected)
    assert (rejected.status, rejected.param) == (400, param)
    assert param in rejected.message
