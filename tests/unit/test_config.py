"""The configuration: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.cli import job_names
from core.config import DRAFT_CONFIGS, Config, Section, describe, load_config
from core.errors import ConfigError

ROOT = Path(__file__).parents[2]
# Ray Serve's files are held against its schema in test_serve_arguments.py.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "deploy" not in path.stem)
SNAPSHOT = Path(__file__).parent / "snapshots" / "config_schema.json"
SECTIONS = [name for name in Config.model_fields if name not in ("output", "overwrite")]


def _sections() -> dict[str, list[type[Section]]]:
    """Section name → its classes, of which `draft` has one for each algorithm."""
    plain = {name: [type(getattr(Config(), name))] for name in SECTIONS if name != "draft"}
    return {**plain, "draft": list(DRAFT_CONFIGS.values())}


def _refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("output: /data/run\ntrain:\n  lr: 0.1\n  epochs: 3\n")
    config = load_config(str(file), ["train.lr=1e-4", "target.path=/models/a=b", "output=/other"])
    assert (config.train.lr, config.train.epochs, config.output) == (1e-4, 3, "/other")
    assert config.target.path == "/models/a=b"
    assert config.train.num_workers == Config().train.num_workers


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=3e-5", "train", "lr", 3e-5),
        ("train.epochs=1e1", "train", "epochs", 10),
        ("train.max_steps=null", "train", "max_steps", None),
        ("train.max_steps=", "train", "max_steps", None),
        ("train.betas=[0.8, 0.9]", "train", "betas", (0.8, 0.9)),
        ("eval.fixed_total_tokens=[]", "eval", "fixed_total_tokens", ()),
        ("decode.total_tokens=auto", "decode", "total_tokens", "auto"),
        ("decode.total_tokens=12", "decode", "total_tokens", 12),
        ("target.pack_linear=false", "target", "pack_linear", False),
        ("draft.bias=true", "draft", "bias", True),
        ("data.path=some file: with.json", "data", "path", "some file: with.json"),
    ],
)
def test_an_override_is_yaml(override: str, section: str, key: str, value: Any) -> None:
    if override.startswith("data.path"):
        # A colon and a space make a mapping in YAML; quotes keep the text.
        override = "data.path='some file: with.json'"
    assert getattr(getattr(load_config(None, [override]), section), key) == value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("finetune.method=qlora", "train.parallelism=zero3"),
            "finetune.method=qlora with train.parallelism=zero3: ZeRO-3 cannot divide quantized",
        ),
        (
            ("finetune.method=int8_lora", "train.parallelism=zero3"),
            "choose train.parallelism=zero2 or ddp",
        ),
        (
            ("finetune.method=int8_lora", "train.parallelism=zero2", "train.dtype=bfloat16"),
            "norms and output head, which stay in float32, to bfloat16; choose",
        ),
        (("train.parallelism=zero2", "train.dtype=float16"), "DeepSpeed has no float16 on CPU"),
        (("train.parallelism=pipeline", "train.dtype=float16"), "DeepSpeed has no float16 on CPU"),
        (
            ("finetune.method=lora", "finetune.dropout=0.1", "train.parallelism=pipeline"),
            "passes of a pipeline have no dropout; choose finetune.dropout=0",
        ),
        (
            ("finetune.optimizer=adamw_8bit", "train.parallelism=zero2"),
            "DeepSpeed cannot divide and put together again; choose train.parallelism=ddp",
        ),
        (("train.offload=optimizer", "train.parallelism=ddp"), "choose train.parallelism=zero1"),
        (("train.offload=all", "train.parallelism=zero2"), "choose train.parallelism=zero3"),
        (
            ("train.parts=[2,2]", "train.parallelism=zero2"),
            "train.parts=[2, 2] with train.parallelism=zero2: a pipeline alone is made of parts",
        ),
        (("train.min_workers=3", "train.num_workers=2"), "it is the larger of the two"),
        (
            ("train.min_workers=1", "train.num_workers=4", "train.global_batch_size=16"),
            "train.global_batch_size=16 is no multiple of 3",
        ),
        (
            ("train.min_workers=1", "train.parallelism=pipeline"),
            "a pipeline needs all of its workers",
        ),
        (
            ("train.parallelism=pipeline", "train.num_workers=4", "train.pipeline_stages=3"),
            "train.num_workers=4 is not a multiple of train.pipeline_stages=3",
        ),
        (
            ("train.parallelism=pipeline", "train.num_workers=6", "train.global_batch_size=16"),
            "train.global_batch_size=16 is not a multiple of train.num_workers=6 / "
            "train.pipeline_stages=2",
        ),
    ],
)
def test_ways_of_finetuning_that_cannot_work(overrides: tuple[str, ...], said: str) -> None:
    assert said in _refused(*overrides)


def test_ways_of_finetuning_that_work() -> None:
    for method, parallelism, dtype in (
        ("qlora", "zero2", "bfloat16"),
        ("int8_lora", "ddp", "bfloat16"),
        ("int8_lora", "zero1", "float32"),
        ("lora", "zero3", "bfloat16"),
        ("full", "pipeline", "bfloat16"),
    ):
        overrides = [f"finetune.method={method}", f"train.parallelism={parallelism}"]
        assert load_config(None, [*overrides, f"train.dtype={dtype}"]).finetune.method == method
    # Both workers of a pipeline of two stages see all of a batch.
    odd = ["train.parallelism=pipeline", "train.num_workers=2", "train.global_batch_size=9"]
    assert load_config(None, odd).train.global_batch_size == 9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("trian.lr=1", "unknown key trian; did you mean train?"),
        ("outptu=/x", "unknown key outptu; did you mean output?"),
        ("draft.vocab=1", "unknown key draft.vocab; did you mean draft.vocab_size?"),
        ("serve.zzz=1", "unknown key serve.zzz; known here: host, port"),
        ("train.lr=-1", "train.lr=-1: input should be greater than 0"),
        ("train.lr=.inf", "train.lr=inf: input should be a finite number"),
        ("train.lr=nan", "train.lr='nan': input should be"),
        ("train.lr=.nan", "train.lr=nan: input should be"),
        ("train.betas=[0.9, 1.0]", "train.betas=1.0: input should be less than 1"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.epochs=1.5", "train.epochs=1.5: input should be a valid integer"),
        ("train.parallelism=zero9", "train.parallelism='zero9': input should be 'ddp'"),
        ("decode.total_tokens=many", "decode.total_tokens='many': input should be"),
        ("decode.total_tokens=0", "decode.total_tokens=0 is outside 1..511"),
        ("decode.total_tokens=512", "decode.total_tokens=512 is outside 1..511"),
        ("decode.top_p=0", "decode.top_p=0: input should be greater than 0"),
        ("decode.top_k=0", "decode.top_k=0"),
        ("eval.fixed_total_tokens=[4, 0]", "eval.fixed_total_tokens=0"),
        ("train.num_workers=3", "train.global_batch_size=16 is not a multiple of"),
        ("finetune.method=dora", "finetune.method='dora': input should be 'full'"),
        ("data.held_out=1", "data.held_out=1: input should be less than 1"),
        ("draft.kind=eagle9", "does not match any of the expected"),
        ("train=3", "train=3: input should be a valid dictionary"),
        ("train.lr", "override 'train.lr': expected section.field=value"),
        ("=3", "override '=3': expected section.field=value"),
        ("output.path=/x", "output={'path': '/x'}: input should be a valid string"),
        ("train.lr=[1", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said(override: str, said: str) -> None:
    message = _refused(override)
    if override == "draft.kind=eagle9":
        # With one algorithm it is a wrong literal, with more a wrong tag.
        assert "eagle9" in message and "eagle1" in message
        return
    assert said in message
    assert "\n" not in message and "pydantic" not in message and "literal[" not in message


def test_several_mistakes_are_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("train: {lr: 0, epoch: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert "train.lr=0" in str(caught.value) and "did you mean train.epochs?" in str(caught.value)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("output: /data/run\n")
    with pytest.raises(ConfigError, match="output is not a section"):
        load_config(str(file), ["output.path=/x"])


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1, 2]", "expected sections, got list"), ("a: [", "not valid YAML"), ("", None)],
)
def test_files(tmp_path: Path, content: str, said: str | None) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(content)
    if said is None:
        assert load_config(str(file)) == Config()
        return
    with pytest.raises(ConfigError, match=said):
        load_config(str(file))


def test_a_missing_file_is_said_with_its_whole_path() -> None:
    with pytest.raises(ConfigError, match=re.escape(str(Path("no/such.yaml").absolute()))):
        load_config("no/such.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads(path: Path) -> None:
    assert load_config(str(path)) != Config()


def test_there_are_config_files() -> None:
    here = {path.stem for path in CONFIGS}
    assert {"smoke", "quickstart", "quickstart_eagle3", "serve_smollm2"} <= here
    targets = {"llama31_8b_eagle3", "qwen3_8b_eagle3", "vicuna_7b_eagle1", "mixtral_8x7b_eagle1"}
    assert targets <= here


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


def test_replace_validates_and_keeps_the_rest() -> None:
    config = load_config(None, ["train.epochs=3", "draft.noise=0.2"])
    changed = config.replace(output="/x", train={"lr": 0.5}, draft={"path": "/head"})
    assert (changed.train.lr, changed.train.epochs, changed.output) == (0.5, 3, "/x")
    assert (changed.draft.path, changed.draft.noise) == ("/head", 0.2)
    assert config.output is None
    with pytest.raises(ValueError, match="multiple of"):
        config.replace(train={"num_workers": 3})


def test_identity_takes_single_fields() -> None:
    config = load_config(None, ["target.template=vicuna", "target.dtype=float32"])
    sections = ["target.path", "target.template", "tracking"]
    assert config.identity(sections)["target"] == {"template": "vicuna"}
    assert config.shown(sections)["target"] == {"path": None, "template": "vicuna"}


def test_another_kind_of_draft_begins_from_its_own_defaults() -> None:
    config = load_config(None, ["draft.noise=0.2", "draft.vocab_size=5"])
    other = config.replace(draft={"kind": "eagle3", "num_ttt_steps": 3}).draft
    assert (other.kind, other.num_ttt_steps, other.vocab_size) == ("eagle3", 3, 8192)
    again = Config(draft=other).replace(draft={"vocab_size": 9}).draft
    assert (again.kind, again.num_ttt_steps, again.vocab_size) == ("eagle3", 3, 9)


def test_identity_holds_what_can_change_a_result() -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        return load_config(None, overrides).identity(["train", "target", "draft", "cluster"])

    assert identity("train.lr=1") != identity()
    assert identity("target.dtype=float32") != identity()
    assert identity("draft.noise=0.3") != identity()
    assert identity("serve.port=1", "decode.depth=3") == identity(), "of another section"
    for setting in (
        "train.cpus_per_worker=2",
        "train.max_failures=0",
        "target.path=/x",
        "target.device=cpu",
        "draft.path=/head",
        "cluster.address=auto",
    ):
        assert identity(setting) == identity(), setting


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_means(section: str) -> None:
    for cls in _sections()[section]:
        assert cls.__doc__
        for name, info in cls.model_fields.items():
            if name != "kind":
                assert info.description and len(info.description) > 8, f"{section}.{name}"


def test_describe_names_every_field_with_its_default() -> None:
    text = describe(SECTIONS)
    for section, classes in _sections().items():
        for cls in classes:
            for name in cls.model_fields:
                assert re.search(rf"^ +{section}\.{name}=\S", text, re.MULTILINE), name
    assert re.search(r"train\.lr=3e-05 +peak learning rate", text)
    assert "train.max_steps=null" in text and "train.betas=[0.9, 0.95]" in text


@pytest.mark.parametrize("name", job_names())
def test_help_names_every_field_of_the_job(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    documented = [*module.JOB.sections, *(["cluster"] if module.JOB.uses_ray else [])]
    for one in documented:
        section, _, only = one.partition(".")
        for cls in _sections()[section]:
            for key in [only] if only else cls.model_fields:
                assert f" {section}.{key}=" in text
                assert (cls.model_fields[key].description or "") in text
    with pytest.raises(ConfigError) as missing:
        module.JOB.inputs(load_config(None, []))
    assert f" {re.split('[ =]', str(missing.value))[0]}=" in text
    assert module.JOB.summary.split()[0] in text and "exit codes" in text


def test_the_schema_is_the_one_on_record() -> None:
    """Others write config files against it: a change of it must show in a diff."""
    schema = json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"
    if os.environ.get("RENEW_SNAPSHOTS"):
        SNAPSHOT.write_text(schema)
        pytest.skip(f"renewed {SNAPSHOT.name}")
    assert schema == SNAPSHOT.read_text(), (
        "the config schema has changed. If that is meant, renew the record with\n"
        "    RENEW_SNAPSHOTS=1 python -m pytest tests/unit/test_config.py -k record\n"
        "and commit it with the change"
    )


NEW_ALGORITHM = '''
from typing import ClassVar, Literal
from core.config.base import field
from core.config.draft.common import DraftConfig

class ChainConfig(DraftConfig):
    """A chain of guesses."""
    implementation: ClassVar[str] = "somewhere:Chain"
    kind: Literal["chain"] = "chain"
    links: int = field(3, "guesses a round", ge=1)
'''
USE_IT = """
from core.config import DRAFT_CONFIGS, describe, load_config
from core.errors import ConfigError
print(sorted(DRAFT_CONFIGS))
config = load_config(None, ["draft.kind=chain", "draft.links=5"])
print(type(config.draft).__name__, config.draft.links, config.draft.vocab_size)
print(type(load_config(None, ["draft.noise=0.2"]).draft).__name__)
for wrong in (["draft.kind=chain", "draft.link=5"], ["draft.kind=chian"], ["draft.links=5"]):
    try:
        load_config(None, wrong)
    except ConfigError as error:
        print(error)
print("draft.links=3" in describe(["draft"]))
import sys
print([name for name in ("torch", "ray", "transformers", "numpy") if name in sys.modules])
"""


def test_an_algorithm_is_found_by_its_file_alone(tmp_path: Path) -> None:
    """In a copy of `core.config`, which needs neither torch nor Ray nor the rest of core."""
    (tmp_path / "core").mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "core" / name, tmp_path / "core")
    shutil.copytree(ROOT / "core" / "config", tmp_path / "core" / "config")
    (tmp_path / "core" / "config" / "draft" / "chain.py").write_text(NEW_ALGORITHM)
    done = subprocess.run(
        [sys.executable, "-c", USE_IT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    kinds, chain, default, link, chian, links, described, heavy = done.stdout.splitlines()
    assert kinds == "['chain', 'eagle1', 'eagle3']"
    assert chain == "ChainConfig 5 8192"
    assert default == "Eagle1Config"
    assert link.endswith("unknown key draft.link; did you mean draft.links?")
    assert "chian" in chian and "'chain', 'eagle1', 'eagle3'" in chian
    assert "unknown key draft.links" in links
    assert (described, heavy) == ("True", "[]")
