from __future__ import annotations

from pathlib import Path

import pytest

from core.config import Config
from core.provenance import RunFolder
from core.runtime.decoding_benchmark import AERIE, PASS_TOKENS, UNPACKED, benchmark_decoding


def test_passes_and_plain_decoding_are_measured(
    tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config().replace(
        output=str(tmp_path / "out"),
        target={"path": str(tiny_target_folder), "dtype": "float32"},
        benchmark={"name": "decoding", "repeats": 1},
        eval={"cpus": 1},
    )
    folder = RunFolder("benchmark", config, ("benchmark",), {})
    report = benchmark_decoding(config, folder)
    for way in (AERIE, UNPACKED):
        figures = report["ways"][way]
        assert {f"ms_{count}" for count in PASS_TOKENS} | {"tokens_per_second"} == figures.keys()
        assert all(figure["median"] > 0 for figure in figures.values())
    assert report["ratios"]["plain_decoding_to_hf_generate"]["median"] > 0
    # A tiny model's weights are read in no time: its steps are all overhead.
    assert 0 < report["share_of_memory_limit"] < 0.2
    assert "of which plain decoding reaches" in capsys.readouterr().out.replace("\n", " ")
