"""Replicas come and go with the load, by a policy of Aerie's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import load_test
from tests.e2e.serving import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]


def test_one_replica_three_and_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config = str(ROOT / "configs" / "load_autoscaling.yaml")
    assert load_test.main(["--config", config, f"output={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(report["kept"].values()), report["kept"]
    assert "replicas went 1 → 3 → 1" in capsys.readouterr().out
    # Few long requests: Serve's own policy would have left it at one replica.
    assert any(one["wanted"] > one["serve_default"] for one in report["otherwise"])
    assert (tmp_path / "run" / "autoscaling.png").stat().st_size > 10_000
