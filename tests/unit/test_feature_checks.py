from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import TargetConfig
from core.data.examples import Example
from core.models.features import batch_features
from core.models.target import load_target
from core.models.tiny import save_tiny_target
from core.runtime.feature_checks import relative_errors, tolerance


def test_a_vector_of_zeros_has_no_error_unless_it_should_be_another() -> None:
    zeros, ones = torch.zeros(2, 1, 4), torch.ones(2, 1, 4)
    assert relative_errors(zeros, zeros).tolist() == [[0.0], [0.0]]
    assert relative_errors(ones, zeros).min() > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerance_lets_rounding_pass_and_another_model_not(tmp_path: Path, dtype: str) -> None:
    for seed in (0, 1):
        save_tiny_target(tmp_path / str(seed), seed=seed)
    generator = np.random.default_rng(0)
    examples = []
    for length in (120, 77, 31):
        ids = generator.integers(0, 250, length, dtype=np.int32)
        examples.append(Example("x", ids, np.ones(length, dtype=np.uint8), "made", 2))
    same = load_target(TargetConfig.model_validate({"path": str(tmp_path / "0"), "dtype": dtype}))
    plain = load_target(
        TargetConfig.model_validate(
            {"path": str(tmp_path / "0"), "dtype": dtype, "pack_linear": False}
        )
    )
    other = load_target(TargetConfig.model_validate({"path": str(tmp_path / "1"), "dtype": dtype}))
    stored_BTLH = batch_features(same, examples)
    stored_dtype = stored_BTLH.dtype
    allowed = tolerance(stored_dtype, same.dtype, num_layers=2, hidden_size=32)
    for row, example in enumerate(examples):
        stored_TLH = stored_BTLH[row, : example.num_tokens]
        for target, explained in ((same, True), (plain, True), (other, False)):
            fresh_TLH = batch_features(target, [example])[0]
            error = relative_errors(stored_TLH, fresh_TLH).mean().item()
            assert (error <= allowed) is explained
            if not explained:
                assert error > 10 * allowed
